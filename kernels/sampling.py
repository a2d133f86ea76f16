"""Drawing tokens on the device: penalties, temperature, min-p, top-k, top-p and seeded noise, without a sort.

The draw is the largest of logit + noise among the tokens that the filters keep. All filters keep upper parts of the
distribution, so a largest sum that is not kept rules out every token that is not likelier than it; the search goes on
among the likelier ones. `cloud.serving.sampler` states the filters, `noise` the noise. Four kernels:
1. measure: the largest logit and the mass of each piece of a row (`BLOCK` columns);
2. bound: the row's largest, its mass, and a logit below which nothing is kept: by min-p, and by the k-th largest of the
   pieces' largest, as k tokens are at least that likely;
3. scan: the largest sum of each four pieces, where one of them reaches the bound;
4. settle: the row's largest sum is checked against top-k and top-p in the pieces that hold likelier tokens. A candidate
   fails about as often as top-p cuts off probability, so more than one round is rare.

Ids seen so far are counted per row on the device (`counts`, int32 [rows, vocab]: twice the number of times in the
output, plus one where the prompt has the token), so nothing waits for the host to know the last token.
"""

# Triton functions are traced, not typed.
# mypy: disable-error-code="no-untyped-def,attr-defined"

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kernels import noise

BLOCK = 1024  # columns of a piece; a program looks at one piece of each quarter of the columns
NUM_FIELDS = 16
NO_COUNTS = -1
_ROUNDS, _TINY, _UNIT = (tl.constexpr(v) for v in (noise.NUM_ROUNDS, noise.TINY, noise.UNIT))
_BELOW_ONE = tl.constexpr(1 - 2.0**-24)
_LOWEST = tl.constexpr(-3e38)


@dataclass(frozen=True)
class Draw:
    """How one row is drawn. `row`: where in `latest` the token goes, and its row of `counts` when it is penalised."""

    row: int
    seed: int
    number: int  # of this draw in its sequence
    temperature: float = 1.0  # 0: the largest logit
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    is_penalised: bool = False


def pack(draws: Sequence[Draw]) -> NDArray[np.int32]:
    """The draws as the kernels read them: int32 [num_rows, NUM_FIELDS], from field 8 on the bits of float32."""
    out = np.zeros((len(draws), NUM_FIELDS), dtype=np.int32)
    for i, draw in enumerate(draws):
        counts_row = draw.row if draw.is_penalised else NO_COUNTS
        out[i, :6] = np.array(
            (draw.seed & 0xFFFFFFFF, draw.seed >> 32, draw.number, draw.top_k, draw.row, counts_row), dtype=np.int64
        ).astype(np.int32)
        is_greedy = draw.temperature == 0
        out[i, 8:] = np.array(
            (
                1.0 if is_greedy else 1 / draw.temperature,
                0.0 if is_greedy else 1.0,
                draw.top_p,
                math.log(draw.min_p) if draw.min_p > 0 else -math.inf,
                draw.repetition,
                1 / draw.repetition,
                draw.presence,
                draw.frequency,
            ),
            dtype=np.float32,
        ).view(np.int32)
    return out


@triton.jit
def _number(p_draw, field: tl.constexpr):
    return tl.load(p_draw + field).to(tl.float32, bitcast=True)


