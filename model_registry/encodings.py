"""How a chunk travels: raw, zstd, byte planes, XOR with the chunk a device already holds, or a bare reference to it.

Weights compress best as byte planes: sign and exponent repeat, the low mantissa byte is noise. A plane is compressed
only where that saves at least 3 %, so the noisy one travels raw. A full fine-tune changes every weight a little: XOR
with the old value clears the high planes. Decoding never allocates more than the frame's stated length, and hands
nothing out that does not hash to the chunk's digest.

Body of a split codec: for each plane, most significant first, a 4-byte big-endian word (top bit: compressed, the rest:
length) and its bytes; then the bytes that do not fill an element. Pure functions; storage belongs to the callers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import zstandard

from model_registry.manifest import Chunk, DeltaEncoding, Manifest, canonical_bytes, sha256
from wire.errors import IntegrityError, InvalidInputError, NotFoundError
from wire.frames import MAX_CHUNK_BYTES, ChunkFrame, Codec

ReadChunk = Callable[[str], bytes]
"""Digest in hex -> the bytes of that chunk; raises `NotFoundError`."""

FindChunk = Callable[[str], bytes | None]
"""Digest in hex -> the bytes of that chunk, or None when it is not held."""

PutBlob = Callable[[bytes], str]
"""Store bytes, return their digest."""

ZSTD_LEVEL = 1
MIN_SAVING = 0.03
GOOD_DELTA = 0.6  # an XOR body below this share of the raw size is taken without trying anything else

_COMPRESSED = 1 << 31
_WHOLE_BY_WIDTH = {1: Codec.ZSTD, 2: Codec.SPLIT2_ZSTD, 4: Codec.SPLIT4_ZSTD}
_XOR_BY_WIDTH = {1: Codec.XOR_SPLIT1_ZSTD, 2: Codec.XOR_SPLIT2_ZSTD, 4: Codec.XOR_SPLIT4_ZSTD}
_WIDTH_BY_CODEC = {codec: width for codes in (_WHOLE_BY_WIDTH, _XOR_BY_WIDTH) for width, codec in codes.items()}


@dataclass(frozen=True)
class DeltaStep:
    """How one chunk of the new manifest comes from the base: the base chunk's digest, or None to send it whole."""

    index: int
    chunk: Chunk
    base_digest: str | None

    @property
    def is_reuse(self) -> bool:
        """Whether the device already holds this very chunk."""
        return self.base_digest == self.chunk.digest


def encode_chunk(data: bytes, element_bytes: int = 1, base: bytes | None = None) -> tuple[Codec, bytes]:
    """Return the codec and body that make `data` small. With `base` (same length) deltas are considered too."""
    _check_chunk(data, element_bytes)
    if base is not None and base == data:
        return Codec.REUSE, b""
    if base is None or len(base) != len(data):
        return _encode_whole(data, element_bytes)
    delta = _XOR_BY_WIDTH[element_bytes], _split(_xor(data, base), element_bytes)
    if len(delta[1]) <= GOOD_DELTA * len(data):
        return delta
    return min(delta, _encode_whole(data, element_bytes), key=lambda candidate: len(candidate[1]))


def encode_frame(
    manifest_digest: str, index: int, chunk: Chunk, data: bytes, *, base: bytes | None = None, base_digest: str = ""
) -> bytes:
    """The frame of chunk number `index`. `data` must be the chunk; `base` must be the bytes named by `base_digest`."""
    if len(data) != chunk.size_bytes or sha256(data) != chunk.digest:
        raise IntegrityError(f"chunk {index} does not hash to {chunk.digest[:12]}", remedy="publish the model again")
    codec, body = encode_chunk(data, chunk.element_bytes, base)
    return _frame(manifest_digest, index, chunk, codec, body, base_digest if codec.needs_base else None)


def decode_frame(frame: ChunkFrame, find_base: FindChunk, *, chunk: Chunk | None = None) -> bytes:
    """Return the chunk's bytes, verified.

    With `chunk` (from the signed manifest, at `frame.index`) the whole digest and the length are checked; without it
    only the 16 bytes of digest that the frame states. Raises `NotFoundError` when the base is not held and
    `IntegrityError` when the bytes are not what they claim.
    """
    if chunk is not None and (chunk.size_bytes != frame.raw_size_bytes or not _names(frame, chunk.digest)):
        raise IntegrityError(f"chunk {frame.index} is not the one in the manifest", remedy="it will be asked for again")
    if not 0 < frame.raw_size_bytes <= MAX_CHUNK_BYTES:
        raise InvalidInputError(f"chunk claims {frame.raw_size_bytes} bytes", remedy=f"1 to {MAX_CHUNK_BYTES}")
    data = _decode_body(frame, find_base)
    digest = sha256(data)
    if not _names(frame, digest) or (chunk is not None and digest != chunk.digest):
        raise IntegrityError(f"chunk {frame.index} decodes to other bytes", remedy="it will be asked for again")
    return data


