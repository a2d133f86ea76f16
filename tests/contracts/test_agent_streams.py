"""Streams of a real language model on the agent's own loop: they share steps, and none waits for another's end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from edge_agent.runtimes.base import LanguageLimits, LanguageRuntime, Piece, Sampling, generate
from edge_agent.runtimes.decoder_graph import make_graph, open_session
from edge_agent.runtimes.genai_language import GenaiLanguage
from edge_agent.runtimes.language import load_language
from edge_agent.runtimes.language_settings import read_settings
from tests.fakes.language_artefact import built_language_model
from wire.errors import InvalidInputError, UnavailableError, UnsupportedModelError

WAIT_S = 120
pytestmark = [pytest.mark.models, pytest.mark.slow]


@pytest.fixture(scope="module")
def runtime() -> Iterator[LanguageRuntime]:
    runtime = load_language(built_language_model(), LanguageLimits(context_tokens=1024, num_streams=4, num_threads=2))
    yield runtime
    runtime.close()


class Listener:
    """Collects one stream; other threads wait on it."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.error: Exception | None = None
        self.has_begun, self.has_ended = threading.Event(), threading.Event()

    def __call__(self, piece: Piece | Exception) -> None:
        if isinstance(piece, Exception):
            self.error = piece
        else:
            self.pieces.append(piece)
        self.has_begun.set()
        if isinstance(piece, Exception) or piece.finish_reason is not None:
            self.has_ended.set()

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


def text_of(runtime: LanguageRuntime, prompt: str, sampling: Sampling) -> str:
    return "".join(piece.text for piece in generate(runtime, runtime.encode(prompt), sampling))


def test_a_stream_that_comes_later_begins_and_ends_while_another_one_runs(runtime: LanguageRuntime) -> None:
    long, short = Listener(), Listener()
    stop = runtime.start(runtime.encode("Once upon a time"), Sampling(max_tokens=600, repetition_penalty=1.2), long)
    assert long.has_begun.wait(WAIT_S)
    runtime.start(runtime.encode("The capital of France is"), Sampling(max_tokens=4), short)
    assert short.has_ended.wait(WAIT_S)
    assert short.text.startswith(" Paris")
    assert not long.has_ended.is_set()
    stop()
    assert long.has_ended.wait(WAIT_S)
    assert long.pieces[-1].finish_reason == "cancelled"


def test_cancelled_prompts_give_their_memory_back_at_once(runtime: LanguageRuntime) -> None:
    listener = Listener()
    cancel = runtime.start([7] * 900, Sampling(max_tokens=4), listener)
    while runtime.memory().cache_bytes == 0:
        time.sleep(0.005)
    cancel()
    assert listener.has_ended.wait(WAIT_S)
    assert listener.pieces == [Piece(-1, "", "cancelled")]
    assert runtime.memory().cache_bytes == 0
    assert "Paris" in text_of(runtime, "The capital of France is", Sampling(max_tokens=4))


def test_what_runs_beside_a_stream_does_not_change_its_logits() -> None:
    folder = built_language_model()
    settings = read_settings(folder)
    graph = make_graph(open_session(settings, 2), settings, 4, 512)
    random = np.random.default_rng(0)
    mine, *others = (random.integers(100, 40_000, size).tolist() for size in (17, 5, 90))
    seen = []
    for other in others:
        for row, tokens in enumerate((mine, other)):
            graph.prefill(row, tokens[:-1], 0)
        logits = graph.decode([mine[-1], other[-1]], [len(mine) - 1, len(other) - 1])
        seen.append(logits[0].copy())
        graph.move(1, 3, len(other))
        for row in (0, 3):
            graph.free(row)
    assert np.array_equal(seen[0], seen[1])
    graph.prefill(0, mine[:-1], 0)
    alone = graph.decode([mine[-1]], [len(mine) - 1])[0]
    cosine = alone @ seen[0] / np.linalg.norm(alone) / np.linalg.norm(seen[0])
    assert cosine > 0.9999  # int4 kernels round activations differently in a batch of one


