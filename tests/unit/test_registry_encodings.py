"""Chunks on their way: each encoding comes back exactly, small where it can be, bounded and verified."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import zstandard

from model_registry.encodings import (
    build_delta,
    decode_frame,
    encode_chunk,
    encode_frame,
    plan_delta,
    whole_frames,
)
from model_registry.manifest import ArtefactFile, Chunk, Manifest, sha256
from wire.errors import IntegrityError, InvalidInputError, NotFoundError
from wire.frames import MAX_CHUNK_BYTES, ChunkFrame, Codec, parse_frame


def weights(dtype: npt.DTypeLike, step: float = 0.0, count: int = 8192) -> bytes:
    rng = np.random.default_rng(7)
    values = rng.normal(0, 0.02, count)
    return bytes((values + step * np.random.default_rng(8).normal(0, 1, count)).astype(dtype).tobytes())


def chunk_of(data: bytes, element_bytes: int = 1) -> Chunk:
    return Chunk(digest=sha256(data), size_bytes=len(data), element_bytes=element_bytes)  # type: ignore[arg-type]


def manifest_of(*chunks: Chunk, path: str = "model.onnx") -> Manifest:
    size = sum(chunk.size_bytes for chunk in chunks)
    file = ArtefactFile(path=path, size_bytes=size, digest="d" * 64, chunks=list(chunks))
    return Manifest(
        name="vision",
        kind="tensor",
        target="cpu-x86",
        runtime="onnxruntime",
        precision="fp32",
        files=[file],
        entry=path,
        source_digest="e" * 64,
    )


def frame_of(codec: Codec, body: bytes, data: bytes, base: bytes | None = None, size: int | None = None) -> ChunkFrame:
    return ChunkFrame(
        manifest_prefix=bytes(8),
        index=0,
        raw_size_bytes=len(data) if size is None else size,
        codec=codec,
        body=body,
        digest_prefix=bytes.fromhex(sha256(data))[:16],
        base_digest=bytes.fromhex(sha256(base)) if base is not None else None,
    )


def nothing_held(_: str) -> None:
    return None


@pytest.mark.parametrize(
    ("dtype", "width", "codec", "share"),
    [(np.float16, 2, Codec.SPLIT2_ZSTD, 0.88), (np.float32, 4, Codec.SPLIT4_ZSTD, 0.90)],
)
def test_floats_travel_as_byte_planes(dtype: npt.DTypeLike, width: int, codec: Codec, share: float) -> None:
    data = weights(dtype)
    chosen, body = encode_chunk(data, width)
    assert chosen is codec
    assert len(body) < share * len(data)
    assert decode_frame(frame_of(chosen, body, data), nothing_held) == data


def test_noise_travels_raw() -> None:
    noise = np.random.default_rng(1).bytes(5000)
    for width in (1, 2, 4):
        assert encode_chunk(noise, width) == (Codec.RAW, noise)


def test_text_travels_compressed() -> None:
    text = b"the same words again " * 100
    codec, body = encode_chunk(text)
    assert codec is Codec.ZSTD
    assert len(body) < 100
    assert decode_frame(frame_of(codec, body, text), nothing_held) == text


@pytest.mark.parametrize(("dtype", "width"), [(np.float16, 2), (np.float32, 4)])
def test_a_small_step_of_every_weight_costs_much_less_than_the_weights(dtype: npt.DTypeLike, width: int) -> None:
    old, new = weights(dtype), weights(dtype, step=1e-5)
    codec, body = encode_chunk(new, width, old)
    assert codec in (Codec.XOR_SPLIT2_ZSTD, Codec.XOR_SPLIT4_ZSTD)
    assert len(body) < 0.7 * len(encode_chunk(new, width)[1])
    assert decode_frame(frame_of(codec, body, new, old), {sha256(old): old}.get) == new


def test_the_same_chunk_is_only_named() -> None:
    data = weights(np.float16)
    assert encode_chunk(data, 2, data) == (Codec.REUSE, b"")
    assert decode_frame(frame_of(Codec.REUSE, b"", data, data), {sha256(data): data}.get) == data


def test_an_unrelated_base_is_not_used() -> None:
    data = weights(np.float16)
    codec, body = encode_chunk(data, 2, np.random.default_rng(3).bytes(len(data)))
    assert (codec, body) == encode_chunk(data, 2)


def test_a_base_of_another_length_is_not_used() -> None:
    data = weights(np.float16)
    assert encode_chunk(data, 2, data[:-2]) == encode_chunk(data, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1023])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_chunks_that_do_not_fill_an_element_survive(size: int, width: int) -> None:
    data, old = bytes(size), bytes(size - 1) + b"\1"
    for base in (None, old):
        codec, body = encode_chunk(data, width, base)
        assert decode_frame(frame_of(codec, body, data, base), {sha256(old): old}.get) == data


def test_chunks_outside_of_the_limits_are_refused() -> None:
    for data in (b"", bytes(MAX_CHUNK_BYTES + 1)):
        with pytest.raises(InvalidInputError):
            encode_chunk(data)
    with pytest.raises(InvalidInputError, match="width 3"):
        encode_chunk(b"abc", 3)


def test_a_compression_bomb_is_refused_before_it_unfolds() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    unstated = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 26))
    for body in (bomb, unstated):
        assert len(body) < 10_000
        with pytest.raises(IntegrityError, match="states"):
            decode_frame(frame_of(Codec.ZSTD, body, b"small"), nothing_held)


def test_a_bomb_inside_a_plane_is_refused() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    body = (len(bomb) | 1 << 31).to_bytes(4, "big") + bomb
    with pytest.raises(IntegrityError, match="states"):
        decode_frame(frame_of(Codec.SPLIT2_ZSTD, body, bytes(8)), nothing_held)


@pytest.mark.parametrize("body", [b"", b"\0", b"\0\0\0\4abc", b"\xff\xff\xff\xff", b"\x80\0\0\4abcd" * 2])
def test_a_malformed_split_body_is_refused(body: bytes) -> None:
    for codec in (Codec.SPLIT2_ZSTD, Codec.SPLIT4_ZSTD):
        with pytest.raises(IntegrityError):
            decode_frame(frame_of(codec, body, bytes(8)), nothing_held)


def test_trailing_bytes_are_refused() -> None:
    codec, body = encode_chunk(bytes(1000), 2)
    with pytest.raises(IntegrityError):
        decode_frame(frame_of(codec, body + b"x", bytes(1000)), nothing_held)
    packed = zstandard.ZstdCompressor().compress(bytes(1000))
    with pytest.raises(IntegrityError):
        decode_frame(frame_of(Codec.ZSTD, packed + b"x", bytes(1000)), nothing_held)


def test_bytes_that_hash_to_something_else_are_not_handed_out() -> None:
    with pytest.raises(IntegrityError, match="other bytes"):
        decode_frame(frame_of(Codec.RAW, b"forged", b"honest"), nothing_held)


def test_a_frame_of_another_chunk_is_refused_by_the_manifest() -> None:
    frame = frame_of(Codec.RAW, b"honest", b"honest")
    assert decode_frame(frame, nothing_held, chunk=chunk_of(b"honest")) == b"honest"
    with pytest.raises(IntegrityError, match="manifest"):
        decode_frame(frame, nothing_held, chunk=chunk_of(b"wanted"))
    forged = replace(frame, digest_prefix=bytes.fromhex(sha256(b"wanted"))[:16])
    with pytest.raises(IntegrityError, match="other bytes"):
        decode_frame(forged, nothing_held, chunk=chunk_of(b"wanted"))


def test_a_delta_without_its_base_says_so() -> None:
    old, new = weights(np.float16), weights(np.float16, step=1e-5)
    codec, body = encode_chunk(new, 2, old)
    frame = frame_of(codec, body, new, old)
    with pytest.raises(NotFoundError, match=sha256(old)[:12]):
        decode_frame(frame, nothing_held)
    with pytest.raises(IntegrityError):
        decode_frame(frame, lambda _: weights(np.float16, step=1.0))
    with pytest.raises(IntegrityError):
        decode_frame(frame, lambda _: old[:-1])


def test_a_chunk_is_checked_before_it_is_framed() -> None:
    with pytest.raises(IntegrityError):
        encode_frame("0" * 64, 0, chunk_of(b"right"), b"wrong")


def test_a_plan_pairs_by_digest_first_then_by_place() -> None:
    def chunk(name: str, size: int = 100) -> Chunk:
        return Chunk(digest=sha256(name.encode()), size_bytes=size, element_bytes=2)

    base = manifest_of(chunk("header", 10), chunk("a"), chunk("b"), chunk("c", 50))
    new = manifest_of(chunk("new header", 12), chunk("b"), chunk("b2"), chunk("c2", 50))
    assert [step.base_digest for step in plan_delta(base, new)] == [
        None,
        chunk("b").digest,
        chunk("b").digest,
        chunk("c").digest,
    ]
    longer = manifest_of(chunk("header", 10), chunk("a2"), chunk("x", 70), chunk("y", 70), chunk("b2"), chunk("c2", 50))
    assert [step.base_digest for step in plan_delta(base, longer)] == [
        chunk("header").digest,
        chunk("a").digest,
        None,
        None,
        chunk("b").digest,
        chunk("c").digest,
    ]


def test_a_delta_rebuilds_the_new_artefact_from_the_old_one() -> None:
    old = [weights(np.float16), b"header v1", weights(np.float32), b"gone"]
    new = [weights(np.float16, step=1e-5), b"header v2, longer", weights(np.float32)]
    base = manifest_of(chunk_of(old[0], 2), chunk_of(old[1]), chunk_of(old[2], 4), chunk_of(old[3]))
    manifest = manifest_of(chunk_of(new[0], 2), chunk_of(new[1]), chunk_of(new[2], 4))
    stored = {sha256(data): data for data in [*old, *new]}

    def put(data: bytes) -> str:
        stored[sha256(data)] = data
        return sha256(data)

    delta = build_delta(base, manifest, stored.__getitem__, put)
    frames = [parse_frame(stored[digest]) for digest in _read_index(stored[delta.index])]
    held = {sha256(data): data for data in old}
    rebuilt = [
        decode_frame(frame, held.get, chunk=chunk) for frame, chunk in zip(frames, manifest.chunk_list(), strict=True)
    ]
    assert rebuilt == new
    assert [frame.codec for frame in frames] == [Codec.XOR_SPLIT2_ZSTD, Codec.RAW, Codec.REUSE]
    assert delta.base_manifest == base.digest
    assert delta.wire_bytes == sum(len(frame.to_bytes()) for frame in frames)
    assert delta.wire_bytes < 0.5 * sum(len(frame) for frame in whole_frames(manifest, stored.__getitem__))


def _read_index(data: bytes) -> list[str]:
    import json

    return [str(digest) for digest in json.loads(data)]