def delta_name(base_manifest_digest: str) -> str:
    """The name of the encoding that builds on the artefact with this manifest."""
    return f"delta-{base_manifest_digest[:16]}"


def plan_delta(base: Manifest, manifest: Manifest) -> list[DeltaStep]:
    """Pair every chunk of `manifest` with the chunk of `base` it is best built from.

    First by digest, wherever it stands. Then by place: in the file of the same path, chunks of equal length and
    element width counted from the start, and from the end where the middle grew or shrank.
    """
    held = {chunk.digest for chunk in base.chunk_list()}
    base_files = {file.path: file.chunks for file in base.files}
    pairs: list[Chunk | None] = []
    for file in manifest.files:
        pairs += _pair_by_place(base_files.get(file.path, []), file.chunks)
    steps = zip(manifest.chunk_list(), pairs, strict=True)
    return [
        DeltaStep(index, chunk, chunk.digest if chunk.digest in held else pair.digest if pair else None)
        for index, (chunk, pair) in enumerate(steps)
    ]


def delta_frames(base: Manifest, manifest: Manifest, read_chunk: ReadChunk) -> Iterator[bytes]:
    """The frames of the delta in chunk order, one at a time: memory stays at two chunks."""
    name = manifest.digest
    for step in plan_delta(base, manifest):
        if step.is_reuse:
            yield _frame(name, step.index, step.chunk, Codec.REUSE, b"", step.chunk.digest)
            continue
        old = read_chunk(step.base_digest) if step.base_digest else None
        data = read_chunk(step.chunk.digest)
        yield encode_frame(name, step.index, step.chunk, data, base=old, base_digest=step.base_digest or "")


def build_delta(base: Manifest, manifest: Manifest, read_chunk: ReadChunk, put_blob: PutBlob) -> DeltaEncoding:
    """Encode `manifest` against `base`, store each frame and the index of their digests, and describe the result."""
    digests, wire_bytes = [], 0
    for frame in delta_frames(base, manifest, read_chunk):
        digests.append(put_blob(frame))
        wire_bytes += len(frame)
    index = put_blob(canonical_bytes(digests))
    base_digest = base.digest
    return DeltaEncoding(name=delta_name(base_digest), base_manifest=base_digest, index=index, wire_bytes=wire_bytes)


def whole_frames(manifest: Manifest, read_chunk: ReadChunk) -> Iterator[bytes]:
    """The frames of the encoding `whole` in chunk order, one at a time."""
    name = manifest.digest
    for index, chunk in enumerate(manifest.chunk_list()):
        yield encode_frame(name, index, chunk, read_chunk(chunk.digest))


def _pair_by_place(old: list[Chunk], new: list[Chunk]) -> list[Chunk | None]:
    pairs: list[Chunk | None] = [None] * len(new)
    shorter = min(len(old), len(new))
    for place in range(shorter):
        if _same_shape(old[place], new[place]):
            pairs[place] = old[place]
        elif len(old) != len(new):
            break
    if len(old) == len(new):
        return pairs
    for place in range(1, shorter + 1):
        if pairs[-place] is not None or not _same_shape(old[-place], new[-place]):
            break
        pairs[-place] = old[-place]
    return pairs


def _same_shape(old: Chunk, new: Chunk) -> bool:
    return old.size_bytes == new.size_bytes and old.element_bytes == new.element_bytes


def _frame(name: str, index: int, chunk: Chunk, codec: Codec, body: bytes, base_digest: str | None) -> bytes:
    return ChunkFrame(
        manifest_prefix=bytes.fromhex(name)[:8],
        index=index,
        raw_size_bytes=chunk.size_bytes,
        codec=codec,
        body=body,
        digest_prefix=bytes.fromhex(chunk.digest)[:16],
        base_digest=bytes.fromhex(base_digest) if base_digest else None,
    ).to_bytes()


