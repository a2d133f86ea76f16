"""Borders between tenants and the end of a device's access, on a real control plane and broker.

`crossings` counts pairs of caller and another's topic or address where something came through; `losses` what should
have and did not. `revoke_*_s` is the longest time from the DELETE of a device to its live MQTT connection being cut and
to its kept-alive HTTPS connection being refused, over `revoked` devices.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.harness import Goal
from tests.fakes.access_fuzz import fuzz_api, fuzz_topics
from tests.fakes.control import ControlProcess, FakeDevice, wait_until
from tests.fakes.control_app import control_app

GOALS = (
    Goal("pairs", 10_000, ">="),
    Goal("crossings", 0, "<="),
    Goal("losses", 0, "<="),
    Goal("revoke_mqtt_s", 60, "<="),
    Goal("revoke_https_s", 60, "<="),
)
SEED = 20261124


def run(quick: bool) -> dict[str, float]:
    """Measure."""
    with tempfile.TemporaryDirectory() as folder:
        control = ControlProcess(Path(folder) / "control")
        control.start()
        try:
            topics = fuzz_topics(control, 1000 if quick else 8000, SEED)
            figures = _revoke(control, 2 if quick else 10)
        finally:
            control.stop()
        with control_app(Path(folder) / "app") as app:
            api = fuzz_api(app, 200 if quick else 2000, SEED)
    return {
        "pairs": topics.num_pairs + api.num_pairs,
        "topic_pairs": topics.num_pairs,
        "api_pairs": api.num_pairs,
        "crossings": len(topics.crossings) + len(api.crossings),
        "losses": len(topics.losses),
        **figures,
    }


def _revoke(control: ControlProcess, count: int) -> dict[str, float]:
    mqtt_s, https_s = [], []
    for number in range(count):
        device, cut = FakeDevice(control, f"revoked-{number}"), list[float]()
        device.connect()
        device.client.on_disconnect = lambda *_, cut=cut: cut.append(time.monotonic())
        with httpx.Client(base_url=f"{control.device_url}/api/v1", verify=device.tls) as client:
            assert client.get("/device/desired").status_code != 401
            began = time.monotonic()
            control.ok("DELETE", f"/devices/{device.device_id}")
            wait_until(lambda client=client: client.get("/device/desired").status_code == 401, "refused", 90)
            https_s.append(time.monotonic() - began)
        wait_until(lambda cut=cut: cut, "cut", 90)
        mqtt_s.append(cut[0] - began)
        device.close()
    return {"revoked": count, "revoke_mqtt_s": max(mqtt_s), "revoke_https_s": max(https_s)}
