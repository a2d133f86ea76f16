"""Between text and tokens, without torch or a runtime: a model's tokenizer, its chat template, and text that grows
token by token.

Gateway, device and compiler all cut text with this, so that a prompt has the same tokens wherever it is read. What
`tokenizer.json` says of truncation and padding is for training and is not followed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer

from model_registry.token_bytes import find_byte_decoder
from wire.errors import InvalidInputError, UnsupportedModelError

_MAX_TEMPLATE_CHARS = 1 << 18
_MARK = b"\xff"  # no text contains it
_REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


class ChatTokenizer:
    """Tokenizer and chat template of a Hugging Face style folder."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UnsupportedModelError(f"{path} is missing", remedy="give a folder with tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise UnsupportedModelError(f"{path} cannot be read: {error}", remedy="compile the model again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
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

    def stream(self) -> Detokenizer:
        """For the tokens of one answer."""
        return Detokenizer(self)

    def to_json(self) -> str:
        """`tokenizer.json` as it is understood."""
        return str(self._tokenizer.to_str())

    def find_token_bytes(self, num_tokens: int) -> list[bytes] | None:
        """The bytes that each token stands for; None where the decoder is of an unknown kind.

        Control tokens (special ones, added ones in angle brackets) and ids that no token has are marked by 0xff before
        the name, as llguidance wants it.
        """
        to_bytes = find_byte_decoder(json.loads(self._tokenizer.decoder.__getstate__()))
        if to_bytes is None:
            return None
        added = self._tokenizer.get_added_tokens_decoder()
        return [self._bytes_of(token_id, added, to_bytes) for token_id in range(num_tokens)]

    def _bytes_of(self, token_id: int, added: Mapping[int, Any], to_bytes: Callable[[str], bytes]) -> bytes:
        if token_id in added:
            content = str(added[token_id].content)
            is_control = added[token_id].special or (content.startswith("<") and content.endswith(">"))
            return _MARK * is_control + content.encode()
        name = self._tokenizer.id_to_token(token_id)
        return to_bytes(name) if name is not None else _MARK + f"<[{token_id}]>".encode()


class Detokenizer:
    """Text of one answer as its tokens arrive, special tokens left out: no half characters, and together exactly what
    decoding all tokens at once gives.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._start = 0  # tokens before it never change the text again
        self._shown = 0  # tokens whose text has left `_start`'s window

    def decode(self, token_id: int) -> str:
        """The text that this token completes."""
        self._token_ids.append(token_id)
        new = self._new_text()
        if new.endswith(_REPLACEMENT):
            return ""
        self._start, self._shown = self._shown, len(self._token_ids)
        return new

    def flush(self) -> str:
        """What stayed incomplete."""
        new = self._new_text()
        self._start = self._shown = len(self._token_ids)
        return new

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._token_ids[self._start : self._shown])
        return self._tokenizer.decode(self._token_ids[self._start :])[len(before) :]


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
