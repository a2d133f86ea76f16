"""The GPU's runner: whole-step graphs for decode, eager launches for steps with prefill, results one step late.

`launch` puts a step on the device and returns at once; `InFlight.wait` gives its tokens. Token ids stay on the device,
so the next step may be launched before this one's tokens are known. `run` is both in a row: the engine's `Runner`.

A running request owns a row (of `latest` and of the host's block tables) until it leaves the batch. Graphs end with
the plain greedy tokens; other draws follow in kernels of their own (`cuda_draws`) and are the CPU sampler's, so a
sequence may change workers. Only where the host needs the logits are they copied there. Embeddings are pooled on the
device and come with the step's tokens, in the same wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cloud.serving.backend import Embedding, SampledToken, StepResult
from cloud.serving.cuda_draws import CudaDraws
from cloud.serving.cuda_step import UNKNOWN_TOKEN, CudaStep, StepShape, padded_step
from cloud.serving.kv_pool import KvPool
from cloud.serving.models.decoder import Decoder
from cloud.serving.pooler import Pooled, Pooler
from cloud.serving.request import Request
from cloud.serving.runner import sampling_row
from cloud.serving.sampler import sample
from cloud.serving.scheduler import Chunk
from kernels import decode_attention

Tensor = Any
WARM_SIZES = (16, 512, 1024, 2048)  # tokens of a step where kernels change tiles
NUM_STAGES = 3  # host buffers in rotation: one being filled, one being copied, one to spare


@dataclass(frozen=True)
class CudaConfig:
    """Limits of the runner. Decode batches above the largest graph run eagerly."""

    max_running: int = 256
    max_context_tokens: int = 8192
    graph_sizes: tuple[int, ...] = (1, 2, 4, 8, *range(16, 257, 16))


@dataclass
class InFlight:
    """A launched step. `wait` may be called once, from the thread that launched it."""

    order: list[int]  # position among the chunks of each sampled row
    num_chunks: int
    host: Tensor
    event: Any
    drawn: list[SampledToken] | None = None
    pooled: Pooled | None = None  # on the host once `event` has happened

    def wait(self) -> list[StepResult]:
        """Per chunk in the order given to `launch`: its token or its embedding, or None where there is none."""
        if self.event is not None:
            self.event.synchronize()
        out: list[StepResult] = [None] * self.num_chunks
        tokens = self.drawn or [SampledToken(token) for token in self.host[: len(self.order)].tolist()]
        for position, token in zip(self.order, tokens, strict=True):
            out[position] = token
        if self.pooled is not None:
            for position, vector in zip(self.pooled.positions, self.pooled.vectors, strict=True):
                out[position] = Embedding(vector.numpy().copy())
        return out


@dataclass(frozen=True)
class _Drawing:
    """Who gets a token in a step. Every step ends with the plain greedy tokens; others need one thing more."""

    order: list[int]  # positions among the chunks
    requests: list[Request]
    rows: list[int]

    @property
    def is_on_host(self) -> bool:
        """Whether some draw needs its logits on the host: then all are made there."""
        return any(request.params.needs_host_logits for request in self.requests)

    @property
    def is_on_device(self) -> bool:
        """Whether kernels draw beyond the plain greedy tokens."""
        return not self.is_on_host and not all(request.params.is_plain_greedy for request in self.requests)


@dataclass
class _Row:
    index: int
    num_preemptions: int
    num_blocks: int


class CudaRunner:
    """`Runner` on a CUDA device (or, without graphs and with Triton's interpreter, on the CPU for tests)."""

    def __init__(self, decoder: Decoder, kv: KvPool, config: CudaConfig) -> None:
        self.config = config
        self.kv = kv
        self.device = decoder.weights.embedding.device
        self.is_cuda = self.device.type == "cuda"
        self.max_blocks = -(-config.max_context_tokens // kv.layout.block_size)
        self._processors = torch.cuda.get_device_properties(self.device).multi_processor_count if self.is_cuda else 4
        self._num_kv_heads = kv.layout.num_kv_heads
        self.step = CudaStep(decoder, kv, config.max_running + 1, 64, config.max_context_tokens)
        self.pooler = Pooler()
        self._draws = CudaDraws(self.step.latest, decoder.config.vocab_size)
        self._tables = np.zeros((config.max_running + 1, self.max_blocks), dtype=np.int32)
        self._row_by_request: dict[Request, _Row] = {}  # not by id: an id may come again
        self._free_rows = list(range(config.max_running))
        self._graphs: dict[int, tuple[StepShape, Any, Tensor, Tensor, Tensor]] = {}
        self._stages: list[tuple[Tensor, Any]] = []
        self._num_launches = 0

    @torch.inference_mode()
    def capture(self) -> None:
        """Record one graph per decode size, largest first so that the smaller ones reuse its memory."""
        self.warm_up(WARM_SIZES)
        pool = None
        for size in sorted(self.config.graph_sizes, reverse=True):
            if size > self.config.max_running:
                continue
            shape = self._shape(size, size, 0, size)
            flat = torch.from_numpy(padded_step(shape, self.config.max_running)).to(self.device)
            self.step.forward(flat, shape)  # compiles what is not compiled yet
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                drawn, logits, _ = self.step.forward(flat, shape)
            pool = graph.pool()
            self._graphs[size] = (shape, graph, flat, drawn, logits)

    @torch.inference_mode()
    def warm_up(self, sizes: Sequence[int]) -> None:
        """Compile what steps with prefill of about these many tokens need, so that no request waits for it.

        The tokens look at block 0 and have no slots: no KV is written.
        """
        for size in sizes:
            size = min(size, self.config.max_context_tokens)
            shape = self._shape(size, 0, 1, 1)
            flat = padded_step(shape, self.config.max_running)
            fields = shape.views(flat)
            fields["context_lens"][:] = fields["prefill_starts"][1] = size
            self.step.forward(torch.from_numpy(flat).to(self.device), shape)

    def run(self, chunks: Sequence[Chunk]) -> list[StepResult]:
        """See `cloud.serving.runner.Runner`."""
        return self.launch(chunks).wait()

    @torch.inference_mode()
    def launch(self, chunks: Sequence[Chunk]) -> InFlight:
        """Put one step on the device. Unknown last tokens must come from the step launched just before."""
        self._forget_absent(chunks)
        decodes = [i for i, c in enumerate(chunks) if c.num_tokens == 1 and c.is_sampled]
        decodes.sort(key=lambda i: chunks[i].start, reverse=True)  # attention ends evenly when long contexts begin
        chosen = set(decodes)
        prefills = [i for i in range(len(chunks)) if i not in chosen]
        sampled = decodes + [i for i in prefills if chunks[i].is_sampled]
        requests = [chunks[i].request for i in sampled]
        drawing = _Drawing(sampled, requests, [self._row(request) for request in requests])
        if drawing.is_on_device:
            self._draws.count(requests, drawing.rows)
        pooled: Pooled | None = None
        size = len(decodes)
        graph_size = None if prefills else next((g for g in sorted(self._graphs) if g >= size), None)
        if graph_size is not None:
            shape, graph, flat, drawn, logits = self._graphs[graph_size]
            self._copy_in(self._fill(chunks, decodes, [], decodes, shape), flat)
            graph.replay()
        else:
            num_tokens = size + sum(chunks[i].num_tokens for i in prefills)
            is_pooling = any(chunks[i].request.pooling is not None for i in prefills)
            shape = self._shape(num_tokens, size, len(prefills), len(sampled), is_pooling)
            flat = torch.empty(shape.size, dtype=torch.int32, device=self.device)
            self._copy_in(self._fill(chunks, decodes, prefills, sampled, shape), flat)
            drawn, logits, hidden = self.step.forward(flat, shape)
            if hidden is not None:
                pooled = self._pool(chunks, prefills, hidden[size:])
        return self._collect(len(chunks), drawing, drawn, logits, pooled)

    def _pool(self, chunks: Sequence[Chunk], prefills: list[int], hidden: Tensor) -> Pooled | None:
        """Embeddings that this step completes, on their way to the host; `hidden` has the rows of the prefills."""
        pooling = [chunks[i] for i in prefills]
        states = hidden.split([chunk.num_tokens for chunk in pooling])
        wanted = [slice(chunk.output_rows.start, chunk.output_rows.stop) for chunk in pooling]
        pooled = self.pooler.pool(pooling, [part[rows] for part, rows in zip(states, wanted, strict=True)])
        if pooled is None:
            return None
        positions = [prefills[number] for number in pooled.positions]
        return Pooled(positions, self._to_host(pooled.vectors) if self.is_cuda else pooled.vectors)

    def _to_host(self, tensor: Tensor) -> Tensor:
        """Where the tensor will be on the host once the device has come to this point."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        return host

    def _collect(
        self, num_chunks: int, drawing: _Drawing, drawn: Tensor, logits: Tensor, pooled: Pooled | None
    ) -> InFlight:
        sampled, requests, rows = drawing.order, drawing.requests, drawing.rows
        count = len(sampled)
        if drawing.is_on_host:
            tokens = sample(logits[:count].float().cpu(), [sampling_row(request) for request in requests])
            ids = torch.tensor([token.token_id for token in tokens], dtype=torch.int32, device=self.device)
            self.step.latest[torch.tensor(rows, device=self.device)] = ids
            return InFlight(sampled, num_chunks, None, self._mark() if pooled else None, tokens, pooled)
        if drawing.is_on_device:
            self._draws.draw(logits[:count], drawn[:count], requests, rows)
        if not self.is_cuda:
            return InFlight(sampled, num_chunks, drawn.clone(), None, pooled=pooled)
        return InFlight(sampled, num_chunks, self._to_host(drawn[:count]), self._mark(), pooled=pooled)

    def _mark(self) -> Any:
        """An event that happens when the device has come to this point; None without a device."""
        if not self.is_cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _shape(
        self, num_tokens: int, num_decodes: int, num_prefills: int, num_sampled: int, is_pooling: bool = False
    ) -> StepShape:
        splits = 1
        if 0 < num_sampled <= 64:  # what the workspace holds; no step decodes more rows than it samples
            splits = decode_attention.num_splits_for(
                num_sampled, self._num_kv_heads, self.config.max_context_tokens, self._processors
            )
        return StepShape(num_tokens, num_decodes, num_prefills, num_sampled, self.max_blocks, splits, is_pooling)

    def _fill(
        self, chunks: Sequence[Chunk], decodes: list[int], prefills: list[int], sampled: list[int], shape: StepShape
    ) -> np.ndarray[Any, Any]:
        """The flat buffer of the step; `shape` may be larger than the batch (padding rows of a graph)."""
        flat = padded_step(shape, self.config.max_running)
        fields = shape.views(flat)
        size = self.kv.layout.block_size
        count = len(decodes)
        row_by_chunk = {i: self._row(chunks[i].request) for i in (*decodes, *prefills)}
        if count:
            rows = np.fromiter((row_by_chunk[i] for i in decodes), np.int32, count)
            position = np.fromiter((chunks[i].start for i in decodes), np.int32, count)
            fields["tokens"][:count] = np.fromiter((chunks[i].request.token_ids[-1] for i in decodes), np.int32, count)
            fields["token_rows"][:count] = rows
            fields["positions"][:count] = position
            fields["slots"][:count] = self._tables[rows, position // size] * size + position % size
            fields["context_lens"][:count] = position + 1
            fields["tables"][:count] = self._tables[rows]
        begin = shape.num_decodes if prefills else count
        last_token = {i: k for k, i in enumerate(decodes)}
        sequence = dict(last_token)
        for number, i in enumerate(prefills):
            chunk, row = chunks[i], row_by_chunk[i]
            end = begin + chunk.num_tokens
            position = np.arange(chunk.start, chunk.end, dtype=np.int32)
            fields["tokens"][begin:end] = chunk.request.token_ids[chunk.start : chunk.end]
            fields["token_rows"][begin:end] = row
            fields["positions"][begin:end] = position
            fields["slots"][begin:end] = self._tables[row, position // size] * size + position % size
            fields["context_lens"][shape.num_decodes + number] = chunk.end
            fields["prefill_starts"][number + 1] = end - shape.num_decodes
            fields["tables"][shape.num_decodes + number] = self._tables[row]
            last_token[i] = end - 1
            sequence[i] = shape.num_decodes + number
            begin = end
        for number, i in enumerate(sampled):
            fields["sampled"][number] = last_token[i]
            fields["sampled_rows"][number] = row_by_chunk[i]
            fields["sampled_sequences"][number] = sequence[i]
        return flat

    def _row(self, request: Request) -> int:
        """The request's row, its block table up to date."""
        row = self._row_by_request.get(request)
        if row is None:
            row = self._row_by_request[request] = _Row(self._free_rows.pop(), request.num_preemptions, 0)
        if row.num_preemptions != request.num_preemptions:
            row.num_preemptions, row.num_blocks = request.num_preemptions, 0
        blocks = request.block_ids
        if len(blocks) != row.num_blocks:
            self._tables[row.index, row.num_blocks : len(blocks)] = blocks[row.num_blocks :]
            row.num_blocks = len(blocks)
        return row.index

    def _forget_absent(self, chunks: Sequence[Chunk]) -> None:
        """Give back the rows of requests that are not part of this step."""
        present = {chunk.request for chunk in chunks}
        for request in [r for r in self._row_by_request if r not in present]:
            self._free_rows.append(self._row_by_request.pop(request).index)

    def _copy_in(self, flat: np.ndarray[Any, Any], target: Tensor) -> None:
        """One copy to the device, through pinned memory whose last copy has finished."""
        if not self.is_cuda:
            target.copy_(torch.from_numpy(flat))
            return
        if len(self._stages) < NUM_STAGES:
            self._stages.append((torch.empty(flat.size, dtype=torch.int32, pin_memory=True), torch.cuda.Event()))
        index = self._num_launches % len(self._stages)
        self._num_launches += 1
        stage, event = self._stages[index]
        event.synchronize()
        if stage.numel() < flat.size:  # twice as much, so that growing steps seldom pin memory anew
            stage = torch.empty(2 * flat.size, dtype=torch.int32, pin_memory=True)
            self._stages[index] = (stage, event)
        stage[: flat.size].numpy()[:] = flat
        target.copy_(stage[: flat.size], non_blocking=True)
        event.record()


def is_unknown(token_id: int) -> bool:
    """Whether a token is still being drawn on the device."""
    return token_id == UNKNOWN_TOKEN
