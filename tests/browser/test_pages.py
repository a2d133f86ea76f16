"""A person at the browser and the whole control plane: a click starts a rollout, the page shows it finish."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from cloud.control.app import create_app
from cloud.control.settings import Settings
from model_registry.client import connect
from model_registry.manifest import ArtefactFile, Chunk, Manifest, parse_release, sha256
from tests.browser.conftest import serving, sign_in
from tests.fakes.control import offline_desk
from tests.fakes.simulated_device import SimulatedDevice

pytestmark = pytest.mark.browser

SHOWN_MS = 20_000


@pytest.fixture
def plane_url(tmp_path: Path) -> Iterator[str]:
    """The real control plane with its own Mosquitto."""
    with serving(create_app(Settings(home=tmp_path / "home", tick_s=0.2))) as url:
        yield url


@pytest.fixture
def admin(plane_url: str, tmp_path: Path) -> str:
    """The token that the first start left in the home folder; the root of trust is established."""
    token = (tmp_path / "home" / "tokens" / "admin").read_text().strip()
    with connect(plane_url, token) as client:
        offline_desk(client, tmp_path)
    return token


@pytest.fixture
def device(plane_url: str, admin: str, tmp_path: Path) -> Iterator[SimulatedDevice]:
    """A device that waits in its fetch phase until the test lets it go on."""
    device = SimulatedDevice(plane_url, admin, "dock-camera-1", tmp_path / "device", hold=True)
    device.start()
    yield device
    device.stop()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh browser window."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield context.new_page()
    context.close()


def publish_tiny_model(url: str, admin: str, worker: str, folder: Path) -> None:
    """Publish, build and sign a model of a few bytes through the API, as publisher, worker and administrator."""
    data = b"a model of a few bytes"
    with connect(url, admin) as client, connect(url, worker) as builder:
        client.put_blob(data)
        source = {"format": "onnx", "files": [{"path": "m.onnx", "digest": sha256(data), "size_bytes": len(data)}]}
        body = {"name": "vision", "version": "1.0.0", "source": source, "targets": ["cpu-x86"]}
        publication = client.create_publication(body)
        lease = builder.lease_job("test-worker", ["compile"], ["cpu-x86"])
        assert lease is not None
        file = ArtefactFile(
            path="m.onnx", size_bytes=len(data), digest=sha256(data),
            chunks=[Chunk(digest=sha256(data), size_bytes=len(data))],
        )  # fmt: skip
        manifest = Manifest(
            name="vision", kind="tensor", target="cpu-x86", runtime="onnxruntime", precision="fp32", files=[file],
            entry="m.onnx", source_digest=lease.spec["source"]["digest"],
        )  # fmt: skip
        builder.complete_job(lease, builder.put_blob(manifest.to_bytes()))
        for settled in client.follow_publication(publication.publication_id):
            publication = settled
        assert publication.release is not None
        role, metadata = offline_desk(client, folder).list_release(parse_release(publication.release))
        assert client.sign_publication(publication.publication_id, role, metadata).state == "released"


def test_a_click_starts_a_rollout_and_the_page_shows_it_finish(
    page: Page, plane_url: str, admin: str, device: SimulatedDevice, tmp_path: Path
) -> None:
    worker = (tmp_path / "home" / "tokens" / "worker").read_text().strip()
    publish_tiny_model(plane_url, admin, worker, tmp_path)
    sign_in(page, plane_url, admin)
    expect(page.locator("#health")).to_contain_text("Online1")

    page.goto(plane_url + "/rollouts/new")
    page.click("#start-rollout")
    expect(page.locator("h1")).to_contain_text("vision 1.0.0")
    expect(page.locator("#rollout-state")).to_contain_text("running")
    expect(page.locator("#slot-dock-camera-1")).to_contain_text("fetch", timeout=SHOWN_MS)

    device.release()
    expect(page.locator("#rollout-state")).to_contain_text("succeeded", timeout=SHOWN_MS)
    expect(page.locator("#slot-dock-camera-1")).to_contain_text("succeeded")

    for path, text in (("/devices/dock-camera-1", "committed"), ("/models/vision", "cpu-x86"), ("/", "in sync")):
        page.goto(plane_url + path)
        expect(page.locator("main")).to_contain_text(text)


def test_without_anything_each_page_says_what_to_do_next(page: Page, plane_url: str, admin: str) -> None:
    sign_in(page, plane_url, admin)
    for path, text in (
        ("/devices", "foreshore enrolments create"), ("/models", "foreshore publish"),
        ("/rollouts/new", "Publish a model first"), ("/decisions", "No decision matches"),
    ):  # fmt: skip
        page.goto(plane_url + path)
        expect(page.locator("main")).to_contain_text(text)


def test_a_device_that_enrols_appears_without_a_reload(page: Page, plane_url: str, admin: str, tmp_path: Path) -> None:
    sign_in(page, plane_url, admin)
    expect(page.locator("#link-state")).to_have_text("Live")
    device = SimulatedDevice(plane_url, admin, "late-comer", tmp_path / "late")
    device.start()
    try:
        expect(page.locator("#devices")).to_contain_text("late-comer", timeout=SHOWN_MS)
    finally:
        device.stop()
