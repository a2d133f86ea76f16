"""Where a person signs: private keys at hand, a verified view of the repository, and a way to hand documents in.

Nothing that the control plane says is signed unseen: every next version is made from the version that this side's own
TUF client verified, so a lying control plane can neither slip in an entry nor bring back a withdrawn one.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from tuf.api.metadata import Metadata, Root, Targets

from model_registry.trust import roles
from model_registry.trust.client import MAX_ROOT_BYTES, TrustClient
from model_registry.trust.clock import TrustedClock, machine_time
from model_registry.trust.errors import ExpiredError, FrozenError, MalformedError, NotListedError
from model_registry.trust.keys import decode_public_key, tuf_key
from model_registry.trust.roles import Listed
from model_registry.trust.trusted import TrustedSet, read_metadata
from wire.errors import ConflictError, SignatureError


class Counter(Protocol):
    """The control plane's side of the desk; `model_registry.client.ControlClient` is one."""

    def get_trust(self) -> dict[str, Any]:
        """Roles, what is pending, the newest online keys."""

    def submit_metadata(self, role: str, metadata: bytes) -> dict[str, Any]:
        """Hand in a signed document."""

    def find_metadata(self, name: str, max_bytes: int) -> bytes | None:
        """A file of the repository."""


@dataclass(frozen=True)
class CounterSource:
    """The counter's files as a metadata source."""

    counter: Counter

    def fetch(self, name: str, max_bytes: int) -> bytes | None:
        """Fetch one."""
        return self.counter.find_metadata(name, max_bytes)


@dataclass(frozen=True)
class Waiting:
    """A document that waits for signatures, and what it would change."""

    role: str
    version: int
    num_signatures: int
    threshold: int
    changes: tuple[str, ...]
    key_ids: tuple[str, ...]  # that may sign it
    metadata: Metadata[Any]


