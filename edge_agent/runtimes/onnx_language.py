"""Language models on the CPU through plain ONNX Runtime, stepped by our loop; GenAI's own engine fills a batch
and runs it to its end on a CPU, here streams join and leave between steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from edge_agent.runtimes.base import (
    Array,
    Cancel,
    Deliver,
    LanguageLimits,
    Memory,
    NotFiniteError,
    Sampling,
    check_length,
)
from edge_agent.runtimes.decoder_graph import make_graph, open_session
from edge_agent.runtimes.json_guide import JsonGuides
from edge_agent.runtimes.language_loop import CHUNK_TOKENS, LanguageLoop, Stream
from edge_agent.runtimes.language_settings import LanguageSettings
from model_registry.chat_tokenizer import ChatTokenizer
from wire.errors import UnsupportedModelError


class OnnxLanguage:
    """One model and its loop."""

    name = "onnxruntime"

    def __init__(self, folder: Path, settings: LanguageSettings, limits: LanguageLimits) -> None:
        session = open_session(settings, limits.num_threads)
        self.providers = list(session.get_providers())
        self.max_context_tokens = min(limits.context_tokens, settings.context_tokens)
        self._graph = make_graph(session, settings, limits.num_streams + 1, self.max_context_tokens)
        self.cache_token_bytes = self._graph.token_bytes
        self._tokenizer = ChatTokenizer(folder)
        self._guides = JsonGuides(self._tokenizer, settings.vocabulary_size, sorted(settings.eos_tokens))
        self._weights_bytes = sum(file.stat().st_size for file in folder.glob(f"{settings.graph_file.name}*"))
        self._loop = LanguageLoop(self._graph, settings.eos_tokens, folder.name)
        self._loop.max_cached_tokens = self.max_context_tokens * limits.num_streams

    @property
    def context_tokens(self) -> int:
        """The model's context, or what its cache may hold."""
        return min(self.max_context_tokens, self._loop.max_cached_tokens)

    def limit_cache(self, num_bytes: int) -> None:
        """Bound what streams reserve together: their prompts and all that they may answer."""
        self._loop.max_cached_tokens = num_bytes // self.cache_token_bytes

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return self._tokenizer.encode(text)

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation under the model's template."""
        return self._tokenizer.encode_chat(messages)

    def start(self, prompt: Sequence[int], sampling: Sampling, deliver: Deliver) -> Cancel:
        """Begin a stream."""
        check_length(prompt, sampling.max_tokens, self.context_tokens)
        guide = self._guides.make(sampling.json_schema) if sampling.json_schema is not None else None
        stream = Stream(prompt, sampling, deliver, self._tokenizer.stream(), guide)
        self._loop.submit(stream)
        return lambda: self._loop.cancel(stream)

    def embed(self, tokens: Sequence[int]) -> Array:
        """The mean of the last hidden states, of length 1."""
        if not self._graph.has_hidden_states:
            raise UnsupportedModelError(
                "this model gives no hidden states", remedy="build it with include_hidden_states, or use another model"
            )
        check_length(tokens, 0, self.context_tokens)
        hidden = self._loop.call(lambda row: self._graph.hidden(row, tokens))
        mean = hidden.astype(np.float32).mean(axis=0)
        return cast(Array, mean / max(float(np.linalg.norm(mean)), 1e-12))

    def agreement(self, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        """Teacher forcing over the whole sequence, chunk by chunk."""
        if not tokens:
            return 0.0
        forced = [*prompt, *tokens[:-1]]
        check_length(forced, 1, self.context_tokens)
        best = self._loop.call(lambda row: self._best(row, forced))
        chosen = best[len(prompt) - 1 :]
        return sum(have == want for have, want in zip(chosen, tokens, strict=True)) / len(tokens)

    def memory(self) -> Memory:
        """Weights and the pages that streams have filled."""
        cache_bytes = self._loop.num_cached_tokens * self.cache_token_bytes
        return Memory(self._weights_bytes, cache_bytes, self._loop.num_streams)

    def close(self) -> None:
        """End the streams and free the model."""
        self._loop.close()
        del self._graph

    def _best(self, row: int, tokens: Sequence[int]) -> list[int]:
        """The most likely next token after each of `tokens`."""
        best: list[int] = []
        for begin in range(0, len(tokens), CHUNK_TOKENS):
            logits = self._graph.score(row, tokens[begin : begin + CHUNK_TOKENS], begin)
            if not np.isfinite(logits).all():
                raise NotFiniteError("the logits are not finite", remedy="mend the model")
            best += [int(token) for token in np.argmax(logits, axis=-1)]
        return best
