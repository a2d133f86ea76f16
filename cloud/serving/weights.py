"""From a Hugging Face style folder to a `Decoder`: config.json, safetensors shards, nothing else.

Tensors are read one at a time from memory-mapped shards and converted on the way, so peak memory stays near the size of
the result. Pickled weights are never opened. `model_digest` names the exact weights; caches and hand-offs depend on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cloud.serving.backend import Backend, Tensor
from cloud.serving.models import llama, qwen2, qwen3, qwen3_moe
from cloud.serving.models.decoder import Decoder, DecoderConfig, DecoderWeights, LayerWeights
from wire.errors import UnsupportedModelError

_FAMILIES = (llama, qwen2, qwen3, qwen3_moe)
_MAX_CONFIG_BYTES = 1 << 20


def load_config(folder: Path) -> DecoderConfig:
    """Read `config.json` (and the end-of-sequence ids of `generation_config.json`, which chat models need)."""
    data = _read_object(folder / "config.json", required=True)
    generation = _read_object(folder / "generation_config.json", required=False)
    if generation.get("eos_token_id") is not None:
        data = {**data, "eos_token_id": generation["eos_token_id"]}
    architectures = data.get("architectures") or []
    for family in _FAMILIES:
        if any(name in family.ARCHITECTURES for name in architectures):
            return family.config_from(data)
    known = ", ".join(name for family in _FAMILIES for name in family.ARCHITECTURES)
    raise UnsupportedModelError(
        f"architecture {', '.join(architectures) or 'none'} in {folder} is not supported", remedy=f"one of {known}"
    )


def model_digest(folder: Path) -> str:
    """SHA-256 over config.json and the content of every safetensors shard, read in parallel."""
    files = [folder / "config.json", *_shards(folder)]
    with ThreadPoolExecutor(max_workers=4) as executor:
        digests = list(executor.map(_file_digest, files))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def load_decoder(
    folder: Path, config: DecoderConfig, backend: Backend, dtype: Any, max_positions: int, device: str = "cpu"
) -> Decoder:
    """Read the weights of `folder` in `dtype` and bind them to `backend`."""
    with _Shards(_shards(folder), dtype, device) as shards:
        weights = _assemble(config, shards.get, shards.find, backend)
    return Decoder(config, weights, backend, max_positions)


def _assemble(
    config: DecoderConfig, get: Callable[[str], Tensor], find: Callable[[str], Tensor | None], backend: Backend
) -> DecoderWeights:
    embedding = get("model.embed_tokens.weight")
    head = None if config.has_tied_embeddings else find("lm_head.weight")
    return DecoderWeights(
        embedding=embedding,
        layers=[_layer(config, f"model.layers.{index}.", get, backend) for index in range(config.num_layers)],
        norm=get("model.norm.weight"),
        head=backend.prepare_weight(embedding if head is None else head, is_head=True),
    )


def _layer(config: DecoderConfig, prefix: str, get: Callable[[str], Tensor], backend: Backend) -> LayerWeights:
    def stack(names: tuple[str, ...], kind: str) -> Tensor:
        return torch.cat([get(f"{prefix}{name}.{kind}") for name in names])

    def over_experts(read: Callable[[str], Tensor]) -> Tensor:
        if config.experts is None:
            return read("mlp")
        return torch.stack([read(f"mlp.experts.{index}") for index in range(config.experts.num_experts)])

    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return LayerWeights(
        input_norm=get(f"{prefix}input_layernorm.weight"),
        qkv=backend.prepare_weight(stack(qkv, "weight")),
        qkv_bias=stack(qkv, "bias") if config.has_qkv_bias else None,
        output=backend.prepare_weight(get(f"{prefix}self_attn.o_proj.weight")),
        output_bias=get(f"{prefix}self_attn.o_proj.bias") if config.has_output_bias else None,
        q_norm=get(f"{prefix}self_attn.q_norm.weight") if config.has_qk_norm else None,
        k_norm=get(f"{prefix}self_attn.k_norm.weight") if config.has_qk_norm else None,
        post_norm=get(f"{prefix}post_attention_layernorm.weight"),
        gate_up=backend.prepare_weight(
            over_experts(lambda mlp: stack((f"{mlp}.gate_proj", f"{mlp}.up_proj"), "weight"))
        ),
        down=backend.prepare_weight(over_experts(lambda mlp: get(f"{prefix}{mlp}.down_proj.weight"))),
        router=get(f"{prefix}mlp.gate.weight") if config.experts is not None else None,
    )


class _Shards:
    """Tensors by name over all shards of a folder."""

    def __init__(self, files: list[Path], dtype: Any, device: str) -> None:
        self._stack = ExitStack()
        self._dtype = dtype
        self._device = device
        self._file_by_name: dict[str, Any] = {}
        try:
            self._files: list[Any] = [self._stack.enter_context(safe_open(str(path), framework="pt")) for path in files]
        except (SafetensorError, OSError) as error:
            raise UnsupportedModelError(f"weights cannot be read: {error}", remedy="export the model again") from error
        for file in self._files:
            self._file_by_name.update(dict.fromkeys(file.keys(), file))

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def find(self, name: str) -> Tensor | None:
        """The tensor, converted and on the device; None when no shard has it.

        A model without a head, as models for embeddings are saved, has the same names without `model.`.
        """
        if name not in self._file_by_name:
            name = name.removeprefix("model.")
        file = self._file_by_name.get(name)
        return None if file is None else file.get_tensor(name).to(self._device, self._dtype)

    def get(self, name: str) -> Tensor:
        """The tensor; raises `UnsupportedModelError` when it is missing."""
        tensor = self.find(name)
        if tensor is None:
            raise UnsupportedModelError(f"the weights have no tensor {name!r}", remedy="export the whole model")
        return tensor


def _shards(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UnsupportedModelError(
            f"{folder} has no safetensors weights", remedy="convert them: foreshore import FILE.gguf --out DIR"
        )
    return files


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_object(path: Path, *, required: bool) -> Mapping[str, Any]:
    if not path.is_file():
        if required:
            raise UnsupportedModelError(f"{path} is missing", remedy="give a Hugging Face style folder")
        return {}
    data = read_json(path)
    if not isinstance(data, dict):
        raise UnsupportedModelError(f"{path} does not hold an object", remedy="check the file")
    return data


def read_json(path: Path) -> Any:
    """The content of a small JSON file of a model folder; raises `UnsupportedModelError`."""
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise UnsupportedModelError(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes", remedy="check the folder")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModelError(f"{path} is not JSON: {error}", remedy="check the file") from error