def _check_chunk(data: bytes, element_bytes: int) -> None:
    if not 0 < len(data) <= MAX_CHUNK_BYTES:
        raise InvalidInputError(f"a chunk has {len(data)} bytes", remedy=f"1 to {MAX_CHUNK_BYTES}")
    if element_bytes not in _WHOLE_BY_WIDTH:
        raise InvalidInputError(f"element width {element_bytes} is unknown", remedy="1, 2 or 4 bytes")


def _names(frame: ChunkFrame, digest: str) -> bool:
    return frame.digest_prefix == bytes.fromhex(digest)[:16]


def _encode_whole(data: bytes, element_bytes: int) -> tuple[Codec, bytes]:
    body = _split(data, element_bytes) if element_bytes > 1 else _compress(data)
    if len(body) > (1 - MIN_SAVING) * len(data):
        return Codec.RAW, data
    return _WHOLE_BY_WIDTH[element_bytes], body


def _decode_body(frame: ChunkFrame, find_base: FindChunk) -> bytes:
    size = frame.raw_size_bytes
    if frame.codec is Codec.RAW:
        if len(frame.body) != size:
            raise IntegrityError(f"chunk {frame.index} has {len(frame.body)} of {size} bytes", remedy="ask again")
        return frame.body
    if frame.codec is Codec.ZSTD:
        return _decompress(frame.body, size)
    if not frame.codec.needs_base:
        return _join(frame.body, _WIDTH_BY_CODEC[frame.codec], size)
    base = _base(frame, find_base)
    if frame.codec is Codec.REUSE:
        return base
    return _xor(_join(frame.body, _WIDTH_BY_CODEC[frame.codec], size), base)


def _base(frame: ChunkFrame, find_base: FindChunk) -> bytes:
    digest = (frame.base_digest or b"").hex()
    base = find_base(digest)
    if base is None:
        raise NotFoundError(f"base chunk {digest[:12]} is not held", remedy="ask for the whole chunk")
    if len(base) != frame.raw_size_bytes:
        raise IntegrityError(f"base chunk {digest[:12]} has {len(base)} bytes", remedy="ask for the whole chunk")
    return base


def _split(data: bytes, element_bytes: int) -> bytes:
    whole = len(data) - len(data) % element_bytes
    elements = np.frombuffer(data, np.uint8, whole).reshape(-1, element_bytes)  # [num_elements, element_bytes]
    parts: list[bytes] = []
    for place in reversed(range(element_bytes)):
        plane = np.ascontiguousarray(elements[:, place]).tobytes()
        packed = _compress(plane)
        compressed = len(packed) <= (1 - MIN_SAVING) * len(plane)
        body = packed if compressed else plane
        parts += [(len(body) | (_COMPRESSED if compressed else 0)).to_bytes(4, "big"), body]
    return b"".join([*parts, data[whole:]])


def _join(body: bytes, element_bytes: int, size: int) -> bytes:
    num_elements, num_rest = divmod(size, element_bytes)
    elements: npt.NDArray[np.uint8] = np.empty((num_elements, element_bytes), np.uint8)
    offset = 0
    for place in reversed(range(element_bytes)):
        word = int.from_bytes(body[offset : offset + 4], "big")
        length = word & ~_COMPRESSED
        plane = body[offset + 4 : offset + 4 + length]
        offset += 4 + length
        plane = _decompress(plane, num_elements) if word & _COMPRESSED else plane
        if len(plane) != num_elements:
            raise IntegrityError(f"a byte plane has {len(plane)} of {num_elements} bytes", remedy="ask again")
        elements[:, place] = np.frombuffer(plane, np.uint8)
    if len(body) != offset + num_rest:
        raise IntegrityError(f"a split chunk has {len(body)} bytes, not {offset + num_rest}", remedy="ask again")
    return elements.tobytes() + body[offset:]


def _xor(one: bytes, other: bytes) -> bytes:
    return np.bitwise_xor(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)).tobytes()


def _compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(data)


def _decompress(data: bytes, size: int) -> bytes:
    """Exactly `size` bytes or an error: the frame must state that length before anything is allocated for it."""
    try:
        stated = zstandard.get_frame_parameters(data).content_size
        if stated != size:
            raise IntegrityError(f"compressed data states {stated} bytes, not {size}", remedy="ask again")
        plain = zstandard.ZstdDecompressor(max_window_size=1 << 20).decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"compressed data is damaged: {error}", remedy="ask again") from error
    if len(plain) != size:
        raise IntegrityError(f"compressed data has {len(plain)} bytes, not {size}", remedy="ask again")
    return plain
