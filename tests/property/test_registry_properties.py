"""Whatever comes over the wire: codecs give back what they got, readers refuse clearly and never fall."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_registry.chunking import MIN_CHUNK_BYTES, cover, cut
from model_registry.encodings import decode_frame, encode_frame, plan_delta
from model_registry.layout import Span
from model_registry.manifest import ArtefactFile, Chunk, Manifest, parse_manifest, parse_release, sha256
from tests.unit.test_wire_golden import FRAMES, KEY, MANIFEST, MESSAGES, documents
from wire import decision, messages
from wire.envelope import key_id, open_envelope
from wire.errors import ForeshoreError
from wire.frames import MAX_CHUNK_BYTES, parse_frame
from wire.messages import DESIRED_TYPE

WIDTHS = st.sampled_from([1, 2, 4])
TRUSTED = {key_id(KEY.public_key()): KEY.public_key()}


@st.composite
def chunk_pairs(draw: st.DrawFn) -> tuple[bytes, bytes | None]:
    """A chunk and perhaps a base: smooth, noisy, sparse, of odd lengths."""
    size = draw(st.integers(1, 3000))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["noise", "floats", "zeros", "sparse"]))
    made = {
        "noise": rng.bytes(size),
        "floats": rng.normal(0, 0.02, size).astype(np.float16).tobytes()[:size],
        "zeros": bytes(size),
        "sparse": (rng.random(size) > 0.99).astype(np.uint8).tobytes(),
    }[kind]
    base = bytearray(made)
    for _ in range(draw(st.integers(0, 5))):
        base[draw(st.integers(0, size - 1))] ^= draw(st.integers(0, 255))
    other = draw(st.sampled_from([None, bytes(base), bytes(base[:-1]) or None, rng.bytes(size)]))
    return made, other


@settings(max_examples=500, deadline=None)
@given(pair=chunk_pairs(), width=WIDTHS, index=st.integers(0, 2**32 - 1))
def test_every_chunk_survives_its_trip_against_every_base(
    pair: tuple[bytes, bytes | None], width: int, index: int
) -> None:
    data, base = pair
    chunk = Chunk.model_validate({"digest": sha256(data), "size_bytes": len(data), "element_bytes": width})
    wire = encode_frame("ab" * 32, index, chunk, data, base=base, base_digest=sha256(base) if base else "")
    frame = parse_frame(wire)
    held = {sha256(base): base} if base else {}
    assert decode_frame(frame, held.get, chunk=chunk) == data
    assert frame.index == index
    assert len(wire) <= len(data) + 76


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 500_000), WIDTHS, st.integers(0, 5000)), max_size=30),
    tail=st.integers(0, 1000),
    chunk_bytes=st.sampled_from([64, 128, 256]).map(lambda kib: kib * 1024),
)
def test_chunks_cover_every_byte_once_and_keep_to_their_size(
    sizes: list[tuple[int, int, int]], tail: int, chunk_bytes: int
) -> None:
    spans, end = [], 0
    for size, width, gap in sizes:
        spans.append(Span(end + gap, size, width))
        end += gap + size
    total = end + tail
    chunks = list(cut(cover(spans, total), chunk_bytes))
    place = 0
    for chunk in chunks:
        assert chunk.offset == place
        assert 0 < chunk.size_bytes <= chunk_bytes
        place += chunk.size_bytes
    assert place == total
    starts = {chunk.offset for chunk in chunks}
    assert all(span.offset in starts for span in spans if span.size_bytes >= MIN_CHUNK_BYTES)


@settings(max_examples=300, deadline=None)
@given(
    old=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 3), WIDTHS), min_size=1, max_size=12),
    new=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 3), WIDTHS), min_size=1, max_size=12),
)
def test_a_delta_plan_pairs_only_what_fits(old: list[tuple[int, int, int]], new: list[tuple[int, int, int]]) -> None:
    base, manifest = _manifest(old), _manifest(new)
    held = {chunk.digest: chunk for chunk in base.chunk_list()}
    steps = plan_delta(base, manifest)
    assert [step.index for step in steps] == list(range(len(new)))
    for step in steps:
        assert step.is_reuse == (step.chunk.digest in held)
        if step.base_digest is not None:
            assert held[step.base_digest].size_bytes == step.chunk.size_bytes


def _manifest(parts: list[tuple[int, int, int]]) -> Manifest:
    chunks = [
        Chunk.model_validate({"digest": sha256(b"%d %d" % (n, size)), "size_bytes": size, "element_bytes": width})
        for n, size, width in parts
    ]
    size_bytes = sum(chunk.size_bytes for chunk in chunks)
    file = ArtefactFile(path="model.onnx", size_bytes=size_bytes, digest="d" * 64, chunks=chunks)
    return MANIFEST.model_copy(update={"files": [file], "golden": None})


def readers() -> dict[str, Callable[[bytes], Any]]:
    """How each committed document is read by whoever receives it."""
    found: dict[str, Callable[[bytes], Any]] = {
        f"{name}.json": partial(messages.parse, type(message)) for name, message in MESSAGES.items()
    }
    found |= {f"{name}.bin": _read_frame for name in FRAMES}
    found["manifest.json"] = parse_manifest
    found["release.json"] = parse_release
    found["decision.json"] = _read_decision
    found["envelope.json"] = lambda data: open_envelope(data, DESIRED_TYPE, TRUSTED)
    return found


def _read_frame(data: bytes) -> Any:
    return decode_frame(parse_frame(data), lambda _: bytes(4))


def _read_decision(data: bytes) -> Any:
    try:
        document = json.loads(data)
    except ValueError:
        return None  # JSON is read by the API's own layer
    return decision.from_dict(document) if isinstance(document, dict) else None


def test_ten_thousand_mutated_messages_are_read_or_refused_but_never_break_anything() -> None:
    rng = random.Random(20260102)
    originals, refused, num = documents(), list[ForeshoreError](), 0
    for name, read in readers().items():
        for _ in range(10_000 // len(readers()) + 1):
            num += 1
            try:
                read(mutate(originals[name], rng))
            except ForeshoreError as error:
                refused.append(error)
    assert num >= 10_000
    assert len(refused) > 5_000
    assert [error for error in refused if not (error.message and error.remedy)] == []


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few flips, cuts, doublings and hostile values."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(changed) + 1)
        match rng.randrange(6):
            case 0 if changed:
                changed[place % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                del changed[place : place + rng.randrange(1, 20)]
            case 2:
                changed[place:place] = rng.randbytes(rng.randrange(1, 9))
            case 3:
                changed[place:place] = changed[: rng.randrange(40)]
            case 4:
                hostile = [
                    b"1e999",
                    b"-1",
                    b"null",
                    b"[[[[",
                    b'"\\ud800"',
                    b"99999999999999999999",
                    b"{}",
                    b"NaN",
                    b"\xff",
                ]
                end = changed.find(b",", place)
                changed[place : end if end > 0 else place] = rng.choice(hostile)
            case _:
                del changed[place:]
    return bytes(changed)


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    )
)
@pytest.mark.parametrize("field", ["files", "golden", "gates", "requires", "entry", "name", "vision", "tools"])
def test_a_manifest_with_anything_in_a_field_is_read_or_refused(field: str, value: Any) -> None:
    document = json.loads(MANIFEST.to_bytes())
    document[field] = value
    try:
        again = parse_manifest(json.dumps(document).encode())
    except ForeshoreError:
        return
    assert parse_manifest(again.to_bytes()) == again


def test_a_deeply_nested_document_is_refused() -> None:
    for read in (parse_manifest, parse_release, lambda data: messages.parse(messages.Need, data)):
        with pytest.raises(ForeshoreError):
            read(b"[" * 16_000)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../../x", "a\\b", "a\0b", "", ".", "a/./b", "./a", "x" * 201, "a//b", "a/", "\n"]
)
def test_a_path_that_leaves_the_folder_or_is_ambiguous_is_refused(path: str) -> None:
    document = json.loads(MANIFEST.to_bytes())
    document["files"][0]["path"] = path
    with pytest.raises(ForeshoreError):
        parse_manifest(json.dumps(document).encode())


def test_a_large_file_is_described_in_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    from model_registry.chunking import describe_file, iter_chunks

    path = tmp_path / "big.bin"
    with path.open("wb") as file:
        file.truncate(96 << 20)
    tracemalloc.start()
    described = describe_file(path, "big.bin")
    for _ in iter_chunks(path, described):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(described.chunks) == (96 << 20) // MAX_CHUNK_BYTES
    assert peak < 8 << 20
