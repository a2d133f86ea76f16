"""Requests at a steady rate against a real agent while it switches between versions, over and over.

An open loop: a request starts when its time has come, whether or not the one before has been answered, so a stall shows
in full. Every answer is held against the version its header names.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.fakes.agent_plane import AgentProcess, Plane

PROFILE = """
name: test
targets: [cpu-x86]
memory_budget_bytes: 500000000
fetch_stall_s: 2
"""
RATE_PER_S = 50
TIMEOUT_S = 10.0
UPDATE_S = 60.0
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1.0, 1.0, 1.0, 1.0]}]}


@dataclass
class Figures:
    """What the applications saw."""

    num_switches: int = 0
    failed: int = 0
    wrong_version: int = 0
    quiet_s: list[float] = field(default_factory=list)  # latencies without switches
    busy_s: list[float] = field(default_factory=list)  # latencies while versions change
    findings: list[str] = field(default_factory=list)


class SwapRun:
    """One device, two versions."""

    def __init__(self, folder: Path) -> None:
        self.figures = Figures()
        self._plane = Plane(folder / "plane")
        profile = folder / "profile.yaml"
        profile.write_text(PROFILE)
        self._agent = AgentProcess(folder / "home")
        self._agent.enrol(self._plane.url, str(profile))
        self._agent.start()
        self._scales = {"2.0.0": 2.0, "3.0.0": 3.0}
        self._wishes = [self._plane.publish(scale, version) for version, scale in self._scales.items()]

    def close(self) -> None:
        self._agent.stop()
        self._plane.close()

    def run(self, num_switches: int, quiet_s: float) -> Figures:
        """First without switches, for the measure; then with."""
        self._switch()
        asyncio.run(self._load(num_switches, quiet_s))
        return self.figures

    def _switch(self) -> None:
        wanted = self._wishes[self.figures.num_switches % 2]
        self._plane.wish(wanted)
        ended = self._plane.await_model(lambda m: m.get("result") is not None, UPDATE_S)
        if ended["result"] != "succeeded" or ended["active_version"] != wanted.version:
            self.figures.findings.append(f"the switch did not succeed: {ended}")
        else:
            self.figures.num_switches += 1

    async def _load(self, num_switches: int, quiet_s: float) -> None:
        limits = httpx.Limits(max_connections=100, max_keepalive_connections=100)
        async with httpx.AsyncClient(base_url=self._agent.url, timeout=TIMEOUT_S, limits=limits) as client:
            await self._ask_until(client, asyncio.create_task(asyncio.sleep(quiet_s)), self.figures.quiet_s)

            async def switch_all() -> None:
                for _ in range(num_switches):
                    await asyncio.to_thread(self._switch)

            await self._ask_until(client, asyncio.create_task(switch_all()), self.figures.busy_s)

    async def _ask_until(self, client: httpx.AsyncClient, ended: asyncio.Task[None], into: list[float]) -> None:
        begun, number = time.monotonic(), 0
        async with asyncio.TaskGroup() as tasks:
            while not ended.done():
                number += 1
                tasks.create_task(self._ask(client, into))
                await asyncio.sleep(max(0.0, begun + number / RATE_PER_S - time.monotonic()))
        await ended

    async def _ask(self, client: httpx.AsyncClient, into: list[float]) -> None:
        begun = time.monotonic()
        try:
            answer = await client.post("/v2/models/tiny/infer", json=BODY)
        except httpx.HTTPError as error:
            self.figures.failed += 1
            self.figures.findings.append(f"{type(error).__name__}: {error}")
            return
        into.append(time.monotonic() - begun)
        if answer.status_code != 200:
            self.figures.failed += 1
            self.figures.findings.append(answer.text[:300])
        elif answer.json()["outputs"][0]["data"][0] != self._scales[answer.headers["x-foreshore-model-version"]]:
            self.figures.wrong_version += 1
