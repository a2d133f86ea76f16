"""What a control plane is told at its start, and where its files are below the home folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from cloud.control.authority import DEVICE_LIFETIME


@dataclass(frozen=True)
class Settings:
    """All there is to choose; the defaults are the embedded ones."""

    home: Path
    device_host: str = "127.0.0.1"  # where devices' port and the broker listen
    device_port: int = 0  # devices' HTTPS port, bound by the entry point; 0: there is none
    device_lifetime: timedelta = DEVICE_LIFETIME  # of a device's certificate
    database_url: str | None = None
    blob_url: str | None = None
    mqtt_port: int = 0
    broker_host: str | None = None  # a broker of your own; ours is not started then
    broker_port: int = 8883
    gateway_url: str | None = None
    advertise_host: str = "127.0.0.1"
    config_folder: Path = field(default_factory=lambda: Path(__file__).resolve().parents[2] / "fleet_configs")
    lease_s: float = 30.0
    engine_lease_s: float = 30.0
    engine_limit_s: float = 3600.0  # of one attempt to build or prove an engine
    tick_s: float = 1.0

    @property
    def database(self) -> str:
        """The database's address."""
        return self.database_url or f"sqlite:///{self.home / 'control.db'}"

    @property
    def blobs(self) -> str:
        """The blob store's address."""
        return self.blob_url or str(self.home / "blobs")