@triton.jit
def _noise(p_draw, o):
    """Gumbel noise of four columns each: o, and a quarter, two, three quarters of the columns further on."""
    low = tl.load(p_draw).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(p_draw + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    zero = tl.zeros_like(o)
    words = tl.philox((high << 32) | low, o, zero + tl.load(p_draw + 2), zero, zero, n_rounds=_ROUNDS)
    return _gumbel(words[0]), _gumbel(words[1]), _gumbel(words[2]), _gumbel(words[3])


@triton.jit
def _gumbel(word):
    u = tl.minimum((word.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * _UNIT, _BELOW_ONE)
    series = u * (1 + u * (0.5 + u * (1 / 3)))
    return -tl.log(tl.where(u < _TINY, series, -tl.log(1 - u)))


@triton.jit
def _logits(p_logits, p_counts, p_draw, o, mask):
    """Penalised and tempered logits of columns `o`; minus infinity outside."""
    x = tl.load(p_logits + o, mask=mask, other=float("-inf")).to(tl.float32)
    is_penalised = tl.zeros_like(o) + tl.load(p_draw + 5) >= 0
    counts = tl.load(p_counts + o, mask=mask & is_penalised, other=0)
    x = tl.where(counts > 0, tl.where(x > 0, x * _number(p_draw, 13), x * _number(p_draw, 12)), x)
    times = (counts // 2).to(tl.float32)
    x = tl.where(times > 0, x - (_number(p_draw, 14) + _number(p_draw, 15) * times), x)
    return x * _number(p_draw, 8)


@triton.jit
def _better(best, token, logit, sums, x, o, num_columns):
    """The best of what was found and a block's largest sum; of equal sums the lowest column."""
    top = tl.max(sums, 0)
    o_top = tl.min(tl.where(sums == top, o, num_columns), 0)
    x_top = tl.max(tl.where(o == o_top, x, float("-inf")), 0)
    is_better = (top > best) | ((top == best) & (o_top < token))
    return tl.where(is_better, top, best), tl.where(is_better, o_top, token), tl.where(is_better, x_top, logit)


@triton.jit
def _best_between(p_logits, p_counts, p_draw, i_part, num_columns, floor, lowest, BLOCK: tl.constexpr):
    """(largest sum, its column, its logit) in a part's four pieces among logits above `floor`, at least `lowest`."""
    quarter = tl.cdiv(num_columns, 4)
    o = i_part * BLOCK + tl.arange(0, BLOCK)
    best, token, logit = float("-inf"), num_columns, float("-inf")
    n0, n1, n2, n3 = _noise(p_draw, o)
    scale = _number(p_draw, 9)
    for q in tl.static_range(4):
        column = q * quarter + o
        x = _logits(p_logits, p_counts, p_draw, column, (o < quarter) & (column < num_columns))
        sums = x + scale * (n0 if q == 0 else (n1 if q == 1 else (n2 if q == 2 else n3)))
        sums = tl.where((x > floor) & (x >= lowest), sums, float("-inf"))
        best, token, logit = _better(best, token, logit, sums, x, column, num_columns)
    return best, token, logit


@triton.jit
def _measure_kernel(
    p_logits, p_counts, p_draws, p_tops, p_masses, num_columns, stride, num_parts,
    BLOCK: tl.constexpr, NUM_FIELDS: tl.constexpr,
):  # fmt: skip
    """Per piece: the largest logit, and the mass in units of it."""
    i_part, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_draw = p_draws + i_row * NUM_FIELDS
    p_logits += i_row * stride
    p_counts += tl.maximum(tl.load(p_draw + 5), 0).to(tl.int64) * num_columns
    quarter = tl.cdiv(num_columns, 4)
    o = i_part * BLOCK + tl.arange(0, BLOCK)
    for q in tl.static_range(4):
        column = q * quarter + o
        x = _logits(p_logits, p_counts, p_draw, column, (o < quarter) & (column < num_columns))
        top = tl.maximum(tl.max(x, 0), _LOWEST)
        piece = (i_row * num_parts + i_part) * 4 + q
        tl.store(p_tops + piece, top)
        tl.store(p_masses + piece, tl.sum(tl.exp(x - top), 0))


@triton.jit
def _bound_kernel(p_draws, p_tops, p_masses, p_rows, num_pieces, PIECES: tl.constexpr, NUM_FIELDS: tl.constexpr):
    """Per row: the largest logit, the mass in units of it, and what a logit must reach at least."""
    i_row = tl.program_id(0).to(tl.int64)
    p_draw = p_draws + i_row * NUM_FIELDS
    piece = tl.arange(0, PIECES)
    m = piece < num_pieces
    tops = tl.load(p_tops + i_row * num_pieces + piece, mask=m, other=_LOWEST)
    top = tl.max(tops, 0)
    mass = tl.sum(tl.load(p_masses + i_row * num_pieces + piece, mask=m, other=0.0) * tl.exp(tops - top), 0)
    top_k = tl.load(p_draw + 3)
    ordered = tl.sort(tops, descending=True)
    kth = tl.max(tl.where(piece == top_k - 1, ordered, _LOWEST), 0)
    lowest = tl.maximum(top + _number(p_draw, 11), kth)
    slack = 1e-6 * tl.maximum(tl.abs(lowest), 1)  # what is rounded otherwise elsewhere still reaches it
    tl.store(p_rows + i_row * 3, top)
    tl.store(p_rows + i_row * 3 + 1, mass)
    tl.store(p_rows + i_row * 3 + 2, lowest - slack)


@triton.jit
def _scan_kernel(
    p_logits, p_counts, p_draws, p_tops, p_rows, p_sums, p_tokens, p_found, num_columns, stride, num_parts,
    BLOCK: tl.constexpr, NUM_FIELDS: tl.constexpr,
):  # fmt: skip
    """Per part, which is four pieces: the largest sum, its column and its logit."""
    i_part, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_draw = p_draws + i_row * NUM_FIELDS
    p_logits += i_row * stride
    p_counts += tl.maximum(tl.load(p_draw + 5), 0).to(tl.int64) * num_columns
    part = i_row * num_parts + i_part
    lowest = tl.load(p_rows + i_row * 3 + 2)
    best, token, logit = float("-inf"), num_columns, float("-inf")
    if tl.max(tl.load(p_tops + part * 4 + tl.arange(0, 4)), 0) >= lowest:
        best, token, logit = _best_between(
            p_logits, p_counts, p_draw, i_part, num_columns, float("-inf"), lowest, BLOCK
        )
    tl.store(p_sums + part, best)
    tl.store(p_tokens + part, token)
    tl.store(p_found + part, logit)


@triton.jit
def _settle_kernel(
    p_logits, p_counts, p_draws, p_tops, p_rows, p_sums, p_tokens, p_found, p_latest, p_out,
    num_columns, stride, num_parts,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, NUM_FIELDS: tl.constexpr,
):  # fmt: skip
    """Join a row's parts, check the largest sum, and look among likelier tokens until top-k and top-p keep one."""
    i_row = tl.program_id(0).to(tl.int64)
    p_draw = p_draws + i_row * NUM_FIELDS
    p_logits += i_row * stride
    p_counts += tl.maximum(tl.load(p_draw + 5), 0).to(tl.int64) * num_columns
    p_tops += i_row * num_parts * 4
    quarter = tl.cdiv(num_columns, 4)
    part = tl.arange(0, PARTS)
    m = part < num_parts
    sums = tl.load(p_sums + i_row * num_parts + part, mask=m, other=float("-inf"))
    tokens = tl.load(p_tokens + i_row * num_parts + part, mask=m, other=num_columns)
    found = tl.load(p_found + i_row * num_parts + part, mask=m, other=float("-inf"))
    token = tl.min(tl.where(sums == tl.max(sums, 0), tokens, num_columns), 0)
    logit = tl.max(tl.where(tokens == token, found, float("-inf")), 0)

    piece = tl.arange(0, 4 * PARTS)
    tops = tl.load(p_tops + piece, mask=piece < num_parts * 4, other=_LOWEST)
    top, mass = tl.load(p_rows + i_row * 3), tl.load(p_rows + i_row * 3 + 1)
    lowest = tl.load(p_rows + i_row * 3 + 2)
    top_k, top_p = tl.load(p_draw + 3), _number(p_draw, 10)
    is_open = ((top_k > 0) | (top_p < 1)) & (logit < top)
    while is_open:
        num_likelier, above = 0, 0.0
        i_piece = tl.min(tl.where(tops > logit, piece, 4 * PARTS), 0)
        while i_piece < num_parts * 4:
            o = (i_piece // 4) * BLOCK + tl.arange(0, BLOCK)
            column = (i_piece % 4) * quarter + o
            x = _logits(p_logits, p_counts, p_draw, column, (o < quarter) & (column < num_columns))
            num_likelier += tl.sum((x > logit).to(tl.int32), 0)
            above += tl.sum(tl.where(x > logit, tl.exp(x - top), 0.0), 0)
            i_piece = tl.min(tl.where((tops > logit) & (piece > i_piece), piece, 4 * PARTS), 0)
        is_kept = ((above < top_p * mass) | (top_p >= 1)) & ((num_likelier < top_k) | (top_k == 0))
        is_open = is_kept == 0
        if is_open:
            floor, best, token, logit = logit, float("-inf"), num_columns, float("-inf")
            holds = (tops > floor) & (tops >= lowest)
            i_part = tl.min(tl.where(holds, piece, 4 * PARTS), 0) // 4
            while i_part < num_parts:
                b, t, x_best = _best_between(p_logits, p_counts, p_draw, i_part, num_columns, floor, lowest, BLOCK)
                is_better = (b > best) | ((b == best) & (t < token))
                best, token = tl.where(is_better, b, best), tl.where(is_better, t, token)
                logit = tl.where(is_better, x_best, logit)
                i_part = tl.min(tl.where(holds & (piece // 4 > i_part), piece, 4 * PARTS), 0) // 4
            is_open = logit < top  # the largest is always kept
    token = tl.minimum(token, num_columns - 1)  # a row of nothing but NaN has no best
    tl.store(p_out + i_row, token)
    tl.store(p_latest + tl.load(p_draw + 4), token)
    is_counted = tl.load(p_draw + 5) >= 0
    times = tl.load(p_counts + token, mask=is_counted, other=0)
    tl.store(p_counts + token, times + 2, mask=is_counted)


def draw(logits: Tensor, draws: Tensor, counts: Tensor, latest: Tensor, out: Tensor) -> Tensor:
    """Draw one token per row of logits [R, V] into `out` int32 [R] and `latest[row]`; see `pack` for `draws`.

    `counts` int32 [rows, V] is read and raised for penalised rows alone; any int32 tensor serves when there are none.
    """
    num_rows, num_columns = logits.shape
    if draws.shape != (num_rows, NUM_FIELDS) or out.shape != (num_rows,):
        raise ValueError(f"draws {tuple(draws.shape)} and out {tuple(out.shape)} do not fit {num_rows} rows of logits")
    num_parts = triton.cdiv(triton.cdiv(num_columns, 4), BLOCK)
    floats: Any = torch.empty(num_rows, 10 * num_parts + 3, dtype=torch.float32, device=logits.device).flatten()
    sizes = [num_rows * n for n in (4 * num_parts, 4 * num_parts, num_parts, num_parts, 3)]
    tops, masses, sums, found, rows = floats.split(sizes)
    tokens = torch.empty(num_rows * num_parts, dtype=torch.int32, device=logits.device)
    stride, parts = logits.stride(0), triton.next_power_of_2(num_parts)
    _measure_kernel[(num_parts, num_rows)](
        logits, counts, draws, tops, masses, num_columns, stride, num_parts,
        BLOCK=BLOCK, NUM_FIELDS=NUM_FIELDS, num_warps=4,
    )  # fmt: skip
    _bound_kernel[(num_rows,)](
        draws, tops, masses, rows, 4 * num_parts, PIECES=4 * parts, NUM_FIELDS=NUM_FIELDS, num_warps=4
    )
    _scan_kernel[(num_parts, num_rows)](
        logits, counts, draws, tops, rows, sums, tokens, found, num_columns, stride, num_parts,
        BLOCK=BLOCK, NUM_FIELDS=NUM_FIELDS, num_warps=4,
    )  # fmt: skip
    _settle_kernel[(num_rows,)](
        logits, counts, draws, tops, rows, sums, tokens, found, latest, out, num_columns, stride, num_parts,
        PARTS=parts, BLOCK=BLOCK, NUM_FIELDS=NUM_FIELDS, num_warps=8,
    )  # fmt: skip
    return out
