"""Between text and tokens, without torch: the tokenizer, the chat template, and text that grows token by token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer

from wire.errors import InvalidInputError, UnsupportedModelError

_MAX_TEMPLATE_CHARS = 1 << 18
_REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


class ChatTokenizer:
    """Tokenizer and chat template of a Hugging Face style folder."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UnsupportedModelError(f"{path} is missing", remedy="give a folder with tokenizer.json")
        self._tokenizer = Tokenizer.from_file(str(path))
        config = _read_json(folder / "tokenizer_config.json")
        self._specials = {name: _special(config.get(name)) for name in ("bos_token", "eos_token", "unk_token")}
        source = _read_template(folder, config)
        self._template = _compile(source) if source else None

    @property
    def has_chat_template(self) -> bool:
        """True when messages can be rendered."""
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn."""
        if self._template is None:
            raise InvalidInputError("this model has no chat template", remedy="use /v1/completions", param="messages")
        try:
            text = self._template.render(
                messages=list(messages), add_generation_prompt=True, tools=None, **self._specials
            )
        except jinja2.TemplateError as error:
            raise InvalidInputError(
                f"the chat template refuses these messages: {error}", remedy="see the model's card", param="messages"
            ) from error
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def token_text(self, token_id: int) -> str:
        """One token as text, special tokens shown."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))


class TextStream:
    """Text of one answer as its tokens arrive: no half characters, nothing of or after a stop string.

    `push` returns what can be shown now; `flush` the rest. Once `is_stopped`, nothing more comes.
    """

    def __init__(self, tokenizer: ChatTokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._token_ids: list[int] = []
        self._start = 0  # tokens before it never change the text again
        self._shown = 0  # tokens whose text has left `_start`'s window
        self._pending = ""  # decoded, but possibly the beginning of a stop string
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """Take in the next token."""
        if self.is_stopped:
            return ""
        self._token_ids.append(token_id)
        before = self._tokenizer.decode(self._token_ids[self._start : self._shown])
        after = self._tokenizer.decode(self._token_ids[self._start :])
        if after.endswith(_REPLACEMENT):
            return ""
        self._start, self._shown = self._shown, len(self._token_ids)
        return self._release(after[len(before) :])

    def flush(self) -> str:
        """The end of the answer: whatever was held back."""
        if self.is_stopped:
            return ""
        before = self._tokenizer.decode(self._token_ids[self._start : self._shown])
        after = self._tokenizer.decode(self._token_ids[self._start :])
        self._shown = len(self._token_ids)
        text = self._release(after[len(before) :])
        if not self.is_stopped:
            text, self._pending = text + self._pending, ""
        return text

    def _release(self, new: str) -> str:
        text = self._pending + new
        found = [position for position in (text.find(stop) for stop in self._stops) if position >= 0]
        if found:
            self.is_stopped = True
            self._pending = ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._pending = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _compile(source: str) -> Any:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.now(UTC).strftime(pattern)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UnsupportedModelError(f"the chat template is broken: {error}", remedy="repair it") from error


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _read_template(folder: Path, config: Mapping[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template") or ""
    if isinstance(source, list):
        source = next((item["template"] for item in source if item.get("name") == "default"), "")
    if len(source) > _MAX_TEMPLATE_CHARS:
        raise UnsupportedModelError(f"the chat template has {len(source)} characters", remedy="check the folder")
    return str(source)


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModelError(f"{path} is not JSON: {error}", remedy="check the file") from error
    return data if isinstance(data, dict) else {}


def _special(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")
