"""The TUF client: brings a folder of trusted metadata up to date from a source and finds what is listed.

Each file is kept the moment it is accepted and never before (replaced durably), so a break at any point leaves older or
newer trusted metadata. The folder holds `root.json`, `timestamp.json`, `snapshot.json`, `targets.json` and one file per
delegated role seen. Safe for several threads; one process per folder.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp

from model_registry.trust.clock import TrustedClock
from model_registry.trust.errors import (
    ExpiredError,
    FrozenError,
    MetadataUnavailableError,
    NotListedError,
    SupersededError,
    TrustError,
)
from model_registry.trust.source import MetadataSource, NoSource, read_limited
from model_registry.trust.trusted import TrustedSet, read_metadata
from wire.errors import NotFoundError
from wire.process import replace_durably

MAX_ROOT_BYTES = 512 << 10
MAX_TIMESTAMP_BYTES = 16 << 10
MAX_SNAPSHOT_BYTES = 2 << 20
MAX_TARGETS_BYTES = 5 << 20
MAX_ROOTS = 256
MAX_ROLES = 32
MAX_STARTS = 3


class TrustClient:
    """One folder of trusted metadata and where its news come from."""

    def __init__(self, folder: Path, source: MetadataSource, clock: TrustedClock) -> None:
        self._folder = folder
        self._source = source
        self._clock = clock
        self._lock = threading.RLock()
        self._view: TrustedSet | None = None

    @staticmethod
    def initialise(folder: Path, root: bytes) -> None:
        """Trust `root` from now on; what was trusted before is forgotten."""
        for path in folder.glob("*.json"):
            path.unlink()
        replace_durably(folder / "root.json", root)

    @property
    def root_file(self) -> Path:
        """The newest trusted root."""
        return self._folder / "root.json"

    @property
    def view(self) -> TrustedSet:
        """What is trusted, as of the last refresh that succeeded or else as of what is on disk; may have expired since.

        Raises a `TrustError` when the disk holds no complete, valid set.
        """
        with self._lock:
            if self._view is None:
                try:
                    self._view = self._load(NoSource())
                except FrozenError as error:  # nobody served it: it is merely old
                    raise ExpiredError(error.message, remedy="reach the control plane or give a bundle") from error
            return self._view

    @property
    def now(self) -> datetime:
        """The time that expiry is judged by; needs a root and nothing more."""
        with self._lock:
            return (self._view or self._seen()).now

    @property
    def news_id(self) -> tuple[int, int]:
        """Versions of root and timestamp that are trusted: different after news."""
        with self._lock:
            seen = self._view or self._seen()
            return seen.root.version, seen.timestamp.version if seen.timestamp else 0

    def refresh(self, source: MetadataSource | None = None) -> TrustedSet:
        """Follow the source (or another one, this once) to its newest state."""
        with self._lock:
            for attempt in range(MAX_STARTS):
                try:
                    self._view = self._load(source or self._source, asks_for_news=True)
                    break
                except SupersededError:
                    if attempt == MAX_STARTS - 1:
                        raise
            return self.view

    def find_target(self, path: str, source: MetadataSource | None = None) -> TargetFile | None:
        """What the most trusted role says about `path`; None when no role lists it. Everything on the way is fresh."""
        with self._lock:
            return self._walk(self.view, path, source or self._source)

    def get_target(self, path: str, source: MetadataSource | None = None) -> TargetFile:
        """As `find_target`; `NotListedError` when no role lists it."""
        found = self.find_target(path, source)
        if found is None:
            raise NotListedError(f"no publisher lists {path}", remedy="have it signed: foreshore publish")
        return found

    def load_role(self, role: str) -> Metadata[Targets]:
        """The verified, fresh metadata of a role that targets delegates to."""
        with self._lock:
            if role not in roles_of(self.view.targets):
                raise NotListedError(f"targets delegates to no {role!r}", remedy="foreshore keys list")
            self._update_targets(self.view, self._source, role, Targets.type)
            return read_metadata(Targets, self.read_local(role))

    def fetch_role(self, role: str) -> Metadata[Targets]:
        """The newest genuine metadata of a delegated role even if it has expired: for its owner, who will renew it."""
        with self._lock:
            meta = self.view.listed(role)
            data = self._get(self.view, self._source, role, meta.version, meta.length, MAX_TARGETS_BYTES)
            return self.view.verified_targets(data, role, Targets.type)

    def read_local(self, role: str) -> bytes:
        """The bytes of a role as they were accepted."""
        data = self._local(role, MAX_TARGETS_BYTES)
        if data is None:
            raise NotFoundError(f"{role} was never accepted here", remedy="refresh first")
        return data

    def _load(self, source: MetadataSource, *, asks_for_news: bool = False) -> TrustedSet:
        trusted = self._open()
        if asks_for_news:
            self._update_root(trusted, source)
        self._update_timestamp(trusted, source if asks_for_news else None)
        self._update_snapshot(trusted, source)
        self._update_targets(trusted, source, Targets.type, Root.type)
        return trusted

    def _seen(self) -> TrustedSet:
        """Root and timestamp as they are on disk, expired or not."""
        trusted = self._open()
        self._update_timestamp(trusted, None)
        return trusted

    def _open(self) -> TrustedSet:
        root = self._local(Root.type, MAX_ROOT_BYTES)
        if root is None:
            raise NotFoundError(f"{self._folder} holds no root of trust", remedy="enrol, or initialise with a root")
        return TrustedSet(root, self._clock)

    def _update_root(self, trusted: TrustedSet, source: MetadataSource) -> None:
        for _ in range(MAX_ROOTS):
            data = source.fetch(f"{trusted.root.version + 1}.root.json", MAX_ROOT_BYTES)
            if data is None:
                return
            trusted.update_root(data)
            self._keep(Root.type, data)

    def _update_timestamp(self, trusted: TrustedSet, source: MetadataSource | None) -> None:
        local = self._local(Timestamp.type, MAX_TIMESTAMP_BYTES)
        if local is not None:
            self._try_local(lambda: trusted.update_timestamp(local))
        if source is None:
            return
        data = source.fetch("timestamp.json", MAX_TIMESTAMP_BYTES)
        if data is None:
            raise MetadataUnavailableError("there is no timestamp.json", remedy="foreshore keys init")
        is_new = trusted.update_timestamp(data)
        trusted.require_timestamp()
        if is_new:
            self._keep(Timestamp.type, data)

    def _update_snapshot(self, trusted: TrustedSet, source: MetadataSource) -> None:
        local = self._local(Snapshot.type, MAX_SNAPSHOT_BYTES)
        if local is not None and self._try_local(lambda: trusted.update_snapshot(local, is_local=True)):
            return
        meta = trusted.require_timestamp().snapshot_meta
        data = self._get(trusted, source, Snapshot.type, meta.version, meta.length, MAX_SNAPSHOT_BYTES)
        trusted.update_snapshot(data)
        self._keep(Snapshot.type, data)

    def _update_targets(self, trusted: TrustedSet, source: MetadataSource, role: str, above: str) -> Targets:
        known = trusted.find(role, above)
        if known is not None:
            trusted.require_fresh((role, above))
            return known
        local = self._local(role, MAX_TARGETS_BYTES)
        if local is not None and self._try_local(lambda: trusted.update_targets(local, role, above)):
            return self._update_targets(trusted, source, role, above)
        meta = trusted.listed(role)
        data = self._get(trusted, source, role, meta.version, meta.length, MAX_TARGETS_BYTES)
        accepted = trusted.update_targets(data, role, above)
        self._keep(role, data)
        return accepted

    def _walk(self, trusted: TrustedSet, path: str, source: MetadataSource) -> TargetFile | None:
        """Pre-order, as the specification's 5.6.7 has it: the order of delegations is the order of trust."""
        todo, seen = [(Targets.type, Root.type)], set[str]()
        while todo and len(seen) <= MAX_ROLES:
            role, above = todo.pop()
            if role in seen:
                continue
            targets = self._update_targets(trusted, source, role, above)
            if path in targets.targets:
                trusted.require_fresh((role, above))
                return targets.targets[path]
            seen.add(role)
            below: list[tuple[str, str]] = []
            for name, is_terminating in targets.delegations.get_roles_for_target(path) if targets.delegations else ():
                below.append((name, role))
                if is_terminating:
                    todo = []
                    break
            todo += reversed(below)
        return None

    def _get(
        self, trusted: TrustedSet, source: MetadataSource, role: str, version: int, length: int | None, limit: int
    ) -> bytes:
        name = f"{quote(role, '')}.json"
        data = source.fetch(
            f"{version}.{name}" if trusted.root.consistent_snapshot else name, min(length or limit, limit)
        )
        if data is None:
            raise SupersededError(f"version {version} of {role} is not served", remedy="try again")
        return data

    @staticmethod
    def _try_local(use: Callable[[], object]) -> bool:
        try:
            use()
        except TrustError:
            return False
        return True

    def _local(self, role: str, max_bytes: int) -> bytes | None:
        path = self._folder / f"{quote(role, '')}.json"
        return read_limited(path, max_bytes) if path.is_file() else None

    def _keep(self, role: str, data: bytes) -> None:
        replace_durably(self._folder / f"{quote(role, '')}.json", data)


def roles_of(targets: Targets) -> list[str]:
    """Names of the roles that `targets` delegates to."""
    return list(targets.delegations.roles or ()) if targets.delegations else []
