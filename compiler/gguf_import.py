"""A GGUF file turned into a Hugging Face style folder: safetensors, config, tokenizer.

The weights are dequantised to bfloat16, so later quantisation is judged against the dequantised file, never against
the model it came from. Llama-type files store the query and key rows in another order for the rotary embedding; it
is undone here. A tied output head keeps the better of the two stored matrices. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from compiler.gguf_tokenizer import write_tokenizer
from wire.errors import ConflictError, UnsupportedModelError

QUANTISATIONS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Architecture:
    """What differs between the families that GGUF names in `general.architecture`."""

    class_name: str
    model_type: str
    has_permuted_rotary: bool = False
    extra: Mapping[str, Any] | None = None


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", "llama", has_permuted_rotary=True, extra={"attention_bias": False}),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", extra={"attention_bias": False}),
}


def import_gguf(path: Path, folder: Path, report: Report = lambda share, what: None) -> Path:
    """Convert the GGUF file at `path` into `folder` (must not exist yet) and return it.

    `report(share, what)` is called as tensors are converted. Raises `UnsupportedModelError`, `ConflictError`.
    """
    if folder.exists():
        raise ConflictError(f"{folder} exists", remedy="remove it or choose another folder")
    reader = _open(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    architecture = _architecture(fields)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        tensors = dict(_tensors(reader, fields, architecture, report))
        tied = _tie(reader, tensors)
        config = _config(fields, architecture, tied=tied, vocab_size=len(tensors["model.embed_tokens.weight"]))
        save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
        (staging / "config.json").write_text(json.dumps(config, indent=2))
        (staging / "generation_config.json").write_text(json.dumps(_generation(fields), indent=2))
        write_tokenizer(fields, staging)
        staging.chmod(0o755)
        (staging / "model.safetensors").chmod(0o644)
        os.rename(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return folder


def _open(path: Path) -> Any:
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, TypeError) as error:
        raise UnsupportedModelError(
            f"{path.name} is not a readable GGUF file: {error}", remedy="download it again"
        ) from (error)


def _architecture(fields: Mapping[str, Any]) -> Architecture:
    name = str(fields.get("general.architecture"))
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(f"GGUF architecture {name!r} cannot be imported", remedy=f"known are: {known}")
    for key in (f"{name}.rope.scaling.type", f"{name}.expert_count"):
        if fields.get(key) not in (None, 0, "none"):
            raise UnsupportedModelError(
                f"the GGUF file states {key} = {fields[key]!r}", remedy="it is not supported yet"
            )
    return ARCHITECTURES[name]


def _tensors(
    reader: Any, fields: Mapping[str, Any], architecture: Architecture, report: Report
) -> Iterator[tuple[str, torch.Tensor]]:
    prefix = fields["general.architecture"]
    num_heads = fields[f"{prefix}.attention.head_count"]
    num_kv_heads = fields.get(f"{prefix}.attention.head_count_kv", num_heads)
    heads_by_part = {"attn_q": num_heads, "attn_k": num_kv_heads} if architecture.has_permuted_rotary else {}
    for done, tensor in enumerate(reader.tensors):
        name = _rename(tensor.name)
        if name is None:
            continue
        weight = _dequantise(tensor)
        for part, heads in heads_by_part.items():
            if f".{part}." in tensor.name:
                weight = unpermute(weight, heads)
        yield name, torch.from_numpy(weight).to(torch.bfloat16).contiguous()
        report((done + 1) / len(reader.tensors), name)


def unpermute(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Undo the row order that llama.cpp gives query and key projections; `weight` is [heads * head_dim, in]."""
    head_dim = weight.shape[0] // num_heads
    rows = weight.reshape(num_heads, head_dim // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(weight.shape))


def _rename(name: str) -> str | None:
    if name in _NAMES:
        return _NAMES[name]
    if name == "rope_freqs.weight":  # derived from the config
        return None
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES and parts[3] in ("weight", "bias"):
        return f"model.layers.{int(parts[1])}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise UnsupportedModelError(f"the GGUF file has an unknown tensor {name!r}", remedy="its architecture differs")


def _dequantise(tensor: Any) -> np.ndarray[Any, Any]:
    kind = tensor.tensor_type.name
    if kind not in QUANTISATIONS:
        raise UnsupportedModelError(
            f"tensor {tensor.name!r} is quantised as {kind}", remedy=f"known are: {', '.join(QUANTISATIONS)}"
        )
    shape = tuple(int(size) for size in reversed(tensor.shape))
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(shape)
    if not np.isfinite(values).all():
        raise UnsupportedModelError(
            f"tensor {tensor.name!r} holds infinite or undefined numbers", remedy="download it again"
        )
    return values if values.flags.writeable else values.copy()


def _tie(reader: Any, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether the head shares the embedding's matrix; then `tensors` keeps one of them, the more precise one.

    A file of a tied model may store the matrix twice with different quantisations: nearly equal, so one serves both.
    """
    head = tensors.get("lm_head.weight")
    if head is None:
        return True
    embedding = tensors["model.embed_tokens.weight"]
    if head.shape != embedding.shape or not _nearly_equal(head, embedding):
        return False
    bits = {t.name: t.n_bytes / max(1, int(t.n_elements)) for t in reader.tensors}
    if bits["output.weight"] >= bits["token_embd.weight"]:
        tensors["model.embed_tokens.weight"] = head
    del tensors["lm_head.weight"]
    return True


def _nearly_equal(head: torch.Tensor, embedding: torch.Tensor) -> bool:
    rows = slice(0, None, max(1, len(head) // 512))
    return bool(torch.nn.functional.cosine_similarity(head[rows].float(), embedding[rows].float()).mean() > 0.98)


def _config(fields: Mapping[str, Any], architecture: Architecture, *, tied: bool, vocab_size: int) -> dict[str, Any]:
    prefix = fields["general.architecture"]
    hidden = fields[f"{prefix}.embedding_length"]
    heads = fields[f"{prefix}.attention.head_count"]
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_size": hidden,
        "intermediate_size": fields[f"{prefix}.feed_forward_length"],
        "num_hidden_layers": fields[f"{prefix}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get(f"{prefix}.attention.head_count_kv", heads),
        "head_dim": fields.get(f"{prefix}.attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": fields[f"{prefix}.context_length"],
        "rms_norm_eps": round(float(fields[f"{prefix}.attention.layer_norm_rms_epsilon"]), 12),
        "rope_theta": float(fields.get(f"{prefix}.rope.freq_base", 10000.0)),
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **_special_ids(fields),
        **(architecture.extra or {}),
    }


def _generation(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"do_sample": False, **_special_ids(fields)}


def _special_ids(fields: Mapping[str, Any]) -> dict[str, int]:
    pairs = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    found = {f"{role}_token_id": fields.get(f"tokenizer.ggml.{key}_token_id") for role, key in pairs}
    return {name: int(value) for name, value in found.items() if value is not None}
