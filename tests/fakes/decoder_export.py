"""Small random decoders as ONNX graphs: by `torch.onnx.export` with explicit keys and values, hidden states and a place
for an adapter, and by ONNX Runtime GenAI's builder. Both with the source model beside them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from tests.fakes.serving_models import SHAPE, save_tiny_tokenizer

RANK = 4
ADAPTER = ("lora_a", "lora_b")


class _Explicit(torch.nn.Module):
    """Tokens, positions and caches in; logits, hidden states and longer caches out. logits += (hidden @ A) @ B."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.lora_a = torch.nn.Parameter(torch.zeros(model.config.hidden_size, RANK))
        self.lora_b = torch.nn.Parameter(torch.zeros(RANK, model.config.vocab_size))

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor) -> Any:
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=True,
        )
        hidden = out.hidden_states[-1]
        logits = out.logits + hidden @ self.lora_a @ self.lora_b
        return logits, hidden, *(part for layer in out.past_key_values.layers for part in (layer.keys, layer.values))


def tiny_source(folder: Path) -> Any:
    """A random Llama in `folder` with its tokenizer; returns the model. Head size 16 suits ONNX Runtime's attention."""
    torch.manual_seed(0)
    shape = {**SHAPE, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def export_generic(source: Path, out: Path) -> None:
    """The decoder in `source` as a generic graph in `out`."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    config = model.config
    num_layers, head_size = config.num_hidden_layers, config.hidden_size // config.num_attention_heads
    past = [torch.zeros(1, config.num_key_value_heads, 3, head_size) for _ in range(2 * num_layers)]
    names = [f"past_key_values.{layer}.{part}" for layer in range(num_layers) for part in ("key", "value")]
    outputs = ["logits", "hidden_states", *(name.replace("past_key_values", "present") for name in names)]
    auto = torch.export.Dim.AUTO
    out.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's exporter calls its own deprecated names
        torch.onnx.export(
            _Explicit(model).eval(),
            (torch.ones(1, 2, dtype=torch.long), torch.tensor([[3, 4]]), *past),
            str(out / "model.onnx"),
            dynamo=True,
            verbose=False,
            input_names=["input_ids", "position_ids", *names],
            output_names=outputs,
            dynamic_shapes=({1: auto}, {1: auto}, tuple({2: auto} for _ in past)),
            external_data=False,
        )
    _open_initializers(out / "model.onnx")
    _describe(config, head_size, out)
    _copy_tokenizer(source, out)


def build_shared(source: Path, out: Path) -> None:
    """The decoder in `source` by ONNX Runtime GenAI's builder, float32, with hidden states."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out)]
    command += [
        "-p",
        "fp32",
        "-e",
        "cpu",
        "-c",
        str(out.parent / "cache"),
        "--extra_options",
        "include_hidden_states=true",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)


def write_adapter(path: Path, source: Any, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A random adapter for `export_generic`'s graph; returns its two matrices."""
    random = np.random.default_rng(seed)
    a = random.standard_normal((source.config.hidden_size, RANK)).astype(np.float32)
    b = random.standard_normal((RANK, source.config.vocab_size)).astype(np.float32)
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    values = (onnxruntime.OrtValue.ortvalue_from_numpy(matrix) for matrix in (a, b))
    adapter.set_parameters(dict(zip(ADAPTER, values, strict=True)))
    adapter.export_adapter(str(path))
    return a, b


def _open_initializers(path: Path) -> None:
    """The adapter's matrices become inputs with a default."""
    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        if tensor.name in ADAPTER:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.save(model, str(path))


def _describe(config: Any, head_size: int, out: Path) -> None:
    decoder = {"filename": "model.onnx", "num_hidden_layers": config.num_hidden_layers, "head_size": head_size}
    tokens = {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = {"type": "llama", "context_length": 256, "vocab_size": config.vocab_size, "decoder": decoder, **tokens}
    (out / "genai_config.json").write_text(json.dumps({"model": model, "search": {}}))


def _copy_tokenizer(source: Path, out: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, out / name)
