"""The TUF client against every lie a repository can tell: what is refused, by which code, and what stays trusted."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from model_registry.manifest import Release, ReleaseArtefact
from model_registry.trust import errors, roles
from model_registry.trust.client import TrustClient
from model_registry.trust.clock import TrustedClock
from model_registry.trust.source import FolderSource, NoSource
from model_registry.trust.trusted import SIGNED_AT, TrustedSet, read_metadata
from tests.fakes.trust import MemoryTrust

NOW = datetime(2027, 3, 1, 12, tzinfo=UTC)


def release(version: str = "1.0.0", sequence: int = 1, name: str = "vision") -> Release:
    artefact = ReleaseArtefact(
        target="cpu-x86", manifest="a" * 64, manifest_bytes=10, size_bytes=20, runtime="onnxruntime", precision="int8"
    )
    return Release(
        tenant="acme", name=name, version=version, sequence=sequence, kind="tensor", source_format="onnx",
        source_digest="b" * 64, created_at="2026-01-01T00:00:00Z", artefacts=[artefact],
    )  # fmt: skip


class World:
    """A repository, a device's client and a time that both believe; `lies` are served instead of the truth."""

    def __init__(self, folder: Path) -> None:
        self.time = NOW
        self.trust = MemoryTrust(folder / "desk", lambda: self.time)
        self.lies: dict[str, bytes | errors.TrustError | errors.MetadataUnavailableError] = {}
        self.asked: list[str] = []
        self.folder = folder / "device"
        TrustClient.initialise(self.folder, self.trust.counter.repository.roots[0])
        self.client = self.reopened()

    def reopened(self) -> TrustClient:
        """The client as after a restart."""
        return TrustClient(self.folder, self, TrustedClock(lambda: self.time))

    def fetch(self, name: str, max_bytes: int) -> bytes | None:
        self.asked.append(name)
        lie = self.lies.get(name)
        if isinstance(lie, Exception):
            raise lie
        return lie if lie is not None else self.trust.fetch(name, max_bytes)

    def list_release(self, listed: Release) -> str:
        """Publish, and let the online keys follow."""
        self.trust.list_release(listed)
        return roles.release_path(listed.name, listed.digest)

    def files(self) -> dict[str, bytes]:
        """What the device has on disk."""
        return {path.name: path.read_bytes() for path in self.folder.glob("*.json")}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_listed_release_is_found_by_a_device_that_knows_only_the_first_root(world: World) -> None:
    path = world.list_release(release())
    world.client.refresh()
    assert world.client.get_target(path).hashes["sha256"] == release().digest


def test_what_no_publisher_lists_is_not_found(world: World) -> None:
    world.list_release(release())
    world.client.refresh()
    with pytest.raises(errors.NotListedError):
        world.client.get_target(roles.release_path("vision", "f" * 64))


def test_after_a_restart_without_network_what_was_accepted_is_still_trusted(world: World) -> None:
    path = world.list_release(release())
    world.client.refresh()
    world.client.get_target(path)
    again = TrustClient(world.folder, NoSource(), TrustedClock(lambda: world.time))
    assert again.get_target(path).length == len(release().to_bytes())


def look_for(client: TrustClient, wanted: Release) -> None:
    """What a device does before it installs."""
    client.refresh()
    client.get_target(roles.release_path(wanted.name, wanted.digest))


def _signed_by_a_stranger(world: World, kind: type, name: str) -> bytes:
    metadata = Metadata.from_bytes(world.trust.fetch(name, 1 << 20) or b"")
    metadata.signed.version += 1
    metadata.signatures.clear()
    return roles.signed(metadata, Ed25519PrivateKey.generate())


def _mixed_snapshot(world: World) -> bytes:
    """A genuine snapshot of another moment under the name of the one that the timestamp lists."""
    old = world.trust.counter.repository.online[Snapshot.type]
    world.list_release(release("1.1.0", 2))
    return old


def _current(world: World, role: str) -> str:
    version = Metadata.from_bytes(
        {**world.trust.counter.repository.online, **world.trust.counter.repository.current}[role]
    )
    return f"{version.signed.version}.{role}.json"


def forged_timestamp(world: World) -> None:
    world.lies["timestamp.json"] = _signed_by_a_stranger(world, Timestamp, "timestamp.json")


def forged_root(world: World) -> None:
    world.lies["2.root.json"] = _signed_by_a_stranger(world, Root, "1.root.json")


def forged_targets(world: World) -> None:
    world.list_release(release("1.1.0", 2))
    name = _current(world, "tests")
    world.lies[name] = _signed_by_a_stranger(world, Targets, name)


