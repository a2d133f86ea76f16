"""Language models that only ONNX Runtime GenAI can run: graphs for a GPU, and decoders with more state than a cache.

Every stream has a generator and a thread of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai

from edge_agent.runtimes.base import (
    Array,
    Cancel,
    Deliver,
    LanguageLimits,
    Memory,
    NotFiniteError,
    Piece,
    Sampling,
    check_length,
)
from edge_agent.runtimes.language_settings import LanguageSettings
from edge_agent.runtimes.stop_text import StopText
from model_registry.chat_tokenizer import ChatTokenizer
from wire.errors import UnsupportedModelError


class GenaiLanguage:
    """One model; every stream has its own generator and cache."""

    name = "onnxruntime-genai"

    def __init__(self, folder: Path, settings: LanguageSettings, limits: LanguageLimits) -> None:
        self._tokenizer = ChatTokenizer(folder)
        try:
            self._model: Any = genai.Model(str(folder))
        except Exception as error:
            raise UnsupportedModelError(
                f"the model does not load: {error}", remedy="compile it for this device"
            ) from error
        self.context_tokens = self.max_context_tokens = min(limits.context_tokens, settings.context_tokens)
        self.cache_token_bytes = 0  # GenAI does not tell
        self.providers = [str(self._model.device_type)]
        self._eos_tokens = settings.eos_tokens
        self._weights_bytes = sum(file.stat().st_size for file in folder.glob(f"{settings.graph_file.name}*"))
        self._num_streams = 0

    def limit_cache(self, num_bytes: int) -> None:
        """Not with this runtime."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return self._tokenizer.encode(text)

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation under the model's template."""
        return self._tokenizer.encode_chat(messages)

    def start(self, prompt: Sequence[int], sampling: Sampling, deliver: Deliver) -> Cancel:
        """Begin a stream in a thread of its own."""
        check_length(prompt, sampling.max_tokens, self.context_tokens)
        cancelled = threading.Event()
        arguments = (prompt, sampling, deliver, cancelled)
        threading.Thread(target=self._run, args=arguments, name="genai-stream", daemon=True).start()
        return cancelled.set

    def embed(self, tokens: Sequence[int]) -> Array:
        """Not with this runtime."""
        raise UnsupportedModelError("onnxruntime-genai gives no hidden states", remedy="compile for a CPU target")

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

    def memory(self) -> Memory:
        """The weights; GenAI does not tell what its caches hold."""
        return Memory(self._weights_bytes, 0, self._num_streams)

    def close(self) -> None:
        """Free the model once the last generator is gone."""
        self._model = None

    def _run(self, prompt: Sequence[int], sampling: Sampling, deliver: Deliver, cancelled: threading.Event) -> None:
        self._num_streams += 1
        try:
            deliver(self._stream(prompt, sampling, deliver, cancelled))
        except Exception as error:  # noqa: BLE001 - top of the thread: the stream hears of it
            deliver(error)
        finally:
            self._num_streams -= 1

    def _stream(self, prompt: Sequence[int], sampling: Sampling, deliver: Deliver, cancelled: threading.Event) -> Piece:
        """Deliver every piece but the last, which is returned."""
        generator, detokenizer = self._generator(prompt, sampling), self._tokenizer.stream()
        text = StopText(sampling.stop)
        for number in range(1, sampling.max_tokens + 1):
            if cancelled.is_set():
                break
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in self._eos_tokens:
                return Piece(token, text.push(detokenizer.flush()) + text.flush(), "stop")
            out = text.push(detokenizer.decode(token))
            if text.is_stopped:
                return Piece(token, out, "stop")
            if number == sampling.max_tokens or generator.is_done():
                return Piece(token, out + text.push(detokenizer.flush()) + text.flush(), "length")
            deliver(Piece(token, out))
        return Piece(-1, text.flush(), "cancelled")

    def _generator(self, prompt: Sequence[int], sampling: Sampling) -> Any:
        check_length(prompt, sampling.max_tokens, self.context_tokens)
        params = genai.GeneratorParams(self._model)
        options: dict[str, Any] = {"max_length": len(prompt) + sampling.max_tokens, "do_sample": False}
        options["repetition_penalty"] = sampling.repetition_penalty
        if sampling.temperature > 0:
            options |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
            options["top_k"] = sampling.top_k
            if sampling.seed is not None:
                options["random_seed"] = sampling.seed % (1 << 31)
        params.set_search_options(**options)
        if sampling.json_schema is not None:
            params.set_guidance("json_schema", sampling.json_schema)
        generator = genai.Generator(self._model, params)
        generator.append_tokens(np.asarray(prompt, np.int32))
        return generator
