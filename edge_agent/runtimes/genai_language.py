"""Language models in onnxruntime-genai: a folder with genai_config.json, the graph and the tokenizer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai

from edge_agent.runtimes.base import NotFiniteError, Piece, Sampling
from wire.errors import InvalidInputError, UnsupportedModelError


class GenaiLanguage:
    """One model; every call of `generate` has its own generator and KV cache."""

    name = "onnxruntime-genai"

    def __init__(self, folder: Path, context_tokens: int) -> None:
        try:
            self._model: Any = genai.Model(str(folder))
            self._tokenizer: Any = genai.Tokenizer(self._model)
        except Exception as error:
            raise UnsupportedModelError(
                f"the model does not load: {error}", remedy="compile it for this device"
            ) from error
        self.context_tokens = context_tokens
        self.providers = [str(self._model.device_type)]
        self._stop_tokens = _stop_tokens(folder / "genai_config.json")

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return [int(token) for token in self._tokenizer.encode(text)]

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation under the model's template."""
        try:
            text = self._tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True)
        except Exception as error:
            raise InvalidInputError(f"the chat template refuses this: {error}", remedy="use /v1/completions") from error
        return self.encode(text)

    def generate(self, prompt: Sequence[int], sampling: Sampling, cancel: threading.Event) -> Iterator[Piece]:
        """Generate until a stop token, a stop string, the limit or `cancel`."""
        generator = self._generator(prompt, sampling)
        stream = self._tokenizer.create_stream()
        held = ""  # text that may be the beginning of a stop string
        for number in range(1, sampling.max_tokens + 1):
            if cancel.is_set():
                yield Piece(-1, held, "cancelled")
                return
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in self._stop_tokens:
                yield Piece(token, held, "stop")
                return
            held += stream.decode(token)
            cut = min((at for at in (held.find(stop) for stop in sampling.stop) if at >= 0), default=-1)
            if cut >= 0:
                yield Piece(token, held[:cut], "stop")
                return
            if number == sampling.max_tokens or generator.is_done():
                yield Piece(token, held, "length")
                return
            keep = _possible_stop(held, sampling.stop)
            yield Piece(token, held[: len(held) - keep])
            held = held[len(held) - keep :]

    def agreement(self, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        """Teacher forcing: after each true token, is the next one the most likely?"""
        generator = self._generator(prompt, Sampling(max_tokens=len(tokens) + 1))
        num_same = 0
        for token in tokens:
            logits = np.asarray(generator.get_logits())
            last = logits.reshape(-1, logits.shape[-1])[-1]  # [vocabulary]
            if not np.isfinite(last).all():
                raise NotFiniteError("the logits are not finite", remedy="mend the model")
            num_same += int(np.argmax(last)) == token
            generator.append_tokens(np.asarray([token], np.int32))
        return num_same / max(len(tokens), 1)

    def close(self) -> None:
        """Free the model once the last generator is gone."""
        self._tokenizer = None
        self._model = None

    def _generator(self, prompt: Sequence[int], sampling: Sampling) -> Any:
        if len(prompt) + sampling.max_tokens > self.context_tokens:
            raise InvalidInputError(
                f"{len(prompt)} prompt and {sampling.max_tokens} new tokens exceed {self.context_tokens}",
                remedy="send a shorter prompt or a lower max_tokens",
            )
        params = genai.GeneratorParams(self._model)
        options: dict[str, Any] = {"max_length": len(prompt) + sampling.max_tokens, "do_sample": False}
        if sampling.temperature > 0:
            options |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
            options["top_k"] = sampling.top_k
            if sampling.seed is not None:
                options["random_seed"] = sampling.seed % (1 << 31)
        params.set_search_options(**options)
        generator = genai.Generator(self._model, params)
        generator.append_tokens(np.asarray(prompt, np.int32))
        return generator


def _stop_tokens(config: Path) -> frozenset[int]:
    value = json.loads(config.read_text())["model"].get("eos_token_id", [])
    return frozenset(value if isinstance(value, list) else [value])


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    return max(
        (size for stop in stops for size in range(1, len(stop)) if size <= len(text) and text.endswith(stop[:size])),
        default=0,
    )
