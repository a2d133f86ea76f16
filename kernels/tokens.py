"""Tokens on the device at both ends of a step: ids to embeddings, logits to the most likely ids.

Rules: an id of -1 is not known to the host yet and is taken from `latest`, where the step before left it. Of equal
logits the lowest id wins, as on the CPU. No sampling here: draws other than the plainest are made on the host.
"""

# Triton functions are traced, not typed.
# mypy: disable-error-code="no-untyped-def,attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import let_next_start, overlap, wait_for_previous

ARGMAX_BLOCK = 4096  # logits that one program looks at


@triton.jit(do_not_specialize_on_alignment=["p_tokens", "p_rows"])
def _embed_kernel(
    p_tokens,
    p_rows,
    p_latest,
    p_table,
    p_out,
    width,
    stride_table,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    i_token = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)
    token = tl.load(p_tokens + i_token)
    latest = tl.load(p_latest + tl.load(p_rows + i_token))
    token = tl.where(token < 0, latest, token).to(tl.int64)
    m = o < width
    tl.store(p_out + i_token * width + o, tl.load(p_table + token * stride_table + o, mask=m), mask=m)


@triton.jit
def _argmax_parts_kernel(
    p_logits, p_best, p_ids, num_columns, stride, num_parts, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
):
    i_part = tl.program_id(0)
    i_row = tl.program_id(1)
    o = i_part * BLOCK + tl.arange(0, BLOCK)
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)
    p_row = p_logits + i_row.to(tl.int64) * stride
    b_x = tl.load(p_row + o, mask=o < num_columns, other=float("-inf")).to(tl.float32)
    best = tl.max(b_x, 0)
    tl.store(p_best + i_row * num_parts + i_part, best)
    tl.store(p_ids + i_row * num_parts + i_part, tl.min(tl.where(b_x == best, o, num_columns), 0))


@triton.jit(do_not_specialize_on_alignment=["p_rows"])
def _argmax_join_kernel(
    p_best, p_ids, p_rows, p_latest, p_out, num_columns, num_parts, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
):
    i_row = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    m = o < num_parts
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)
    b_best = tl.load(p_best + i_row * num_parts + o, mask=m, other=float("-inf"))
    b_ids = tl.load(p_ids + i_row * num_parts + o, mask=m, other=num_columns)
    token = tl.min(tl.where(b_best == tl.max(b_best, 0), b_ids, num_columns), 0)
    token = tl.minimum(token, num_columns - 1)  # a row of nothing but NaN has no best
    tl.store(p_out + i_row, token)
    tl.store(p_latest + tl.load(p_rows + i_row), token)


def embed(tokens: Tensor, rows: Tensor, latest: Tensor, table: Tensor) -> Tensor:
    """Rows [num_tokens, width] of `table` for int32 ids `tokens`; -1 stands for `latest[rows[i]]`."""
    width = table.shape[1]
    out = table.new_empty(tokens.shape[0], width)
    _embed_kernel[(tokens.shape[0],)](
        tokens, rows, latest, table, out, width, table.stride(0),
        BLOCK=triton.next_power_of_2(width), num_warps=4, **overlap(table),
    )  # fmt: skip
    return out


def pick_best(logits: Tensor, rows: Tensor, latest: Tensor) -> Tensor:
    """Ids int32 [num_rows] of the largest logits [num_rows, vocab], also written to `latest[rows[i]]`."""
    num_rows, num_columns = logits.shape
    num_parts = triton.cdiv(num_columns, ARGMAX_BLOCK)
    best = torch.empty(num_rows, num_parts, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_rows, num_parts, dtype=torch.int32, device=logits.device)
    out = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    _argmax_parts_kernel[(num_parts, num_rows)](
        logits, best, ids, num_columns, logits.stride(0), num_parts,
        BLOCK=ARGMAX_BLOCK, num_warps=4, **overlap(logits),
    )  # fmt: skip
    _argmax_join_kernel[(num_rows,)](
        best, ids, rows, latest, out, num_columns, num_parts,
        BLOCK=triton.next_power_of_2(num_parts), num_warps=1, **overlap(logits),
    )  # fmt: skip
    return out
