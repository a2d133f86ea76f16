"""Text that grows token by token, and chat templates."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud.gateway.text import TextStream
from model_registry.chat_tokenizer import ChatTokenizer
from tests.fakes.serving_models import save_tiny_tokenizer
from wire.errors import InvalidInputError


@pytest.fixture
def tokenizer(tmp_path: Path) -> ChatTokenizer:
    return ChatTokenizer(save_tiny_tokenizer(tmp_path))


def test_streamed_text_equals_the_whole_text_and_never_shows_half_a_character(tokenizer: ChatTokenizer) -> None:
    text = "Küste – 海岸 🌊 end"
    stream = TextStream(tokenizer)
    parts = [stream.push(token) for token in tokenizer.encode(text)]
    assert all("\ufffd" not in part for part in parts)
    assert "".join(parts) + stream.flush() == text


def test_nothing_of_a_stop_string_is_shown_even_when_it_comes_in_pieces(tokenizer: ChatTokenizer) -> None:
    stream = TextStream(tokenizer, ["STOP", "###"])
    shown = [stream.push(token) for token in tokenizer.encode("one STO two STOP three")]
    assert "".join(shown) == "one STO two "
    assert stream.is_stopped
    assert stream.flush() == ""


def test_text_held_back_for_a_stop_string_is_shown_at_the_end(tokenizer: ChatTokenizer) -> None:
    stream = TextStream(tokenizer, ["STOP"])
    shown = "".join(stream.push(token) for token in tokenizer.encode("one ST"))
    assert shown == "one "
    assert shown + stream.flush() == "one ST"


def test_a_chat_template_cannot_reach_python(tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(InvalidInputError, match="chat template refuses"):
        ChatTokenizer(tmp_path).encode_chat([{"role": "user", "content": "x"}])
