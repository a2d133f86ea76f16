"""One forward pass on the GPU: the numbers a step needs in one flat copy, and the fused kernels in their order.

Rules, in order:
1. Everything that changes from step to step travels in one int32 buffer, so a step costs one copy to the device and a
   captured graph can read the same addresses for ever.
2. A token the host does not know yet (drawn by a step still in flight) is -1; the device takes it from `latest`.
3. Nothing here looks at a value on the device, so nothing waits.

Decoding rows come first in a step; the chunks of prefill follow. In the last layer only sampled rows ask: each is the
last token of its context, so decode attention serves them all. A step that pools embeddings computes all its rows to
the end; it has prefill, so it is never a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from cloud.serving.kv_pool import KvPool
from cloud.serving.models.decoder import Decoder, LayerWeights, rotary_tables
from kernels import activation, decode_attention, gemv, kv_cache, moe, norm, prefill_attention, quant, tokens

Tensor = Any
UNKNOWN_TOKEN = -1
GEMV_ROWS = 2  # decoding rows up to which fused vector products beat the library's (benchmarks/kernels.py)


@dataclass(frozen=True)
class StepShape:
    """What fixes the kernels of a step: a decode graph exists per shape with `num_prefills` 0."""

    num_tokens: int
    num_decodes: int
    num_prefills: int
    num_sampled: int
    num_blocks: int  # columns of the block tables
    num_splits: int
    is_pooling: bool = False  # hidden states of all rows are wanted

    @property
    def num_sequences(self) -> int:
        """Decoding rows and prefill chunks."""
        return self.num_decodes + self.num_prefills

    @property
    def is_cut(self) -> bool:
        """Whether the last layer computes the sampled rows only."""
        return self.num_prefills > 0 and not self.is_pooling

    def sizes(self) -> dict[str, int]:
        """Fields of the flat buffer, in order, with their lengths."""
        return {
            "tokens": self.num_tokens,
            "token_rows": self.num_tokens,  # where in `latest` an unknown token lies
            "positions": self.num_tokens,
            "slots": self.num_tokens,
            "context_lens": self.num_sequences,
            "prefill_starts": self.num_prefills + 1,
            "sampled": self.num_sampled,  # token index of each sampled row
            "sampled_rows": self.num_sampled,  # where in `latest` its token goes
            "sampled_sequences": self.num_sampled,  # whose context it has
            "tables": self.num_sequences * self.num_blocks,
        }

    @property
    def size(self) -> int:
        """Elements of the flat buffer."""
        return sum(self.sizes().values())

    def views(self, flat: Any) -> dict[str, Any]:
        """The fields as views of a flat array or tensor."""
        out: dict[str, Any] = {}
        begin = 0
        for name, size in self.sizes().items():
            out[name] = flat[begin : begin + size]
            begin += size
        out["tables"] = out["tables"].reshape(self.num_sequences, self.num_blocks)
        return out


def padded_step(shape: StepShape, scratch_row: int) -> np.ndarray[Any, Any]:
    """The flat buffer of a step in which every row is padding: no context, no slot, token 0."""
    flat = np.zeros(shape.size, dtype=np.int32)
    fields = shape.views(flat)
    fields["slots"][:] = -1
    fields["token_rows"][:] = scratch_row
    fields["sampled_rows"][:] = scratch_row
    fields["sampled"][:] = fields["sampled_sequences"][:] = np.arange(shape.num_sampled)
    return flat


class CudaStep:
    """The forward pass of one decoder over one KV pool with Triton kernels; greedy tokens land in `latest`."""

    def __init__(self, decoder: Decoder, kv: KvPool, num_rows: int, max_splits: int, max_positions: int) -> None:
        config = decoder.config
        device = decoder.weights.embedding.device
        cos, sin = rotary_tables(config, max_positions)
        half = config.head_dim // 2
        self.decoder = decoder
        self.kv = kv
        self.cos_sin = torch.cat((cos[:, :half], sin[:, :half]), dim=-1).contiguous().to(device)
        self.latest = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.workspace = decode_attention.SplitWorkspace.allocate(
            num_rows if max_splits <= 1 else min(num_rows, 64), config.num_heads, config.head_dim, max_splits, device
        )

    def forward(self, flat: Tensor, shape: StepShape) -> tuple[Tensor, Tensor, Tensor | None]:
        """(greedy tokens int32 [R], logits [R, vocab]) of the sampled rows; KV of all tokens is written.

        The third is [T, hidden], the states after the last norm, of a step that pools, and None of any other.
        """
        fields = shape.views(flat)
        weights, config = self.decoder.weights, self.decoder.config
        eps = config.norm_eps
        residual = tokens.embed(fields["tokens"], fields["token_rows"], self.latest, weights.embedding)  # [T, hidden]
        if shape.num_tokens == shape.num_decodes <= GEMV_ROWS and not isinstance(weights.head, quant.QuantWeight):
            logits = self._forward_few(residual, fields, shape)
            return tokens.pick_best(logits, fields["sampled_rows"], self.latest), logits, None
        x = norm.rms_norm(residual, weights.layers[0].input_norm, eps, torch.empty_like(residual))
        for index, layer in enumerate(weights.layers):
            qkv = _product(x, layer.qkv, layer.qkv_bias)
            if index + 1 == config.num_layers and shape.is_cut:
                residual = residual[fields["sampled"]]
            x = _product(self._attend(qkv, index, fields, shape), layer.output, layer.output_bias)
            x = norm.add_rms_norm(x, residual, layer.post_norm, eps, x)
            x = self._mlp(x, layer)
            following = weights.layers[index + 1].input_norm if index + 1 < config.num_layers else weights.norm
            x = norm.add_rms_norm(x, residual, following, eps, x)
        hidden = x if shape.is_pooling else None
        logits = _product(x if hidden is None else x[fields["sampled"]], weights.head)
        return tokens.pick_best(logits, fields["sampled_rows"], self.latest), logits, hidden

    def _forward_few(self, residual: Tensor, fields: dict[str, Tensor], shape: StepShape) -> Tensor:
        """Logits of a step of a few decoding rows: every product takes over what stands around it."""
        weights, config = self.decoder.weights, self.decoder.config
        eps, rows = config.norm_eps, shape.num_tokens

        def project(x: Tensor, weight: Tensor, columns: int, norm_weight: Tensor, **options: Any) -> Tensor:
            return gemv.linear(x, weight, x.new_empty(rows, columns), norm=(norm_weight, eps), **options)

        for index, layer in enumerate(weights.layers):
            qkv = project(residual, layer.qkv, layer.qkv.shape[0], layer.input_norm, bias=layer.qkv_bias)
            attended = self._attend(qkv, index, fields, shape)
            gemv.linear(attended, layer.output, residual, layer.output_bias, adds=True)
            if config.experts is not None:
                scores = project(residual, layer.router, config.experts.num_experts, layer.post_norm)
                mix, chosen = moe.route(scores, config.experts.top_k, config.experts.is_renormalised)
                gemv.experts_mlp(residual, layer.gate_up, layer.down, mix, chosen, (layer.post_norm, eps))
            else:
                inner = project(residual, layer.gate_up, config.intermediate_size, layer.post_norm, is_gated=True)
                gemv.linear(inner, layer.down, residual, adds=True)
        return project(residual, weights.head, config.vocab_size, weights.norm)

    def _mlp(self, x: Tensor, layer: LayerWeights) -> Tensor:
        experts = self.decoder.config.experts
        if experts is not None:
            weights, chosen = moe.route(F.linear(x, layer.router), experts.top_k, experts.is_renormalised)
            return moe.experts_mlp(x, layer.gate_up, layer.down, weights, chosen)
        gate_up = _product(x, layer.gate_up)
        hidden = activation.silu_mul(gate_up, gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2))
        return _product(hidden, layer.down)

    def _attend(self, qkv: Tensor, index: int, fields: dict[str, Tensor], shape: StepShape) -> Tensor:
        """Attention's output [T, heads * head_dim] of a layer; the step's keys and values are in its cache after.

        In the last layer of a step with prefill the output has the sampled rows only, unless the step pools.
        """
        config, layer = self.decoder.config, self.decoder.weights.layers[index]
        k_cache, v_cache = self.kv.keys[index], self.kv.values[index]
        q = qkv.new_empty(shape.num_tokens, config.num_heads, config.head_dim)
        norms = None if layer.q_norm is None else (layer.q_norm, layer.k_norm, config.norm_eps)
        kv_cache.rotary_and_write(qkv, fields["positions"], fields["slots"], self.cos_sin, k_cache, v_cache, q, norms)
        tables, lens, scale = fields["tables"], fields["context_lens"], self.decoder.scale
        first, starts = shape.num_decodes, fields["prefill_starts"]
        is_cut = index + 1 == config.num_layers and shape.is_cut
        if is_cut:
            sequences = fields["sampled_sequences"]
            q, tables, lens, first = q[fields["sampled"]], tables[sequences], lens[sequences], shape.num_sampled
        out = torch.empty_like(q)
        if first:
            decode_attention.decode(
                q[:first], k_cache, v_cache, tables[:first], lens[:first], scale, out[:first],
                shape.num_splits, self.workspace,
            )  # fmt: skip
        if shape.num_prefills and not is_cut:
            prefill_attention.prefill(
                q[first:], k_cache, v_cache, tables[first:], lens[first:], starts, scale, out[first:]
            )
        return out.flatten(1)


def _product(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times a whole weight by the library, or a rounded one by our kernel."""
    if not isinstance(weight, quant.QuantWeight):
        return F.linear(x, weight, bias)
    out = quant.linear(x, weight)
    return out if bias is None else out.add_(bias)
