"""The chunk frame: one chunk of an artefact as it travels by MQTT, by HTTP and on disk.

Layout, big endian, 76 bytes of header, then the body:

    offset size
      0     4   magic "FSC1" (the last byte is the version)
      4     8   first bytes of the manifest's digest
     12     4   chunk index in the manifest
     16     4   length of the chunk, uncompressed
     20     1   codec
     21     3   zero
     24    32   SHA-256 of the base chunk (zero unless the codec is a delta)
     56    16   first bytes of the chunk's own SHA-256
     72     4   CRC-32 of header (with this field zero) and body

The CRC guards against broken transport, not against people: trust comes from the digest in the signed manifest.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

from wire.errors import IntegrityError, InvalidInputError, TooLargeError, UnknownVersionError

MAGIC = b"FSC1"
HEADER = struct.Struct(">4s8sIIB3s32s16sI")
MAX_CHUNK_BYTES = 256 * 1024
MAX_BODY_BYTES = MAX_CHUNK_BYTES + 1024
_NO_BASE = bytes(32)


class Codec(IntEnum):
    """How the body encodes the chunk."""

    RAW = 0
    ZSTD = 1
    SPLIT2_ZSTD = 2  # 16-bit elements as two byte planes, high plane compressed
    SPLIT4_ZSTD = 3  # 32-bit elements as four byte planes
    XOR_SPLIT1_ZSTD = 4  # XOR with the base chunk, bytes, compressed
    XOR_SPLIT2_ZSTD = 5
    XOR_SPLIT4_ZSTD = 6
    REUSE = 7  # the base chunk is the chunk; empty body

    @property
    def needs_base(self) -> bool:
        """Whether the body can only be decoded with the base chunk at hand."""
        return self >= Codec.XOR_SPLIT1_ZSTD


@dataclass(frozen=True)
class ChunkFrame:
    """One encoded chunk. `manifest_prefix` has 8 bytes, `digest_prefix` 16, `base_digest` 32 (or is None)."""

    manifest_prefix: bytes
    index: int
    raw_size_bytes: int
    codec: Codec
    body: bytes
    digest_prefix: bytes
    base_digest: bytes | None = None

    def to_bytes(self) -> bytes:
        """The frame as it travels."""
        checksum = zlib.crc32(self.body, zlib.crc32(self._header(0)))
        return self._header(checksum) + self.body

    def _header(self, checksum: int) -> bytes:
        return HEADER.pack(
            MAGIC,
            self.manifest_prefix,
            self.index,
            self.raw_size_bytes,
            self.codec,
            b"\0\0\0",
            self.base_digest or _NO_BASE,
            self.digest_prefix,
            checksum,
        )


def parse_frame(data: bytes, *, max_chunk_bytes: int = MAX_CHUNK_BYTES) -> ChunkFrame:
    """Read a frame. Refuses oversize before looking inside, unknown versions and codecs, and a wrong checksum."""
    if len(data) > HEADER.size + MAX_BODY_BYTES:
        raise TooLargeError(f"chunk frame has {len(data)} bytes", remedy=f"at most {HEADER.size + MAX_BODY_BYTES}")
    if len(data) < HEADER.size:
        raise InvalidInputError(f"chunk frame has {len(data)} bytes", remedy=f"the header alone has {HEADER.size}")
    magic, manifest, index, raw_size, codec, _, base, digest, checksum = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise UnknownVersionError(f"chunk frame starts with {magic!r}", remedy=f"this build reads {MAGIC!r}")
    if raw_size > max_chunk_bytes:
        raise TooLargeError(f"chunk claims {raw_size} bytes", remedy=f"at most {max_chunk_bytes} are accepted")
    try:
        known = Codec(codec)
    except ValueError as error:
        raise UnknownVersionError(f"chunk codec {codec} is unknown", remedy="update this agent") from error
    frame = ChunkFrame(
        manifest, index, raw_size, known, data[HEADER.size :], digest, base if known.needs_base else None
    )
    if zlib.crc32(frame.body, zlib.crc32(data[: HEADER.size - 4] + bytes(4))) != checksum:
        raise IntegrityError(f"chunk {index} arrived damaged", remedy="it will be asked for again")
    return frame
