"""An update on a stick: a real agent without any network installs it; whatever is wrong with it is refused by name."""

from __future__ import annotations

import gzip
import io
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.config import Home
from edge_agent.inbox import install
from model_registry.trust.bundle import Bundle, write_bundle
from model_registry.trust.clock import TrustedClock
from tests.fakes.agent_plane import DEVICE, TENANT, AgentProcess, Plane
from wire.errors import ForeshoreError, InvalidInputError
from wire.messages import DesiredModel

PROFILE = "name: test\ntargets: [cpu-x86]\nmemory_budget_bytes: 100000000\nreconnect_max_s: 0.5\nfetch_stall_s: 1\n"


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    plane = Plane(tmp_path_factory.mktemp("plane"))
    yield plane
    plane.close()


@pytest.fixture(scope="module")
def enrolled(plane: Plane, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a device that was never started."""
    folder = tmp_path_factory.mktemp("enrolled")
    (folder / "profile.yaml").write_text(PROFILE)
    AgentProcess(folder / "home").enrol(plane.url, str(folder / "profile.yaml"))
    return folder / "home"


@pytest.fixture
def agent(enrolled: Path, tmp_path: Path) -> Iterator[AgentProcess]:
    """A copy of that device."""
    shutil.copytree(enrolled, tmp_path / "home")
    agent = AgentProcess(tmp_path / "home")
    yield agent
    agent.stop()


def files_of(
    plane: Plane, model: DesiredModel, key: Ed25519PrivateKey | None = None, **wish: object
) -> dict[str, bytes]:
    """What `foreshore bundle create` writes, from the plane's own memory."""
    plane.wish(model, key=key, **wish)
    repository = plane.trust.counter.repository
    names = ["timestamp.json", *(f"{number}.root.json" for number in range(1, len(repository.roots) + 1))]
    names += [f"{version}.{role}.json" for role in ("snapshot", "targets", "tests") for version in range(1, 200)]
    found = {f"metadata/{name}": data for name in names if (data := repository.file(name)) is not None}
    manifest = plane.manifests[model.manifest]
    found[f"assignments/{TENANT}.{DEVICE}"] = plane.assignment
    found[f"releases/{model.release}"] = plane.releases[model.release]
    found[f"manifests/{model.manifest}"] = manifest.to_bytes()
    return found | {f"chunks/{chunk.digest}": plane.chunks[chunk.digest] for chunk in manifest.chunk_list()}


@pytest.mark.parametrize("name", ["update.tar", "update"])
def test_a_device_that_never_sees_a_network_installs_from_a_stick(
    plane: Plane, agent: AgentProcess, tmp_path: Path, name: str
) -> None:
    write_bundle(tmp_path / name, files_of(plane, plane.publish(4.0, f"4.0.{len(name)}")).items())
    identity = agent.home / "identity.json"
    for address in (plane.url, f'"port": {plane.broker.port}'):
        dead = "http://127.0.0.1:9" if address is plane.url else '"port": 9'
        identity.write_text(identity.read_text().replace(address, dead))
    command = [sys.executable, "-m", "edge_agent.cli", "install", str(tmp_path / name), "--home", str(agent.home)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 0, said.stderr
    shutil.rmtree(tmp_path / name) if name == "update" else (tmp_path / name).unlink()  # the stick is pulled out
    agent.start()
    until = time.monotonic() + 60
    while (agent.home / "inbox").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert agent.scale() == 4.0


def test_a_stale_bundle_is_refused(plane: Plane, agent: AgentProcess, tmp_path: Path) -> None:
    write_bundle(tmp_path / "old.tar", files_of(plane, plane.publish(4.1, "4.1.0")).items())
    late = TrustedClock(lambda: datetime.now(UTC) + timedelta(days=8))
    refused(agent, tmp_path / "old.tar", "frozen_metadata", late)


def test_a_bundle_older_than_what_the_device_has_seen_is_refused(
    plane: Plane, agent: AgentProcess, tmp_path: Path
) -> None:
    write_bundle(tmp_path / "old.tar", files_of(plane, plane.publish(4.2, "4.2.0")).items())
    write_bundle(tmp_path / "new.tar", files_of(plane, plane.publish(4.3, "4.3.0")).items())
    install(Home(agent.home), tmp_path / "new.tar")
    bundle = Bundle.open(tmp_path / "new.tar")
    shutil.copy(tmp_path / "home" / "inbox" / "metadata" / "timestamp.json", agent.home / "trust" / "timestamp.json")
    bundle.close()
    refused(agent, tmp_path / "old.tar", "rolled_back_metadata")


def test_another_devices_bundle_is_refused(plane: Plane, agent: AgentProcess, tmp_path: Path) -> None:
    files = files_of(plane, plane.publish(4.4, "4.4.0"), device_id="edge-2")
    write_bundle(tmp_path / "b.tar", files.items())
    refused(agent, tmp_path / "b.tar", "refused")
    assignment = files.pop(f"assignments/{TENANT}.{DEVICE}")
    write_bundle(tmp_path / "c.tar", [*files.items(), (f"assignments/{TENANT}.edge-2", assignment)])
    refused(agent, tmp_path / "c.tar", "not_found")


def test_a_bundle_by_stolen_online_keys_is_refused(plane: Plane, agent: AgentProcess, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b.tar", files_of(plane, plane.publish(4.5, "4.5.0", is_listed=False)).items())
    refused(agent, tmp_path / "b.tar", "release_not_listed")
    files = files_of(plane, plane.publish(4.6, "4.6.0"), Ed25519PrivateKey.generate())
    write_bundle(tmp_path / "c.tar", files.items())
    refused(agent, tmp_path / "c.tar", "bad_signature")


@pytest.mark.parametrize("kind", ["releases", "manifests", "chunks", "metadata/timestamp"])
@pytest.mark.parametrize("damage", ["missing", "changed", "longer"])
def test_a_bundle_with_a_damaged_part_is_refused(
    plane: Plane, agent: AgentProcess, tmp_path: Path, kind: str, damage: str
) -> None:
    files = files_of(plane, plane.publish(4.7, f"4.7.{len(plane.releases)}"))
    name = next(name for name in files if name.startswith(kind))
    data = files.pop(name)
    if damage != "missing":
        files[name] = data + b" " * (20_000 if "metadata" in kind else 1) if damage == "longer" else b"~" + data[1:]
    write_bundle(tmp_path / "b.tar", files.items())
    refused(agent, tmp_path / "b.tar", None)


def test_a_tar_is_read_and_never_unpacked(tmp_path: Path) -> None:
    """Links, devices, escaping names and compression are no part of a bundle."""
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w:") as tar:
        for name, kind in (("metadata/timestamp.json", tarfile.SYMTYPE), ("chunks/" + "a" * 64, tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for name in ("../../escape", "/etc/escape", "metadata/../../x.json", "metadata/x.json/y"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    bundle = Bundle.open(path)
    assert bundle.names("metadata") == []
    assert bundle.fetch("timestamp.json", 1 << 20) is None
    assert bundle.fetch("../../escape", 1 << 20) is None
    assert bundle.find("chunks", "a" * 64, 100) is None
    bundle.close()
    (tmp_path / "bomb.tar").write_bytes(gzip.compress(bytes(1 << 24)))
    with pytest.raises(InvalidInputError):
        Bundle.open(tmp_path / "bomb.tar")
    (tmp_path / "huge.tar").write_bytes(b"metadata/timestamp.json".ljust(100, b"\0") + b"7" * 400)
    with pytest.raises(InvalidInputError):
        Bundle.open(tmp_path / "huge.tar")


def refused(agent: AgentProcess, path: Path, code: str | None, clock: TrustedClock | None = None) -> None:
    """The bundle is refused and leaves no trace in the device's home."""
    home = Home(agent.home)
    before = {file.name: file.read_bytes() for file in home.trust.iterdir()}
    held = home.inbox.exists()
    with pytest.raises(ForeshoreError) as error:
        install(home, path, clock)
    assert code is None or error.value.code == code
    assert {file.name: file.read_bytes() for file in home.trust.iterdir()} == before
    assert home.inbox.exists() == held
