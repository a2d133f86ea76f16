"""A person with nothing but the pages and one command for the device: enrol, roll out, see a bad canary, go back.

All of it is real: the control plane as a process, its Mosquitto, an agent process with ONNX Runtime.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import sign_in
from tests.fakes.agent_plane import AgentProcess, golden_bytes, tiny_model
from tests.fakes.control import ControlProcess
from tests.fakes.simulated_device import SimulatedDevice

pytestmark = pytest.mark.browser

SHOWN_MS = 40_000
PROFILE = (
    "name: test\ntargets: [cpu-x86]\nmemory_budget_bytes: 100000000\nreconnect_max_s: 0.5\nfetch_stall_s: 2\n"
    "healthy_after_s: 0.2\n"
)


@pytest.fixture
def control(tmp_path: Path) -> Iterator[ControlProcess]:
    control = ControlProcess(tmp_path / "control")
    control.start()
    yield control
    assert control.stop() == 0


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    folder = tmp_path / "device"
    folder.mkdir()
    agent = AgentProcess(folder / "home")
    yield agent
    agent.stop()


@pytest.fixture
def bystander(control: ControlProcess, tmp_path: Path) -> Iterator[SimulatedDevice]:
    """A device of the second wave."""
    device = SimulatedDevice(control.url, control.token(), "dock-2", tmp_path / "bystander")
    device.start()
    yield device
    device.stop()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 390, "height": 800})  # the whole story on a phone
    yield context.new_page()
    context.close()


def follow(page: Page, name: str) -> None:
    page.get_by_role("navigation").get_by_role("link", name=name, exact=True).click()


def start_rollout(page: Page, release: str) -> None:
    follow(page, "Rollouts")
    page.get_by_role("link", name="New rollout").click()
    page.get_by_label("Release", exact=True).select_option(label=release)
    page.get_by_label("Waves", exact=True).fill("1, 100%")
    page.get_by_label("Time-out, seconds").fill("60")
    page.get_by_role("button", name="Start rollout").click()
    expect(page.locator("h1")).to_contain_text(release)


def test_a_person_enrols_a_device_sees_a_bad_canary_halt_a_rollout_and_rolls_back(
    page: Page, control: ControlProcess, agent: AgentProcess, bystander: SimulatedDevice, tmp_path: Path
) -> None:
    control.publish("tiny", tiny_model(2.0), "1.0.0", golden=golden_bytes(2.0))
    control.publish("tiny", tiny_model(3.0), "2.0.0", golden=golden_bytes(2.0))  # its answers are not those promised
    profile = tmp_path / "profile.yaml"
    profile.write_text(PROFILE)
    sign_in(page, control.url, control.token())

    follow(page, "Enrol")
    page.get_by_label("Device name").fill("a-canary")
    page.keyboard.press("Enter")
    expect(page.locator("svg.qr")).to_be_visible()
    words = shlex.split(page.locator(".command code").inner_text())
    assert words.pop(0) == "foreshore-agent"
    command = [sys.executable, "-m", "edge_agent.cli", *words, "--home", str(agent.home), "--profile", str(profile)]
    subprocess.run(command, check=True, timeout=60)
    agent.start()
    follow(page, "Devices")
    expect(page.locator("#device-a-canary")).to_contain_text("online", timeout=SHOWN_MS)

    start_rollout(page, "tiny 1.0.0")
    expect(page.locator("#rollout-state")).to_contain_text("succeeded", timeout=SHOWN_MS)
    assert agent.scale() == 2.0

    start_rollout(page, "tiny 2.0.0")
    expect(page.locator("#rollout-state")).to_contain_text("halted", timeout=SHOWN_MS)
    expect(page.locator("#why")).to_contain_text("a-canary: inaccurate")
    expect(page.locator("#slot-a-canary")).to_contain_text("failed")
    expect(page.locator("#slot-dock-2")).to_contain_text("skipped")
    rollout_url = page.url
    page.get_by_role("link", name="Read the decision").click()
    expect(page.locator("main")).to_contain_text("Halted in wave 1 of 2")
    page.go_back()

    page.locator("#confirm-rollback summary").click()
    page.get_by_label("Why (for the audit log)").fill("the canary was bad")
    page.get_by_role("button", name="Roll back now").click()
    expect(page.locator("#rollout-state")).to_contain_text("rolled back", timeout=SHOWN_MS)
    assert page.url == rollout_url
    assert agent.scale() == 2.0

    follow(page, "Audit")
    expect(page.locator("#log")).to_contain_text("the canary was bad")
    page.get_by_role("link", name="Verify the chain").click()
    expect(page.locator("#verdict")).to_contain_text("whole")
