"""A tenant's whole trust in memory: offline keys at a desk, online keys at a counter, the files that clients fetch."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from model_registry.trust import roles
from model_registry.trust.clock import machine_time
from model_registry.trust.desk import SigningDesk
from model_registry.trust.keys import encode_public_key, tuf_key
from model_registry.trust.repository import Repository
from model_registry.trust.roles import Listed

PUBLISHER = "tests"


class MemoryCounter:
    """The control plane's side: holds the repository and the online keys."""

    def __init__(self, now: Callable[[], datetime] = machine_time) -> None:
        self.now = now
        self.repository = Repository()
        self.online = {role: [Ed25519PrivateKey.generate()] for role in roles.ONLINE_ROLES}

    def get_trust(self) -> dict[str, Any]:
        pending = [
            {
                "role": one.role, "version": one.version, "num_signatures": one.num_signatures,
                "threshold": one.threshold, "key_ids": list(one.key_ids),
                "metadata": base64.b64encode(one.data).decode(),
            }
            for one in self.repository.waiting()
        ]  # fmt: skip
        keys = {role: encode_public_key(found[-1].public_key()) for role, found in self.online.items()}
        return {"roles": [], "pending": pending, "online_keys": keys}

    def submit_metadata(self, role: str, metadata: bytes) -> dict[str, Any]:
        self.repository = self.repository.submit(role, metadata, self.now())
        self.renew()
        return self.get_trust()

    def find_metadata(self, name: str, max_bytes: int) -> bytes | None:
        data = self.repository.file(name)
        assert data is None or len(data) <= max_bytes
        return data

    def renew(self) -> None:
        """What the clock's turn does."""
        self.repository = self.repository.sealed(self.find_key, self.now())

    def find_key(self, role: str, key_ids: list[str]) -> Ed25519PrivateKey:
        return next(key for key in self.online[role] if tuf_key(key.public_key()).keyid in key_ids)

    def director(self) -> Ed25519PrivateKey:
        keys, _ = roles.delegated_keys(self.repository.targets, roles.DIRECTOR)
        return self.find_key(roles.DIRECTOR, [key.keyid for key in keys])


class MemoryTrust:
    """A counter with a desk before it: root, targets and the publisher `tests` are set up."""

    def __init__(
        self, folder: Path, now: Callable[[], datetime] = machine_time, counter: MemoryCounter | None = None
    ) -> None:
        self.root, self.targets, self.publisher = (Ed25519PrivateKey.generate() for _ in range(3))
        self.counter = counter or MemoryCounter(now)
        self.desk = SigningDesk(self.counter, folder, [self.root, self.targets, self.publisher], now)
        self.desk.initialise([self.root.public_key()], [self.targets.public_key()])
        self.desk.add_publisher(PUBLISHER, [self.publisher.public_key()])

    def list_release(self, release: Listed) -> None:
        """Sign and hand in, as `foreshore publish` does."""
        self.counter.submit_metadata(*self.desk.list_release(release))

    def fetch(self, name: str, max_bytes: int) -> bytes | None:
        """The counter as a metadata source."""
        return self.counter.find_metadata(name, max_bytes)

    def enrolment(self) -> dict[str, str]:
        """What enrolment hands out."""
        root = base64.b64encode(self.counter.repository.roots[-1]).decode()
        return {"root": root, "time": self.counter.now().isoformat()}
