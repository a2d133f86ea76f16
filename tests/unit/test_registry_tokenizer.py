"""A model's text on its way to tokens and back: the same wherever it is read, whole, and exact in white space."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_registry.chat_tokenizer import ChatTokenizer
from model_registry.token_bytes import find_byte_decoder
from tests.fakes.serving_models import save_tiny_tokenizer
from wire.errors import UnsupportedModelError

MODELS = Path(__file__).resolve().parents[2] / ".cache" / "models"
FOLDERS = [MODELS / "smollm2-135m-instruct", MODELS / "qwen2.5-coder-0.5b-instruct"]
TEXTS = (
    "def f(x):\n    return x ** 2  # squared\n\n\n\tindented\r\n",
    "  leading,   inner  and trailing   ",
    "    4 spaces before a digit\n        8\n",
    "Größe, naïve café, Ελλάδα, 日本語, 👩‍👩‍👧‍👦🙂, \u200bzero width, e\u0301",
    "<|im_start|>user\nnot a turn<|im_end|>",
    "don't WE'RE 1234567 3.14",
    "\ufffd\x00\x07",
    "",
)
CHAT = [
    {"role": "system", "content": "  Answer briefly.\n"},
    {"role": "user", "content": "Größe?\n\n  🙂 "},
    {"role": "assistant", "content": "\tYes."},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    if not (path / "tokenizer.json").exists():
        pytest.skip(f"no {path.name} in the cache")
    return path


@pytest.mark.models
def test_tokens_are_those_of_transformers_for_text_and_for_conversations(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer = ChatTokenizer(folder)
    for text in TEXTS:
        assert tokenizer.encode(text) == source(text).input_ids, text
    wanted = source.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert tokenizer.encode_chat(CHAT) == source(wanted, add_special_tokens=False).input_ids


@pytest.mark.models
def test_golden_prompts_are_what_the_device_computes_and_what_genai_computed(folder: Path) -> None:
    """GenAI's tokenizer differs in white space; in the prompts that releases carry it does not."""
    genai = pytest.importorskip("onnxruntime_genai")
    pytest.importorskip("torch")
    from compiler.language_model import _PROMPTS, golden_prompts
    from tests.fakes.language_artefact import built_language_model

    if folder != FOLDERS[0]:
        pytest.skip("the artefact is built from the small model")
    artefact = built_language_model()
    theirs = genai.Tokenizer(str(artefact))
    chats = [json.dumps([{"role": "user", "content": prompt}]) for prompt in _PROMPTS]
    before = [theirs.encode(theirs.apply_chat_template(chat, add_generation_prompt=True)).tolist() for chat in chats]
    device = ChatTokenizer(artefact)
    assert golden_prompts(device) == before
    assert [device.encode_chat(json.loads(chat)) for chat in chats] == before


@pytest.mark.models
def test_streamed_text_is_the_whole_text(folder: Path) -> None:
    tokenizer = ChatTokenizer(folder)
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        stream = tokenizer.stream()
        parts = [stream.decode(token) for token in tokens]
        assert "".join(parts) + stream.flush() == tokenizer.decode(tokens)
        if "<|" not in text:
            assert unicodedata.normalize("NFC", tokenizer.decode(tokens)) == unicodedata.normalize("NFC", text)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_any_text_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    tokenizer = ChatTokenizer(save_tiny_tokenizer(tmp_path_factory.mktemp("tiny")))
    stream = tokenizer.stream()
    shown = [stream.decode(token) for token in tokenizer.encode(text)]
    assert "".join(shown) + stream.flush() == text


def test_what_stayed_incomplete_is_shown_as_such_at_the_end(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(save_tiny_tokenizer(tmp_path))
    stream = tokenizer.stream()
    assert [stream.decode(token) for token in tokenizer.encode("a🌊")[:-1]] == ["a", "", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


@pytest.mark.models
def test_the_json_automaton_sees_the_same_words_as_with_a_tokenizer_of_its_own(folder: Path) -> None:
    llguidance = pytest.importorskip("llguidance")
    from edge_agent.runtimes.json_guide import JsonGuides

    tokenizer, num_tokens = ChatTokenizer(folder), 152_000
    eos = tokenizer.encode("<|im_end|>")
    own = llguidance.LLTokenizer((folder / "tokenizer.json").read_text(), n_vocab=num_tokens, eos_token=eos)
    shared = JsonGuides(tokenizer, num_tokens, eos).read_vocabulary()
    schema = {"type": "object", "properties": {"å": {"type": "string"}, "b": {"enum": ["naïve 🙂", "c"]}}}
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
    one, other = (llguidance.LLMatcher(words, grammar) for words in (own, shared))
    for token in tokenizer.encode('{"å": "Größe\\n 日本 🙂", "b": "naïve 🙂"}'):
        masks = [np.frombuffer(matcher.compute_bitmask(), np.uint8) for matcher in (one, other)]
        assert np.array_equal(*masks)
        assert [one.try_consume_tokens([token]), other.try_consume_tokens([token])] == [1, 1]
    assert one.is_accepting()
    assert other.is_accepting()


def test_words_with_single_bytes_stand_for_their_bytes() -> None:
    decoder = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    }
    to_bytes = find_byte_decoder(decoder)
    assert to_bytes is not None
    assert [to_bytes(name) for name in ("▁the", "<0x0A>", "é")] == [b" the", b"\n", "é".encode()]
    assert find_byte_decoder({"type": "WordPiece"}) is None


def test_a_tokenizer_that_is_missing_or_damaged_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json is missing"):
        ChatTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match="cannot be read"):
        ChatTokenizer(tmp_path)


def test_what_training_said_of_length_is_not_followed(tmp_path: Path) -> None:
    path = save_tiny_tokenizer(tmp_path) / "tokenizer.json"
    document = json.loads(path.read_text())
    document["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(document))
    assert len(ChatTokenizer(tmp_path).encode("longer than three")) == 17
