"""GGUF files become folders that mean the same model, or are refused with a reason."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from compiler.gguf_import import import_gguf, unpermute
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
