"""A hostile broker, a hostile control plane and stolen online keys against one real agent that serves all the while.

Whatever is tried, the device says by which code it refused, no file of the attack lies in its store, and the model that
was installed honestly keeps answering. Once the truth is served again the device goes on without a hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.metadata import Metadata

from model_registry.manifest import Manifest
from model_registry.trust import roles
from tests.fakes.agent_plane import AgentProcess, Plane
from wire.messages import DesiredModel


class Scene:
    """The agent runs version 1 of the model."""

    def __init__(self, folder: Path) -> None:
        self.plane = Plane(folder / "plane")
        profile = folder / "profile.yaml"
        profile.write_text(
            "name: test\ntargets: [cpu-x86]\nmemory_budget_bytes: 100000000\nreconnect_max_s: 0.5\nfetch_stall_s: 1\n"
            "healthy_after_s: 0.2\n"
        )
        self.agent = AgentProcess(folder / "home")
        self.agent.enrol(self.plane.url, str(profile))
        self.agent.start()
        self.honest = self.plane.publish(2.0, "1.0.0")
        self.plane.wish(self.honest)
        self.plane.await_model(lambda m: m["phase"] == "committed")
        self.before = self.artefacts()

    def close(self) -> None:
        self.agent.stop()
        self.plane.close()

    def refused(self) -> str:
        """The code by which the device refuses the last wish's model."""
        found = self.plane.await_model(lambda m: m.get("result") == "rejected")
        assert found["active_manifest"] == self.honest.manifest
        self.check_unharmed()
        return str(found["reason"]).partition(":")[0]

    def complained(self, code: str) -> None:
        """Wait until the device reports this error."""
        self.plane.await_report(lambda report: str(report.get("error")).startswith(f"{code}:"))
        self.check_unharmed()

    def check_unharmed(self) -> None:
        assert self.artefacts() <= self.before
        assert list((self.agent.home / "store" / "partial").iterdir()) == []
        assert self.agent.scale() == 2.0

    def artefacts(self) -> set[str]:
        return {path.name for path in (self.agent.home / "store" / "artefacts").iterdir()}

    def make_up(self) -> None:
        """Back to the honest wish, with the honest metadata."""
        self.plane.lies.clear()
        self.plane.wish(self.honest)
        self.plane.await_model(lambda m: m["phase"] == "committed" and m["wanted_manifest"] == self.honest.manifest)
        self.plane.await_report(lambda report: report.get("error") is None)
        self.before = self.artefacts()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    scene = Scene(tmp_path_factory.mktemp("attacks"))
    yield scene
    scene.close()


@pytest.fixture(autouse=True)
def peace(scene: Scene) -> Iterator[None]:
    yield
    scene.make_up()


def test_stolen_online_keys_install_nothing(scene: Scene) -> None:
    scene.plane.wish(scene.plane.publish(6.0, "6.6.6", is_listed=False))
    assert scene.refused() == "release_not_listed"


def test_a_wish_by_a_stranger_is_refused(scene: Scene) -> None:
    scene.plane.wish(scene.plane.publish(6.0, "6.6.7"), key=Ed25519PrivateKey.generate())
    scene.complained("bad_signature")


def test_another_devices_wish_is_refused(scene: Scene) -> None:
    scene.plane.wish(scene.plane.publish(6.0, "6.6.8"), device_id="edge-2")
    scene.complained("refused")


def test_an_old_wish_is_refused(scene: Scene) -> None:
    scene.plane.wish(scene.plane.publish(6.0, "6.6.9"), generation=1)
    scene.complained("refused")


def test_an_expired_wish_installs_nothing(scene: Scene) -> None:
    scene.plane.wish(scene.plane.publish(6.0, "6.7.0"), expires_at=datetime(2026, 11, 2, tzinfo=UTC))
    assert scene.refused() == "expired_wish"


def test_a_manifest_of_another_release_is_refused(scene: Scene) -> None:
    one, other = scene.plane.publish(6.0, "6.7.1"), scene.plane.publish(7.0, "6.7.2")
    scene.plane.wish(one.model_copy(update={"manifest": other.manifest}))
    assert scene.refused() == "integrity"


def bad_manifest(scene: Scene, version: str, **changes: Any) -> DesiredModel:
    """A listed release over a manifest that no honest tool would write."""
    model = scene.plane.publish(6.0, f"{version}-source", is_listed=False)
    honest = scene.plane.manifests[model.manifest]
    file = honest.files[0].model_copy(update=changes)
    bad: Manifest = honest.model_copy(update={"files": [file, *honest.files[1:]], "entry": file.path})
    return scene.plane._released(bad, version)


@pytest.mark.parametrize("path", ["../../../evil.onnx", "/tmp/evil.onnx", "a\\..\\evil.onnx"])
def test_a_path_that_leaves_the_store_is_refused_even_if_a_publisher_signed_it(scene: Scene, path: str) -> None:
    scene.plane.wish(bad_manifest(scene, f"7.{len(path)}.0", path=path))
    assert scene.refused() == "invalid_input"
    assert not list(scene.agent.home.parent.rglob("evil*"))


def test_a_manifest_longer_than_signed_is_refused(scene: Scene) -> None:
    model = scene.plane.publish(6.0, "7.1.1")
    honest = scene.plane.manifests[model.manifest]
    scene.plane.manifests[model.manifest] = honest.model_copy(update={"tools": {"padding": "x" * 100_000}})
    scene.plane.wish(model)
    assert scene.refused() in {"too_large", "integrity"}


def test_a_release_other_than_listed_is_refused(scene: Scene) -> None:
    model, other = scene.plane.publish(6.0, "7.1.2"), scene.plane.publish(7.0, "7.1.3")
    scene.plane.releases[model.release] = scene.plane.releases[other.release]
    scene.plane.wish(model)
    assert scene.refused() in {"too_large", "integrity"}


@pytest.mark.parametrize("attack", ["forged", "malformed", "oversized"])
def test_false_metadata_blocks_the_install_until_the_truth_is_served_again(scene: Scene, attack: str) -> None:
    model = scene.plane.publish(3.0, f"8.0.{len(attack)}")
    metadata = Metadata.from_bytes(scene.plane.trust.counter.repository.online["timestamp"])
    metadata.signatures.clear()
    metadata.signed.version += 1
    scene.plane.lies["timestamp.json"] = {
        "forged": roles.signed(metadata, Ed25519PrivateKey.generate()),
        "malformed": b"{" * 10_000,
        "oversized": b" " * 20_000,
    }[attack]
    scene.plane.wish(model)
    assert scene.refused() == f"{attack}_metadata"
    scene.plane.lies.clear()
    scene.plane.await_model(lambda m: m["phase"] == "committed" and m["active_manifest"] == model.manifest)
    assert scene.agent.scale() == 3.0


def test_metadata_that_is_older_than_what_was_seen_blocks_the_install(scene: Scene) -> None:
    old = scene.plane.trust.counter.repository.online["timestamp"]
    scene.plane.wish(scene.plane.publish(6.0, "9.0.0").model_copy(update={"manifest": "f" * 64}))
    assert scene.refused() == "integrity"  # by now the device has seen newer metadata
    scene.plane.lies["timestamp.json"] = old
    scene.plane.wish(scene.plane.publish(6.0, "9.0.1"))
    assert scene.refused() == "rolled_back_metadata"
