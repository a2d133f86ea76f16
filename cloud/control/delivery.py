"""Content to devices over MQTT: needs in, a union of them out, each chunk once, paced by the slowest healthy receiver.

A need opens (or joins) the stream of one encoding of one artefact; after `GATHER_S` the union of what members miss is
sent on the shared topic. A chunk that only one of several members misses goes to that one alone. A need without
`missing` only reports credit; what was sent to a member in the last `REPEAT_S` is not sent to it again.
A member more than `MAX_AHEAD`
chunks behind holds the stream up; one that says nothing for `HEALTHY_S` no longer does. Memory: one chunk at a time.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from cloud.control.database import Database
from model_registry import catalogue
from model_registry.blobs import BlobStore
from model_registry.encodings import encode_frame
from model_registry.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest, sha256
from wire import topics
from wire.errors import ForeshoreError, InvalidInputError, NotFoundError, UnavailableError
from wire.frames import MAX_BODY_BYTES, MAX_CHUNK_BYTES, ChunkFrame, Codec
from wire.messages import Need

GATHER_S = 0.3
REPEAT_S = 3.0
HEALTHY_S = 5.0
FORGET_S = 60.0
MAX_AHEAD = 64
BATCH = 8
PAGE_BYTES = 64 * 1024
MAX_STREAMS = 1000
MAX_CONTENTS = 8

log = logging.getLogger(__name__)

SendBulk = Callable[[str, bytes], None]
"""Topic, payload; waits for room, raises `UnavailableError`."""


@dataclass
class Member:
    """One device that takes part in a stream. `credit` is how many more chunks it may be sent."""

    missing: set[int]
    received: int
    heard_at: float
    num_sent: int = 0

    def lag(self, received_at_join: int) -> int:
        """Chunks sent to it that it has not counted yet."""
        return self.num_sent - max(self.received - received_at_join, 0)


@dataclass
class Stream:
    """Who misses what of one encoding of one artefact. Pure: the caller brings the time and sends."""

    num_chunks: int
    opened_at: float
    members: dict[str, Member] = field(default_factory=dict)
    joined_with: dict[str, int] = field(default_factory=dict)
    sent_at: dict[int, float] = field(default_factory=dict)

    def hear(self, device_id: str, missing: set[int], received: int, now: float) -> None:
        """A device says what it lacks and how many chunks it got; an empty `missing` only reports credit."""
        member = self.members.get(device_id)
        if member is None or received < member.received:
            if missing:
                self.members[device_id] = Member(missing, received, now)
                self.joined_with[device_id] = received
            return
        member.received, member.heard_at = received, now
        if missing:  # it asks again: what was sent just now may still arrive, anything older is lost
            member.missing = {index for index in missing if not self._is_fresh(index, now)}
            member.num_sent, self.joined_with[device_id] = 0, received

    def is_blocked(self, now: float) -> bool:
        """Whether a healthy member is too far behind."""
        return any(
            member.lag(self.joined_with[name]) >= MAX_AHEAD
            for name, member in self.members.items()
            if now - member.heard_at < HEALTHY_S
        )

    def next_batch(self, now: float) -> list[tuple[int, str | None]]:
        """Chunk indexes to send now, each with the device it goes to alone (None: to all). Marks them as sent."""
        if now - self.opened_at < GATHER_S or self.is_blocked(now):
            return []
        wanted: dict[int, list[str]] = {}
        for name, member in self.members.items():
            for index in member.missing:
                wanted.setdefault(index, []).append(name)
        batch: list[tuple[int, str | None]] = []
        for index in sorted(wanted)[:BATCH]:
            names = wanted[index]
            self.sent_at[index] = now
            for name in names:
                self.members[name].num_sent += 1
                self.members[name].missing.discard(index)
            batch.append((index, names[0] if len(names) == 1 and len(self.members) > 1 else None))
        return batch

    def is_idle(self, now: float) -> bool:
        """Whether nobody has spoken for long."""
        return all(now - member.heard_at > FORGET_S for member in self.members.values())

    def _is_fresh(self, index: int, now: float) -> bool:
        return now - self.sent_at.get(index, -1e9) < REPEAT_S


@dataclass(frozen=True)
class Content:
    """One artefact ready to be sent: its manifest and, per delta, the digests of the stored frames."""

    manifest: Manifest
    data: bytes
    frames_by_delta: dict[str, list[str]]


Key = tuple[str, str, str]  # tenant, manifest digest, encoding


class Delivery:
    """The streams, and the thread that sends."""

    def __init__(self, database: Database, blobs: BlobStore, send: SendBulk) -> None:
        self.bytes_sent = 0
        self.chunks_sent = 0
        self._database, self._blobs, self._send = database, blobs, send
        self._streams: dict[Key, Stream] = {}
        self._pages: dict[tuple[str, str], float] = {}
        self._contents: OrderedDict[tuple[str, str], Content] = OrderedDict()
        self._wake = threading.Condition()
        self._is_stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to send."""
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the sending thread."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(15.0)

    def hear_need(self, tenant: str, device_id: str, need: Need) -> None:
        """A device asks. Raises `NotFoundError` for content that no release of its tenant names."""
        content = self._content(tenant, need.manifest)
        now = time.monotonic()
        with self._wake:
            if need.manifest_wanted:
                self._pages.setdefault((tenant, need.manifest), now)
            key = (tenant, need.manifest, need.encoding)
            if need.encoding != "whole" and need.encoding not in content.frames_by_delta:
                raise NotFoundError(f"encoding {need.encoding!r} does not exist", remedy="ask for 'whole'")
            num_chunks = len(content.manifest.chunk_list())
            missing = _expand(need, num_chunks)
            if missing or key in self._streams:
                if key not in self._streams and len(self._streams) >= MAX_STREAMS:
                    raise UnavailableError("too many artefacts are asked for at once", remedy="ask again later")
                stream = self._streams.setdefault(key, Stream(num_chunks, now))
                stream.hear(device_id, missing, need.received, now)
            self._wake.notify_all()

    def _run(self) -> None:
        while True:
            with self._wake:
                if self._is_stopping:
                    return
                work = self._collect(time.monotonic())
                if not work:
                    self._wake.wait(0.05 if self._streams or self._pages else 1.0)
                    continue
            for key, batch in work:
                self._send_batch(key, batch)

    def _collect(self, now: float) -> list[tuple[Key, list[tuple[int, str | None]]]]:
        work: list[tuple[Key, list[tuple[int, str | None]]]] = []
        for (tenant, digest), asked_at in list(self._pages.items()):
            if now - asked_at >= GATHER_S:
                del self._pages[tenant, digest]
                work.append(((tenant, digest, ""), []))
        for key, stream in list(self._streams.items()):
            if stream.is_idle(now):
                del self._streams[key]
                continue
            if batch := stream.next_batch(now):
                work.append((key, batch))
        return work

    def _send_batch(self, key: Key, batch: list[tuple[int, str | None]]) -> None:
        tenant, digest, encoding = key
        try:
            content = self._content(tenant, digest)
            if not encoding:
                self._send_pages(tenant, digest, content)
            for index, device_id in batch:
                frame = self._frame(content, digest, encoding, index)
                shared = topics.chunks(tenant, digest, encoding)
                self._publish(shared if device_id is None else topics.device(tenant, device_id, "chunk"), frame)
                self.chunks_sent += 1
        except UnavailableError:
            with self._wake:  # devices ask again when the broker is back
                self._streams.pop(key, None)
        except ForeshoreError as error:
            log.warning("artefact %s cannot be sent: %s", digest[:12], error)
            with self._wake:
                self._streams.pop(key, None)

    def _send_pages(self, tenant: str, digest: str, content: Content) -> None:
        for number in range(len(content.data) // PAGE_BYTES + 1):  # the last page is shorter than a page, or empty
            page = content.data[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]
            frame = ChunkFrame(
                manifest_prefix=bytes.fromhex(digest)[:8],
                index=number,
                raw_size_bytes=len(page),
                codec=Codec.RAW,
                body=page,
                digest_prefix=bytes.fromhex(sha256(page))[:16],
            )
            self._publish(topics.manifest_page(tenant, digest), frame.to_bytes())

    def _publish(self, topic: str, payload: bytes) -> None:
        self._send(topic, payload)
        self.bytes_sent += len(payload)

    def _frame(self, content: Content, digest: str, encoding: str, index: int) -> bytes:
        if encoding != "whole":
            return self._blobs.get(content.frames_by_delta[encoding][index], max_bytes=MAX_BODY_BYTES + 1024)
        chunk = content.manifest.chunk_list()[index]
        return encode_frame(digest, index, chunk, self._blobs.get(chunk.digest, max_bytes=MAX_CHUNK_BYTES))

    def _content(self, tenant: str, digest: str) -> Content:
        with self._wake:
            known = self._contents.get((tenant, digest))
            if known is not None:
                self._contents.move_to_end((tenant, digest))
                return known
        with self._database.read() as session:
            artefact = catalogue.find_artefact(session, tenant, digest)
            if artefact is None:
                raise NotFoundError(f"no release names manifest {digest[:12]}", remedy="wait for a new desired state")
            deltas = catalogue.deltas_of(artefact)
        data = self._blobs.get(digest, max_bytes=MAX_MANIFEST_BYTES)
        manifest = parse_manifest(data, expected_digest=digest)
        frames = {
            delta.name: [str(one) for one in json.loads(self._blobs.get(delta.index, max_bytes=64 << 20))]
            for delta in deltas
        }
        content = Content(manifest, data, frames)
        with self._wake:
            self._contents[tenant, digest] = content
            while len(self._contents) > MAX_CONTENTS:
                self._contents.popitem(last=False)
        return content


def _expand(need: Need, num_chunks: int) -> set[int]:
    missing: set[int] = set()
    for first, count in need.missing:
        if first + count > num_chunks:
            raise InvalidInputError(
                f"chunks {first} to {first + count} were asked for, there are {num_chunks}", remedy="read the manifest"
            )
        missing.update(range(first, first + count))
    return missing
