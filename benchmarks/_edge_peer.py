"""One language engine in a process of its own, told over standard input what to run: our runtime, or a peer of it.

`python _edge_peer.py ENGINE MODEL THREADS` prints one JSON line when it is loaded, then one per request line
`{"prompts": [[token, ...], ...], "max_tokens": n}`: seconds until every stream has its first token, seconds per token
after that, CPU seconds of each, resident and peak memory. Greedy. Peers run in an environment of their own, so this
file imports nothing of the project but in `ours`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Prompts = list[list[int]]
Marks = list[float]  # (wall, CPU) at the beginning, at the first token and at the end, flat
MAX_STREAMS, CONTEXT_TOKENS = 8, 1024


def ours(model: str, num_threads: int) -> Callable[[Prompts, int], tuple[Marks, int]]:
    """The agent's own runtime."""
    import queue

    from edge_agent.runtimes.base import LanguageLimits, Piece, Sampling
    from edge_agent.runtimes.language import load_language

    runtime = load_language(Path(model), LanguageLimits(CONTEXT_TOKENS, MAX_STREAMS, num_threads))

    def run(prompts: Prompts, max_tokens: int) -> tuple[Marks, int]:
        arrived: queue.SimpleQueue[tuple[int, Piece | Exception]] = queue.SimpleQueue()
        marks, num_later, begun, ended = _mark([]), 0, set(), set()
        for number, prompt in enumerate(prompts):
            runtime.start(prompt, Sampling(max_tokens), lambda piece, number=number: arrived.put((number, piece)))
        while len(ended) < len(prompts):
            number, piece = arrived.get()
            if isinstance(piece, Exception):
                raise piece
            num_later += len(begun) == len(prompts) and not ended
            begun.add(number)
            if len(begun) == len(prompts) and len(marks) == 2:
                _mark(marks)
            if piece.finish_reason is not None and not ended:
                _mark(marks)  # from here on the batch is no longer whole
            ended |= {number} if piece.finish_reason is not None else set()
        return marks, num_later

    return run


def genai(model: str, num_threads: int) -> Callable[[Prompts, int], tuple[Marks, int]]:
    """ONNX Runtime GenAI, bare: one generator for the whole batch."""
    import numpy as np
    import onnxruntime_genai

    config = onnxruntime_genai.Config(model)
    options = {"session_options": {"intra_op_num_threads": num_threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    loaded = onnxruntime_genai.Model(config)

    def run(prompts: Prompts, max_tokens: int) -> tuple[Marks, int]:
        marks = _mark([])
        params = onnxruntime_genai.GeneratorParams(loaded)
        length = len(prompts[0]) + max_tokens
        params.set_search_options(do_sample=False, max_length=length, min_length=length, batch_size=len(prompts))
        generator = onnxruntime_genai.Generator(loaded, params)
        generator.append_tokens(np.asarray(prompts if len(prompts) > 1 else prompts[0], np.int32))
        generator.generate_next_token()
        _mark(marks)
        for _ in range(max_tokens - 1):
            generator.generate_next_token()
        return _mark(marks), len(prompts) * (max_tokens - 1)

    return run


def llama_cpp(model: str, num_threads: int) -> Callable[[Prompts, int], tuple[Marks, int]]:
    """llama.cpp through its C interface: every stream is a sequence of one batch."""
    import llama_cpp as lib
    import numpy as np

    lib.llama_backend_init()
    loaded = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_seq_max = CONTEXT_TOKENS * MAX_STREAMS, MAX_STREAMS
    options.n_batch = options.n_ubatch = 512
    options.n_threads = options.n_threads_batch = num_threads
    context = lib.llama_init_from_model(loaded, options)
    num_words = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(loaded))
    batch = lib.llama_batch_init(512, 0, 1)

    def decode(entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Run (token, position, sequence, wants logits); the best next token of those that want one."""
        batch.n_tokens = len(entries)
        for at, (token, position, sequence, wants) in enumerate(entries):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
            batch.seq_id[at][0], batch.logits[at] = sequence, wants
        if lib.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        wanted = [at for at, entry in enumerate(entries) if entry[3]]
        rows = (np.ctypeslib.as_array(lib.llama_get_logits_ith(context, at), (num_words,)) for at in wanted)
        return [int(np.argmax(row)) for row in rows]

    def run(prompts: Prompts, max_tokens: int) -> tuple[Marks, int]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        marks, tokens = _mark([]), []
        for sequence, prompt in enumerate(prompts):
            last = len(prompt) - 1
            tokens += decode([(token, at, sequence, at == last) for at, token in enumerate(prompt)])
        _mark(marks)
        for step in range(max_tokens - 1):
            place = len(prompts[0]) + step
            tokens = decode([(token, place, sequence, True) for sequence, token in enumerate(tokens)])
        return _mark(marks), len(prompts) * (max_tokens - 1)

    return run


def openvino(model: str, num_threads: int) -> Callable[[Prompts, int], tuple[Marks, int]]:
    """OpenVINO GenAI: reads the GGUF file itself, continuous batching."""
    import numpy as np
    import openvino as ov
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs = 1, MAX_STREAMS
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": num_threads}
    )

    def run(prompts: Prompts, max_tokens: int) -> tuple[Marks, int]:
        options = openvino_genai.GenerationConfig(max_new_tokens=max_tokens, ignore_eos=True, do_sample=False)
        marks, num_later, begun = _mark([]), 0, set()
        handles = [
            pipeline.add_request(number, ov.Tensor(np.asarray([prompt], np.int64)), options)
            for number, prompt in enumerate(prompts)
        ]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for number, handle in enumerate(handles):
                if handle.can_read():
                    num_new = sum(len(output.generated_ids) for output in handle.read().values())
                    num_later += num_new if len(marks) > 2 else 0
                    begun.add(number)
            if len(begun) == len(prompts) and len(marks) == 2:
                _mark(marks)
        return _mark(marks), num_later

    return run


ENGINES = {"ours": ours, "genai": genai, "llama_cpp": llama_cpp, "openvino": openvino}


def _mark(marks: Marks) -> Marks:
    marks += [time.perf_counter(), time.process_time()]
    return marks


def _memory_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Load, then answer until standard input ends."""
    engine, model, num_threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what an engine prints is no answer
    run = ENGINES[engine](model, num_threads)
    answers.write(json.dumps({"loaded_mb": _memory_mb("VmRSS")}) + "\n")
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        marks, num_later = run(asked["prompts"], asked["max_tokens"])
        answer = {
            "first_s": marks[2] - marks[0],
            "first_cpu_s": marks[3] - marks[1],
            "later_s_per_token": (marks[4] - marks[2]) / max(num_later, 1),
            "later_cpu_s_per_token": (marks[5] - marks[3]) / max(num_later, 1),
            "num_later": num_later,
            "resident_mb": _memory_mb("VmRSS"),
            "peak_mb": _memory_mb("VmHWM"),
        }
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
