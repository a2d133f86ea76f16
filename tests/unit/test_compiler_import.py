"""GGUF files become folders that mean the same model, or are refused with a reason."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from compiler.gguf_import import import_gguf, unpermute
from compiler.gguf_tokenizer import write_tokenizer
from tests.fakes.compiler_models import permute, write_llama_gguf
from tests.fakes.gguf_reference import GgufLlama
from wire.errors import ConflictError, UnsupportedModelError


def test_every_tensor_comes_back_under_its_name_and_in_its_order(tmp_path: Path) -> None:
    expected = write_llama_gguf(tmp_path / "m.gguf")
    folder = import_gguf(tmp_path / "m.gguf", tmp_path / "model")
    found = load_file(folder / "model.safetensors")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].float().numpy(), tensor, err_msg=name)


def test_undoing_the_rotary_order_is_the_inverse_of_making_it() -> None:
    weight = np.arange(24 * 3, dtype=np.float32).reshape(24, 3)
    np.testing.assert_array_equal(unpermute(permute(weight, 3), 3), weight)


def test_the_tokenizer_merges_and_keeps_special_tokens_whole(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "m.gguf")
    tokenizer = Tokenizer.from_file(str(import_gguf(tmp_path / "m.gguf", tmp_path / "model") / "tokenizer.json"))
    encoded = tokenizer.encode("hello<|end|> 42")
    assert encoded.tokens == ["hell", "o", "<|end|>", "Ġ", "4", "2"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "hello<|end|> 42"


def _fields(**changes: Any) -> dict[str, Any]:
    tokens = ["<|end|>", "<|begin|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell", "hello"]
    fields = {
        "model": "gpt2", "pre": "llama-bpe", "tokens": tokens, "merges": ["h e", "l l", "he ll"],
        "token_type": [3, 3] + [1] * (len(tokens) - 2), "bos_token_id": 1, "eos_token_id": 0, **changes,
    }  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["<|begin|>", "hello"]),  # the family takes whole words and begins with the start token
        ({"add_bos_token": False}, ["hello"]),
        ({"bos_token_id": None}, ["hello"]),
        ({"pre": "smollm"}, ["hell", "o"]),
        ({"pre": "smollm", "add_bos_token": True}, ["<|begin|>", "hell", "o"]),
    ],
)
def test_a_text_begins_and_merges_as_the_file_and_its_family_say(
    tmp_path: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    write_tokenizer(_fields(**changes), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello").input_ids) == expected
    bare = tokenizer("hello", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(bare) == [token for token in expected if token != "<|begin|>"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": None}, "no tokenizer"),
        ({"tokens": None}, "no tokenizer"),
        ({"model": "llama"}, "'llama' vocabulary"),
        ({"merges": None}, "does not add up.*merges"),
        ({"merges": ["h zz"]}, "does not add up"),
        ({"token_type": [3]}, "does not add up"),
        ({"bos_token_id": 9999}, "does not add up"),
        ({"eos_token_id": 9999}, "does not add up"),
    ],
)
def test_a_tokenizer_that_is_missing_or_broken_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        write_tokenizer(_fields(**changes), tmp_path)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "m.gguf", architecture="mamba")
    with pytest.raises(UnsupportedModelError, match="mamba"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "model")


def test_an_unknown_pre_tokeniser_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "m.gguf", pre="something-new")
    with pytest.raises(UnsupportedModelError, match="something-new"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "m.gguf")
    (tmp_path / "model").mkdir()
    with pytest.raises(ConflictError):
        import_gguf(tmp_path / "m.gguf", tmp_path / "model")


def test_the_imported_model_generates_what_the_file_defines(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "m.gguf")
    reference = GgufLlama(tmp_path / "m.gguf")
    folder = import_gguf(tmp_path / "m.gguf", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    prompt = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("hello hell 42").ids
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0].numpy()
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    np.testing.assert_allclose(logits, reference.logits(prompt), rtol=1e-3, atol=2e-2)
    found = answer[0, len(prompt) :].tolist()  # ends at the end token, which the reference knows nothing of
    assert len(found) >= 4
    assert found == reference.generate(prompt, len(found))
