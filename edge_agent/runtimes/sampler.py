"""How the next token is chosen from logits, in the order of OpenAI-like servers: repetition penalty (Keskar et al.,
2019), temperature, top-k, top-p (Holtzman et al., 2020). Equal seeds give equal tokens; temperature 0 is greedy.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from edge_agent.runtimes.base import Array, Sampling


class Sampler:
    """The choices of one stream."""

    def __init__(self, sampling: Sampling, prompt: Iterable[int]) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._seen = set(prompt) if sampling.repetition_penalty != 1.0 else None

    def pick(self, logits: Array) -> int:
        """A token for logits [vocabulary]; minus infinity is never chosen."""
        if self._seen:
            logits = _penalised(logits, np.fromiter(self._seen, np.int64), self._sampling.repetition_penalty)
        token = int(np.argmax(logits)) if self._sampling.temperature <= 0 else self._draw(logits)
        if self._seen is not None:
            self._seen.add(token)
        return token

    def _draw(self, logits: Array) -> int:
        top_k = self._sampling.top_k or len(logits)
        if top_k < len(logits):
            tokens = np.argpartition(logits, -top_k)[-top_k:]
            tokens = tokens[np.argsort(-logits[tokens], kind="stable")]
        else:
            tokens = np.argsort(-logits, kind="stable")
        scaled = logits[tokens].astype(np.float64) / self._sampling.temperature
        powers = np.exp(scaled - scaled[0])
        shares = powers / powers.sum()
        num_kept = int(np.searchsorted(np.cumsum(shares), self._sampling.top_p)) + 1
        cumulative = np.cumsum(shares[:num_kept])
        at = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        return int(tokens[min(at, len(cumulative) - 1)])


def _penalised(logits: Array, seen: Array, penalty: float) -> Array:
    logits = logits.copy()
    values = logits[seen]
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    return logits