def rolled_back_timestamp(world: World) -> None:
    old = world.trust.counter.repository.online[Timestamp.type]
    world.list_release(release("1.1.0", 2))
    world.client.refresh()
    world.lies["timestamp.json"] = old


def rolled_back_publisher(world: World) -> None:
    """Stolen online keys make a newer snapshot of an older list."""
    repository = world.trust.counter.repository
    old = repository.current["tests"]
    world.list_release(release("1.1.0", 2))
    world.client.refresh()
    world.client.get_target(roles.release_path("vision", release("1.1.0", 2).digest))
    now = world.trust.counter.repository
    listed = [
        (role, Metadata.from_bytes(data).signed.version, data) for role, data in {**now.current, "tests": old}.items()
    ]
    snapshot = roles.signed(roles.make_snapshot(90, listed, world.time), world.trust.counter.online["snapshot"][0])
    timestamp = roles.make_timestamp(90, snapshot, 90, world.time)
    world.lies["90.snapshot.json"] = snapshot
    world.lies["timestamp.json"] = roles.signed(timestamp, world.trust.counter.online["timestamp"][0])


def frozen(world: World) -> None:
    world.lies["timestamp.json"] = world.trust.counter.repository.online[Timestamp.type]
    world.time += timedelta(days=8)


def mixed(world: World) -> None:
    lie = _mixed_snapshot(world)
    world.lies[_current(world, Snapshot.type)] = lie


def expired_offline_role(world: World) -> None:
    world.time += timedelta(days=400)
    world.trust.counter.renew()


def malformed(world: World) -> None:
    world.lies["timestamp.json"] = b'{"signed": [' + b"[" * 5000


def another_role(world: World) -> None:
    world.lies["timestamp.json"] = world.trust.counter.repository.online[Snapshot.type]


def gone(world: World) -> None:
    world.lies["timestamp.json"] = errors.MetadataUnavailableError("the network is down")


ATTACKS: list[tuple[Callable[[World], None], str]] = [
    (forged_timestamp, "forged_metadata"),
    (forged_root, "forged_metadata"),
    (forged_targets, "forged_metadata"),
    (rolled_back_timestamp, "rolled_back_metadata"),
    (rolled_back_publisher, "rolled_back_metadata"),
    (frozen, "frozen_metadata"),
    (mixed, "mixed_metadata"),
    (expired_offline_role, "expired_metadata"),
    (malformed, "malformed_metadata"),
    (another_role, "malformed_metadata"),
    (gone, "metadata_unavailable"),
]


@pytest.mark.parametrize(("attack", "code"), ATTACKS, ids=lambda one: getattr(one, "__name__", None))
def test_a_lie_is_refused_by_its_name_and_what_was_trusted_stays(
    world: World, attack: Callable[[World], None], code: str
) -> None:
    path = world.list_release(release())
    world.client.refresh()
    world.client.get_target(path)
    attack(world)
    kept = world.files()
    with pytest.raises((errors.TrustError, errors.MetadataUnavailableError)) as refused:
        look_for(world.client, release("1.1.0", 2))
    assert refused.value.code == code
    assert {name: data for name, data in world.files().items() if name in {"targets.json", "tests.json"}} == {
        name: data for name, data in kept.items() if name in {"targets.json", "tests.json"}
    }
    world.lies.clear()
    if attack is expired_offline_role:  # their owners sign them anew
        for role in ("root", "targets", "tests"):
            world.trust.desk.renew(role)
    elif attack is frozen:
        world.trust.counter.renew()
    if attack is rolled_back_publisher:  # stolen keys: their owner makes new ones
        for role in ("snapshot", "timestamp"):
            world.trust.counter.online[role].append(Ed25519PrivateKey.generate())
            world.trust.desk.rotate(role, [world.trust.counter.online[role][-1].public_key()])
    client = world.reopened()
    client.refresh()
    assert client.get_target(path).length == len(release().to_bytes())


def test_the_online_keys_alone_make_nothing_installable(world: World) -> None:
    """With snapshot, timestamp and director keys a thief lists releases in every role he can think of."""
    thief = world.trust.counter.online
    made = roles.with_release(roles.first_publisher(world.time), release("6.6.6", 9), world.time)
    made.signed.version = 9
    for role in ("tests", "director", "targets", "newcomer"):
        for key in (keys[0] for keys in thief.values()):
            data = roles.signed(Metadata(made.signed), key)
            current = {**world.trust.counter.repository.current, role: data}
            listed = [(name, Metadata.from_bytes(one).signed.version, one) for name, one in current.items()]
            snapshot = roles.signed(roles.make_snapshot(70, listed, world.time), thief["snapshot"][0])
            stamp = roles.signed(roles.make_timestamp(70, snapshot, 70, world.time), thief["timestamp"][0])
            world.lies = {f"9.{role}.json": data, "70.snapshot.json": snapshot, "timestamp.json": stamp}
            TrustClient.initialise(world.folder, world.trust.counter.repository.roots[0])
            client = world.reopened()
            with pytest.raises(errors.TrustError):
                look_for(client, release("6.6.6", 9))


