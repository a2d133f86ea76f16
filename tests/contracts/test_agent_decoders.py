"""Both ways to run a decoder give what transformers gives: a generic graph with explicit caches, and the builder's."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_agent.runtimes.base import LanguageLimits, LanguageRuntime, Sampling, generate
from edge_agent.runtimes.language import load_language
from tests.fakes.decoder_export import build_shared, export_generic, tiny_source, write_adapter
from wire.errors import UnsupportedModelError

pytestmark = pytest.mark.slow
LIMITS = LanguageLimits(context_tokens=128, num_streams=3, num_threads=1)
PROMPTS = [[5, 6, 7], list(range(40, 90)), [99], list(range(100, 117))]
MAX_TOKENS = 16


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("decoders")
    source = tiny_source(folder / "source")
    export_generic(folder / "source", folder / "generic")
    build_shared(folder / "source", folder / "shared")
    return folder, source


def greedy(source: Any, prompt: list[int]) -> list[int]:
    """What transformers continues with, up to the end of sequence."""
    with torch.inference_mode():
        tokens = source.generate(torch.tensor([prompt]), max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0)
    return [int(token) for token in tokens[0, len(prompt) :]]


def together(runtime: LanguageRuntime, prompts: list[list[int]]) -> list[list[int]]:
    """All prompts at once, more of them than streams."""
    answers: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        pieces = generate(runtime, prompts[number], Sampling(MAX_TOKENS))
        answers[number] = [piece.token for piece in pieces]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [answers[number] for number in range(len(prompts))]


@pytest.mark.parametrize("kind", ["generic", "shared"])
def test_streams_that_share_steps_say_what_the_source_says(models: tuple[Path, Any], kind: str) -> None:
    folder, source = models
    runtime = load_language(folder / kind, LIMITS)
    try:
        assert together(runtime, PROMPTS) == [greedy(source, prompt) for prompt in PROMPTS]
        forced = greedy(source, PROMPTS[1])
        assert runtime.agreement(PROMPTS[1], forced) == 1.0
        assert runtime.agreement(PROMPTS[1], [token + 1 for token in forced]) < 0.5
    finally:
        runtime.close()


@pytest.mark.parametrize("kind", ["generic", "shared"])
def test_an_embedding_is_the_mean_of_the_last_hidden_states(models: tuple[Path, Any], kind: str) -> None:
    folder, source = models
    runtime = load_language(folder / kind, LIMITS)
    try:
        with torch.inference_mode():
            states = source(torch.tensor([PROMPTS[1]]), output_hidden_states=True).hidden_states[-1][0]
        mean = states.mean(dim=0).numpy()
        assert np.allclose(runtime.embed(PROMPTS[1]), mean / np.linalg.norm(mean), atol=1e-5)
    finally:
        runtime.close()


def test_an_adapter_beside_the_graph_changes_what_it_computes(models: tuple[Path, Any]) -> None:
    folder, source = models
    path = folder / "generic" / "style.onnx_adapter"
    a, b = write_adapter(path, source)
    try:
        runtime = load_language(folder / "generic", LIMITS)
        with torch.inference_mode():
            out = source(torch.tensor([PROMPTS[1]]), output_hidden_states=True)
        wanted = (out.logits[0, -1] + out.hidden_states[-1][0, -1] @ torch.from_numpy(a) @ torch.from_numpy(b)).argmax()
        first = next(iter(generate(runtime, PROMPTS[1], Sampling(1)))).token
        runtime.close()
        assert first == int(wanted)
        assert first != int(out.logits[0, -1].argmax())
        write_adapter(folder / "generic" / "twice.onnx_adapter", source, seed=1)
        with pytest.raises(UnsupportedModelError, match="set twice"):
            load_language(folder / "generic", LIMITS)
        path.write_bytes(b"no adapter")
        with pytest.raises(UnsupportedModelError, match="is no adapter"):
            load_language(folder / "generic", LIMITS)
    finally:
        for adapter in (folder / "generic").glob("*.onnx_adapter"):
            adapter.unlink()
