"""Renewing a certificate, killed at every step: the device always holds one that works, and the next start finishes."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cloud.control.identity import SYSTEM
from edge_agent.config import Home
from edge_agent.credentials import Credentials, FileKeys, store
from edge_agent.renewal import Renewal
from tests.fakes.control_app import ControlApp, control_app
from wire.errors import InvalidInputError

NUM_SEAMS = 8


class Killed(BaseException):
    """The process is gone."""


class Seams:
    """Everything a renewal reaches out for; dies at step `last`, once before and once after its effect."""

    def __init__(self, control: ControlApp, home: Home, last: int) -> None:
        self._control, self._home, self._left = control, home, last
        self._keys = FileKeys()

    def step(self) -> None:
        """One step nearer to the end."""
        self._left -= 1
        if self._left == 0:
            raise Killed

    def create(self) -> str:
        self.step()
        key = self._keys.create()
        self.step()
        return key

    def request(self, key_text: str) -> str:
        self.step()
        return self._keys.request(key_text)

    def public_bytes(self, key_text: str) -> bytes:
        return self._keys.public_bytes(key_text)

    def load(self, context: ssl.SSLContext, file: Path) -> None:
        self._keys.load(context, file)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.step()
        answer = self._control.device_client(serial_of(self._home)).post(f"/api/v1/{path}", json=body)
        assert answer.is_success, answer.text
        self.step()
        return dict(answer.json()) if answer.content else {}

    async def switched(self) -> None:
        self.step()

    def renewal(self) -> Renewal:
        """A fresh start of the process on the same home folder."""
        return Renewal(self._home, Credentials(self._home, self), self, self.post, self.switched)


def serial_of(home: Home) -> str:
    """The serial number of the certificate on disk, which must load."""
    return f"{Credentials(home, FileKeys()).certificate.serial_number:x}"


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlApp]:
    with control_app(tmp_path_factory.mktemp("control")) as app:
        yield app


@pytest.fixture
def home(control: ControlApp, tmp_path: Path) -> Home:
    home, keys = Home(tmp_path), FileKeys()
    key = keys.create()
    _, secret = control.plane.identity.create_enrolment(SYSTEM, device_id=f"dev-{tmp_path.name[-1]}-{id(home)}")
    _, issued, _ = control.plane.identity.enrol(secret, keys.request(key), {})
    home.ca_file.write_text(control.plane.authority.ca_pem)
    store(home.certificate_file, keys, key, issued.certificate_pem)
    return home


@pytest.mark.parametrize("last", range(1, NUM_SEAMS + 1))
def test_killed_at_any_step_the_device_has_a_working_identity_and_the_next_start_finishes(
    control: ControlApp, home: Home, last: int
) -> None:
    first = serial_of(home)
    with pytest.raises(Killed):
        asyncio.run(Seams(control, home, last).renewal().renew())
    assert control.device_client(serial_of(home)).get("/api/v1/device/desired").status_code == 404
    asyncio.run(Seams(control, home, 0).renewal().renew())
    assert serial_of(home) != first
    assert control.device_client(serial_of(home)).get("/api/v1/device/desired").status_code == 404
    assert control.device_client(first).get("/api/v1/device/desired").status_code == 401
    assert not home.next_key_file.exists()


def test_an_undisturbed_renewal_has_no_step_that_is_not_tried(control: ControlApp, home: Home) -> None:
    seams = Seams(control, home, NUM_SEAMS + 1)
    asyncio.run(seams.renewal().renew())
    with pytest.raises(Killed):
        seams.step()


def test_a_certificate_for_another_key_is_not_taken(control: ControlApp, home: Home) -> None:
    before = home.certificate_file.read_bytes()
    other = FileKeys()
    issued = control.plane.authority.issue_device("default.x", other.request(other.create()))
    credentials = Credentials(home, FileKeys())
    with pytest.raises(InvalidInputError, match="another key"):
        credentials.replace(other.create(), issued.certificate_pem)
    assert home.certificate_file.read_bytes() == before


def test_it_is_due_at_two_thirds_of_its_life(home: Home) -> None:
    credentials = Credentials(home, FileKeys())
    life = credentials.certificate.not_valid_after_utc - credentials.certificate.not_valid_before_utc
    assert not credentials.is_due()
    assert abs(credentials.renew_at - (datetime.now(UTC) + life * 2 / 3)) < timedelta(hours=1)