def test_a_clock_of_1970_revives_nothing(world: World) -> None:
    """The newest accepted timestamp proves the time; an older clock counts for nothing."""
    path = world.list_release(release())
    world.time += timedelta(days=300)
    world.trust.counter.renew()
    world.client.refresh()
    world.time = datetime(1970, 1, 1, tzinfo=UTC)
    again = world.reopened()
    assert again.now == NOW + timedelta(days=300)
    assert again.get_target(path)
    world.time = NOW + timedelta(days=400)
    with pytest.raises(errors.ExpiredError):
        world.reopened().get_target(path)


def test_a_clock_ten_years_ahead_leaves_no_trace(world: World) -> None:
    path = world.list_release(release())
    world.client.refresh()
    world.client.get_target(path)
    ahead = world.time + timedelta(days=3650)
    wrong = TrustClient(world.folder, world, TrustedClock(lambda: ahead))
    with pytest.raises(errors.ExpiredError):
        wrong.refresh()
    with pytest.raises(errors.ExpiredError):
        wrong.get_target(path)
    assert world.reopened().get_target(path)


def test_a_stolen_timestamp_key_that_signs_the_far_future_is_undone_by_rotation(world: World) -> None:
    world.list_release(release())
    world.client.refresh()
    counter = world.trust.counter
    stamp = roles.make_timestamp(2**40, counter.repository.online["snapshot"], 4, world.time + timedelta(days=9000))
    stamp.signed.snapshot_meta.version = read_metadata(Snapshot, counter.repository.online["snapshot"]).signed.version
    world.lies["timestamp.json"] = roles.signed(stamp, counter.online["timestamp"][0])
    with pytest.raises(errors.TrustError):
        world.client.refresh()
    assert world.reopened().now > NOW
    world.lies.clear()
    counter.online["timestamp"].append(Ed25519PrivateKey.generate())
    world.trust.desk.rotate("timestamp", [counter.online["timestamp"][-1].public_key()])
    path = world.list_release(release("1.1.0", 2))
    client = world.reopened()
    client.refresh()
    assert client.get_target(path)
    assert client.now == NOW


@pytest.mark.parametrize("role", ["root", "targets", "tests", "director", "snapshot", "timestamp"])
def test_each_role_gets_new_keys_and_old_devices_follow(world: World, role: str) -> None:
    world.list_release(release())
    world.client.refresh()
    new = Ed25519PrivateKey.generate()
    desk = world.trust.desk
    if role in roles.ONLINE_ROLES:
        world.trust.counter.online[role].append(new)
    desk._keys = (*desk._keys, new)  # the owner holds both for the change
    desk.rotate(role, [new.public_key()])
    assert world.trust.counter.repository.waiting() == []
    path = world.list_release(release("1.1.0", 2))
    client = world.reopened()
    client.refresh()
    assert client.get_target(path)


def test_signed_at_counts_no_further_than_the_expiry(world: World) -> None:
    metadata = read_metadata(Timestamp, world.trust.counter.repository.online["timestamp"])
    metadata.signed.unrecognized_fields[SIGNED_AT] = "9999-01-01T00:00:00+00:00"
    clock = TrustedClock(lambda: world.time)
    trusted = TrustedSet(world.trust.counter.repository.roots[0], clock)
    metadata.signatures.clear()
    trusted.update_timestamp(roles.signed(metadata, world.trust.counter.online["timestamp"][0]))
    assert trusted.now == metadata.signed.expires


def test_a_folder_is_a_source_and_its_links_and_giants_are_not(tmp_path: Path) -> None:
    stick = tmp_path / "stick"
    stick.mkdir()
    (stick / "big.json").write_bytes(b"x" * 100)
    (stick / "link.json").symlink_to("/etc/hostname")
    source = FolderSource(stick)
    assert source.fetch("big.json", 100) == b"x" * 100
    with pytest.raises(errors.OversizedError):
        source.fetch("big.json", 99)
    for name in ("link.json", "absent.json", "../stick/big.json", "/etc/hostname", "."):
        assert source.fetch(name, 1 << 20) is None