def test_a_prompt_read_in_chunks_is_read_as_a_whole(runtime: LanguageRuntime) -> None:
    prompt = runtime.encode("The quick brown fox jumps over the lazy dog. " * 30)
    pieces = list(generate(runtime, prompt, Sampling(max_tokens=8)))
    assert runtime.agreement(prompt, [piece.token for piece in pieces]) >= 0.85
    assert runtime.agreement(prompt, [11, 12, 13]) == 0.0


def test_sampling_parameters_do_what_they_say(runtime: LanguageRuntime) -> None:
    def sample(seed: int) -> str:
        return text_of(runtime, "My favourite", Sampling(max_tokens=8, temperature=1.2, top_p=0.95, seed=seed))

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(3)}) > 1
    cut = text_of(runtime, "One, two, three, four,", Sampling(max_tokens=20, stop=("eight",)))
    assert cut.rstrip().endswith("seven,")


def test_json_is_json_and_matches_its_schema(runtime: LanguageRuntime) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    prompt = runtime.chat_tokens([{"role": "user", "content": "Invent a person."}])
    sampling = Sampling(max_tokens=60, json_schema=json.dumps(schema), temperature=0.7, seed=4)
    person = json.loads("".join(piece.text for piece in generate(runtime, prompt, sampling)))
    assert set(person) == {"name", "age"}
    assert isinstance(person["age"], int)
    with pytest.raises(InvalidInputError, match="schema"):
        runtime.start(prompt, Sampling(max_tokens=4, json_schema='{"type": "nothing"}'), Listener())


def test_what_cannot_be_done_is_refused_with_a_reason(runtime: LanguageRuntime) -> None:
    with pytest.raises(InvalidInputError, match="exceed 1024"):
        runtime.start([7] * 1000, Sampling(max_tokens=100), Listener())
    with pytest.raises(InvalidInputError, match="empty"):
        runtime.start([], Sampling(max_tokens=1), Listener())
    with pytest.raises(UnsupportedModelError, match="hidden states"):
        runtime.embed([1, 2, 3])


def test_an_unloaded_model_tells_its_streams() -> None:
    runtime = load_language(built_language_model(), LanguageLimits(context_tokens=256, num_streams=1))
    running, waiting = Listener(), Listener()
    for listener in (running, waiting):
        runtime.start(runtime.encode("Once upon"), Sampling(max_tokens=200, repetition_penalty=1.2), listener)
    assert running.has_begun.wait(WAIT_S)
    runtime.close()
    assert isinstance(running.error, UnavailableError)
    assert isinstance(waiting.error, UnavailableError)


def test_a_listener_that_fails_ends_its_own_stream_only(runtime: LanguageRuntime) -> None:
    def broken(piece: Piece | Exception) -> None:
        raise RuntimeError("nobody listens")

    runtime.start(runtime.encode("Once upon a time"), Sampling(max_tokens=500, repetition_penalty=1.2), broken)
    assert "Paris" in text_of(runtime, "The capital of France is", Sampling(max_tokens=4))
    assert runtime.memory().num_streams == 0


def test_models_that_only_genai_runs_keep_the_same_promises() -> None:
    folder = built_language_model()
    limits = LanguageLimits(context_tokens=256)
    runtime = GenaiLanguage(folder, read_settings(folder), limits)
    prompt = runtime.encode("One, two, three, four,")
    assert text_of(runtime, "The capital of France is", Sampling(max_tokens=3)).startswith(" Paris")
    assert text_of(runtime, "One, two, three, four,", Sampling(20, stop=("eight",))).rstrip().endswith("seven,")
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    sampling = Sampling(max_tokens=40, json_schema=json.dumps(schema))
    assert set(json.loads("".join(piece.text for piece in generate(runtime, prompt, sampling)))) == {"a"}
    listener = Listener()
    cancel = runtime.start(prompt, Sampling(max_tokens=200, repetition_penalty=1.2), listener)
    assert listener.has_begun.wait(WAIT_S)
    cancel()
    assert listener.has_ended.wait(WAIT_S)
    assert listener.pieces[-1].finish_reason == "cancelled"
    tokens = [piece.token for piece in generate(runtime, prompt, Sampling(max_tokens=6))]
    assert runtime.agreement(prompt, tokens) == 1.0
    runtime.close()