class SigningDesk:
    """Signs with the keys at hand. `folder` keeps the root that is trusted and what was verified last.

    A folder without a root trusts the first one that the control plane shows; `first_root_keys` then names that root's
    keys, for a person to compare.
    """

    def __init__(
        self,
        counter: Counter,
        folder: Path,
        keys: Sequence[Ed25519PrivateKey],
        now: Callable[[], datetime] = machine_time,
    ) -> None:
        self._counter = counter
        self._folder = folder
        self._keys = tuple(keys)
        self._now = now
        self.first_root_keys: str | None = None
        self._client = TrustClient(folder, CounterSource(counter), TrustedClock(now))

    # setting up

    def initialise(
        self,
        root: Sequence[Ed25519PublicKey],
        targets: Sequence[Ed25519PublicKey],
        *,
        root_threshold: int = 1,
        targets_threshold: int = 1,
    ) -> None:
        """Make the first root and targets, hand them in and trust them here."""
        online = self._online_keys()
        now = self._now()
        first = roles.first_root(
            root=root, targets=targets, snapshot=online["snapshot"], timestamp=online["timestamp"], now=now,
            root_threshold=root_threshold, targets_threshold=targets_threshold,
        )  # fmt: skip
        document = self._signed(first, [tuf_key(key).keyid for key in root])
        self._counter.submit_metadata(Root.type, document)
        made = roles.first_targets(online[roles.DIRECTOR], now)
        self._hand_in(Targets.type, made, [tuf_key(key).keyid for key in targets])
        if root_threshold == 1:
            TrustClient.initialise(self._folder, document)

    # changing

    def add_publisher(
        self, name: str, keys: Sequence[Ed25519PublicKey], *, threshold: int = 1, models: Sequence[str] = ("*",)
    ) -> None:
        """Let `name` list releases of `models`. With its private keys at hand, its first list is handed in as well."""
        view = self._refreshed()
        targets = self._targets()
        now = self._now()
        made = roles.with_delegation(targets, name, keys, now, threshold=threshold, models=models)
        self._hand_in(Targets.type, made, view.root.roles[Targets.type].keyids)
        self._renew_publisher(name, view, [tuf_key(key).keyid for key in keys])

    def rotate(self, role: str, keys: Sequence[Ed25519PublicKey], *, threshold: int = 1) -> None:
        """Give a role exactly these keys; documents that the new keys must sign again are handed in too."""
        view = self._refreshed()
        ids = [tuf_key(key).keyid for key in keys]
        if role in roles.TOP_ROLES:
            root = read_metadata(Root, self._client.root_file.read_bytes())
            made = roles.with_top_keys(root, role, keys, self._now(), threshold=threshold)
            also = ids if role == Root.type else []
            self._hand_in(Root.type, made, [*view.root.roles[Root.type].keyids, *also])
            if role == Targets.type:
                self._hand_in(role, roles.renewed(self._targets(), self._now()), ids)
            return
        roles.delegated_keys(view.targets, role)
        targets = self._targets()
        made_targets = roles.with_delegation(targets, role, keys, self._now(), threshold=threshold)
        if role != roles.DIRECTOR and targets.signed.delegations and targets.signed.delegations.roles:
            assert made_targets.signed.delegations is not None
            assert made_targets.signed.delegations.roles is not None
            made_targets.signed.delegations.roles[role].paths = targets.signed.delegations.roles[role].paths
        self._hand_in(Targets.type, made_targets, view.root.roles[Targets.type].keyids)
        if role != roles.DIRECTOR:
            self._renew_publisher(role, view, ids)

    def renew(self, role: str) -> None:
        """The same content with a new expiry; what has expired already is renewed as it was last verified here."""
        with contextlib.suppress(ExpiredError, FrozenError):
            self._refreshed()
        root, now = read_metadata(Root, self._client.root_file.read_bytes()), self._now()
        if role == Root.type:
            self._hand_in(role, roles.renewed(root, now), root.signed.roles[role].keyids)
        elif role == Targets.type:
            self._hand_in(role, roles.renewed(self._targets(), now), root.signed.roles[role].keyids)
        else:
            keys, _ = roles.delegated_keys(self._targets().signed, role)
            self._hand_in(role, roles.renewed(self._client.fetch_role(role), now), [key.keyid for key in keys])

    def list_release(self, release: Listed) -> tuple[str, bytes]:
        """The next list of the publisher whose key this is, with one document more: role and signed bytes."""
        view = self._refreshed()
        role = self._own_role(view.targets, release.name, release.digest)
        held = self._client.load_role(role)
        made = roles.with_release(held, release, self._now())
        keys, _ = roles.delegated_keys(view.targets, role)
        return role, self._signed(made, [key.keyid for key in keys])

    def withdraw(self, name: str, digest: str) -> str:
        """Hand in the publisher's next list without this release; devices install it no longer. Returns the role."""
        view = self._refreshed()
        role = self._own_role(view.targets, name, digest)
        made = roles.without_release(self._client.load_role(role), roles.release_path(name, digest), self._now())
        keys, _ = roles.delegated_keys(view.targets, role)
        self._hand_in(role, made, [key.keyid for key in keys])
        return role

    # signing what others made

    def waiting(self) -> list[Waiting]:
        """Documents that lack signatures, with what they would change against what is trusted here."""
        view = self._refreshed() if self._client.root_file.exists() else None
        found = []
        for one in self._counter.get_trust()["pending"]:
            role, data = str(one["role"]), _decoded(one["metadata"])
            kind: type[Any] = Root if role == Root.type else Targets
            metadata = read_metadata(kind, data)
            changes = tuple(self._changes(role, metadata.signed, view))
            count, threshold = int(one["num_signatures"]), int(one["threshold"])
            ids = tuple(str(name) for name in one["key_ids"])
            found.append(Waiting(role, metadata.signed.version, count, threshold, changes, ids, metadata))
        return found

    def may_sign(self, waiting: Waiting) -> bool:
        """Whether a key at hand may sign this and has not yet."""
        return bool((self._ids() & set(waiting.key_ids)) - set(waiting.metadata.signatures))

    def sign(self, waiting: Waiting) -> None:
        """Add this desk's signatures to a document and hand it in."""
        self._counter.submit_metadata(waiting.role, self._signed(waiting.metadata, waiting.key_ids))

    def begin_lists(self) -> list[str]:
        """Hand in the lists that pending targets asks of this desk's keys: a first one, or one signed by a new key."""
        pending = next((one for one in self.waiting() if one.role == Targets.type), None)
        begun = []
        for name in roles.publishers(pending.metadata.signed) if pending else ():
            assert pending is not None
            keys, _ = roles.delegated_keys(pending.metadata.signed, name)
            ids = [key.keyid for key in keys]
            if self._ids() & set(ids):
                self._renew_publisher(name, self._refreshed(), ids)
                begun.append(name)
        return begun

    def _renew_publisher(self, name: str, view: TrustedSet, ids: Sequence[str]) -> None:
        if not self._ids() & set(ids):
            return
        is_known = name in roles.publishers(view.targets)
        made = roles.renewed(self._client.load_role(name), self._now()) if is_known else None
        self._hand_in(name, made or roles.first_publisher(self._now()), ids)

    def _refreshed(self) -> TrustedSet:
        if not self._client.root_file.exists():
            self._trust_first_root()
        return self._client.refresh()

    def _trust_first_root(self) -> None:
        data = self._counter.find_metadata("1.root.json", MAX_ROOT_BYTES)
        if data is None:
            raise ConflictError("this tenant has no root of trust", remedy="foreshore keys init")
        TrustClient.initialise(self._folder, data)
        self.first_root_keys = ", ".join(sorted(read_metadata(Root, data).signed.roles[Root.type].keyids))

    def _targets(self) -> Metadata[Targets]:
        return read_metadata(Targets, self._client.read_local(Targets.type))

    def _own_role(self, targets: Targets, model: str, digest: str) -> str:
        path = roles.release_path(model, digest)
        assert targets.delegations is not None
        for role, _ in targets.delegations.get_roles_for_target(path):
            keys, _threshold = roles.delegated_keys(targets, role)
            if self._ids() & {key.keyid for key in keys}:
                return role
        raise SignatureError(
            f"no publisher that may list {model!r} has this key",
            remedy="an administrator adds it: foreshore keys add-publisher NAME --public-key KEY",
        )

    def _hand_in(self, role: str, metadata: Metadata[Any], ids: Sequence[str]) -> None:
        self._counter.submit_metadata(role, self._signed(metadata, ids))

    def _signed(self, metadata: Metadata[Any], ids: Sequence[str]) -> bytes:
        mine = [key for key in self._keys if tuf_key(key.public_key()).keyid in ids]
        if not mine:
            raise SignatureError("none of the keys at hand may sign this", remedy="give the right --key FILE")
        return roles.signed(metadata, *mine)

    def _ids(self) -> set[str]:
        return {tuf_key(key.public_key()).keyid for key in self._keys}

    def _online_keys(self) -> dict[str, Ed25519PublicKey]:
        keys = self._counter.get_trust()["online_keys"]
        return {role: decode_public_key(str(keys[role])) for role in roles.ONLINE_ROLES}

    def _changes(self, role: str, new: Any, view: TrustedSet | None) -> list[str]:
        if role == Root.type or view is None:
            return [f"keys of {name}: {', '.join(one.keyids)}" for name, one in getattr(new, "roles", {}).items()]
        try:
            old: Targets | None = self._client.load_role(role).signed if role != Targets.type else view.targets
        except (NotListedError, ConflictError):
            old = None
        changes = [f"+ {path}" for path in new.targets if old is None or path not in old.targets]
        changes += [f"- {path}" for path in (old.targets if old else ()) if path not in new.targets]
        if role == Targets.type and (old is None or new.delegations != old.delegations):
            for name in [*roles.publishers(new), roles.DIRECTOR]:
                keys, threshold = roles.delegated_keys(new, name)
                changes.append(f"{name}: {threshold} of {', '.join(key.keyid for key in keys)}")
        return changes or [f"expires {new.expires:%Y-%m-%d}"]


def _decoded(text: object) -> bytes:
    try:
        return base64.b64decode(str(text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedError("a pending document is not base64", remedy="ask again") from error
