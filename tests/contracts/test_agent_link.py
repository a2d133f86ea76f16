"""The device's MQTT connection under load, against a real Mosquitto with mutual TLS."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cloud.control.broker import client_context
from edge_agent.link import Connection, Endpoint
from tests.fakes.agent_plane import DEVICE, TENANT, Plane
from wire import topics

NUM_MESSAGES = 3000
HELLO = b"hello"
MAX_AHEAD = 500


def test_speaking_while_listening_breaks_no_record(tmp_path: Path) -> None:
    """OpenSSL does not stand a write beside a read on one connection: broken records, then a damaged heap."""
    plane = Plane(tmp_path / "plane")
    try:
        heard, num_breaks = asyncio.run(_flood(plane, tmp_path))
    finally:
        plane.close()
    assert heard >= NUM_MESSAGES
    assert num_breaks == 0
    log = (plane.folder / "mosquitto" / "mosquitto.log").read_text().splitlines()
    # one that leaves without a goodbye, as in the end, is no broken record
    assert [line for line in log if "OpenSSL Error" in line and "unexpected eof" not in line] == []


async def _flood(plane: Plane, folder: Path) -> tuple[int, int]:
    """Both sides speak at once: the messages that were heard and how often the connection broke."""
    ca_file = folder / "ca.pem"
    ca_file.write_text(plane.authority.ca_pem)
    certificate, key = plane.authority.ensure_client(topics.mqtt_user(TENANT, DEVICE))
    endpoint = Endpoint("127.0.0.1", plane.broker.port, client_context(ca_file, certificate, key))
    heard, states, is_done, is_subscribed = [0], list[bool](), asyncio.Event(), asyncio.Event()

    def receive(_topic: str, payload: bytes, acknowledge: object) -> None:
        assert callable(acknowledge)
        acknowledge()
        is_subscribed.set()
        heard[0] += payload != HELLO
        if heard[0] >= NUM_MESSAGES:
            is_done.set()

    connection = Connection(
        endpoint,
        "flood",
        receive=receive,
        connected=states.append,
        persistent=False,
        receive_maximum=100,
        reconnect_max_s=0.1,
    )
    told = topics.device(TENANT, DEVICE, "cmd/told")
    connection.subscribe(told)
    connection.start()
    async with asyncio.timeout(120):
        while not is_subscribed.is_set():  # connected is not yet subscribed, and what is told before is for nobody
            plane.tell(told, HELLO)
            await asyncio.sleep(0.05)
        for number in range(NUM_MESSAGES):
            plane.tell(told, b"x" * 300)
            connection.publish(topics.device(TENANT, DEVICE, "status"), b"x" * 300)
            if number % 20 == 0:
                await asyncio.sleep(0)
            while number - heard[0] > MAX_AHEAD:  # noqa: ASYNC110 - the broker keeps a thousand for us, drops more
                await asyncio.sleep(0.001)
        await is_done.wait()
    num_breaks = states.count(False)
    await connection.close()
    return heard[0], num_breaks
