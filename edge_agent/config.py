"""What a device is allowed to use (its profile) and who it is (its identity), read strictly from the home folder.

Layout of the home folder: `profile.yaml`, `identity.json` and keys (0600), `state/` journals, `store/` models,
`trust/` metadata, `inbox/` a bundle to install, `outbox.db`, `boot` (start counter).
"""

from __future__ import annotations

import contextlib
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wire.errors import InvalidInputError, NotFoundError
from wire.messages import Name

ENGINE_MODULE = "edge_agent.runtimes.tensorrt_engine"
MAX_FILE_BYTES = 256 * 1024
PROFILES = Path(__file__).resolve().parent.parent / "fleet_configs" / "devices"


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineSettings(_Config):
    """How this device builds and opens engines, and what it cannot find out by itself.

    `build` is a command with `{graph}` and `{engine}` for the files; `module` has `open_engine(path, runtime)`, which
    gives a `TensorRuntime`. What is stated of the hardware counts before what the machine tells.
    """

    runtime: Literal["tensorrt", "tensorrt-rtx"]
    runtime_version: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)*$", max_length=32)]
    module: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_.]*$", max_length=100)] = ENGINE_MODULE
    compute_capability: Annotated[str, Field(pattern=r"^[0-9]{1,2}\.[0-9]$")] | None = None
    jetpack: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)*$", max_length=16)] | None = None
    architecture: Annotated[str, Field(max_length=32)] | None = None
    build: Annotated[list[str], Field(min_length=1, max_length=32)] | None = None  # None: never builds for others
    build_timeout_s: Annotated[float, Field(gt=0, le=86400)] = 1800.0
    min_idle_s: Annotated[float, Field(ge=0, le=86400)] = 60.0  # without a request before a build may begin
    poll_s: Annotated[float, Field(gt=0, le=3600)] = 30.0  # between looks for an engine or a build
    max_power_w: Annotated[float, Field(gt=0)] | None = None  # of the whole board, to begin and go on building

    def runtimes(self) -> dict[str, str]:
        """The engine runtime as it is reported."""
        return {self.runtime: self.runtime_version}


class Profile(_Config):
    """A device class: targets in order of preference, budgets, limits."""

    name: Name
    description: str = ""
    targets: list[Name] = Field(min_length=1, max_length=16)
    memory_budget_bytes: Annotated[int, Field(ge=1 << 20)]
    disk_budget_bytes: Annotated[int, Field(ge=1 << 20)] = 64 << 30
    max_context_tokens: Annotated[int, Field(ge=16)] = 2048
    max_streams: Annotated[int, Field(ge=1, le=64)] = 1
    max_queue: Annotated[int, Field(ge=0, le=1024)] = 4
    num_threads: Annotated[int, Field(ge=1, le=256)] = 1
    providers: list[str] = Field(default_factory=list)  # most wanted first; the CPU is always last
    accelerator: str | None = None
    engine: EngineSettings | None = None
    power_budget_w: Annotated[float, Field(gt=0)] | None = None  # above it, requests rather go to the cloud
    hardware_key: str | None = None  # what engines built for one kind of device must match
    reconnect_max_s: Annotated[float, Field(gt=0, le=300)] = 5.0
    fetch_stall_s: Annotated[float, Field(gt=0, le=300)] = 5.0
    phase_timeout_s: Annotated[float, Field(gt=0, le=86400)] = 3600.0
    probe_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 120.0
    max_slowdown: Annotated[float, Field(gt=1)] = 2.0  # new median latency against old, or refused
    healthy_after_s: Annotated[float, Field(ge=0, le=600)] = 5.0
    outbox_quota_bytes: Annotated[int, Field(ge=64 * 1024)] = 8 << 20


class Mqtt(_Config):
    """Where the broker is."""

    host: str
    port: Annotated[int, Field(ge=1, le=65535)]
    client_id: Annotated[str, Field(min_length=1, max_length=120)] | None = None  # a secret of ours and the broker


class Trust(_Config):
    """What enrolment proved: the root of trust of that day (base64), and that it was not earlier than `time`."""

    root: Annotated[str, Field(max_length=1 << 20)]
    time: datetime


class Identity(_Config):
    """What enrolment handed out."""

    tenant: Name
    device_id: Name
    control_url: str
    gateway_url: str | None = None
    device_token: str
    mqtt: Mqtt
    trust: Trust


class ChipSettings(_Config):
    """Which security chip guards the device's key (PKCS#11)."""

    module: Path
    token: str
    pin_file: Path


class Home:
    """The folder of one agent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.profile_file = path / "profile.yaml"
        self.identity_file = path / "identity.json"
        self.certificate_file = path / "device.pem"  # the key (or where it is) and its certificate
        self.next_key_file = path / "next.key"  # there while the certificate is being renewed
        self.chip_file = path / "chip.json"
        self.ca_file = path / "ca.pem"
        self.state = path / "state"
        self.store = path / "store"
        self.outbox_file = path / "outbox.db"
        self.desired_file = path / "state" / "desired.json"
        self.trust = path / "trust"
        self.inbox = path / "inbox"

    def profile(self) -> Profile:
        """The device's profile."""
        return load_profile(str(self.profile_file))

    def identity(self) -> Identity:
        """Who this device is; `NotFoundError` before enrolment."""
        if not self.identity_file.exists():
            raise NotFoundError(f"{self.path} holds no identity", remedy="run foreshore-agent enrol first")
        return _validated(Identity, json.loads(_read(self.identity_file)), self.identity_file)

    def chip(self) -> ChipSettings | None:
        """The security chip that guards the key, if there is one."""
        if not self.chip_file.exists():
            return None
        return _validated(ChipSettings, json.loads(_read(self.chip_file)), self.chip_file)

    def count_boot(self) -> int:
        """Raise and return the start counter; a disk that takes no write does not keep the agent from starting."""
        from wire.process import replace_durably

        file = self.path / "boot"
        epoch = int(file.read_text()) + 1 if file.exists() and file.read_text().isdigit() else 1
        with contextlib.suppress(OSError):
            replace_durably(file, str(epoch).encode())
        return epoch


def load_profile(name_or_path: str) -> Profile:
    """A profile by the name of a shipped one (`fleet_configs/devices`) or by the path of a YAML file."""
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"} and os.sep not in name_or_path:
        path = PROFILES / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml")))
        raise NotFoundError(f"there is no profile {name_or_path!r}", remedy=f"give a YAML file or one of: {known}")
    try:
        document = yaml.safe_load(_read(path))
    except yaml.YAMLError as error:
        raise InvalidInputError(f"{path} is not YAML: {error}", remedy="mend the file") from error
    return _validated(Profile, document, path)


C = TypeVar("C", bound=BaseModel)


def _validated(kind: type[C], document: Any, path: Path) -> C:
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInputError(f"{path.name}: {where}: {first['msg']}", remedy="see docs/agent.md") from error


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InvalidInputError(f"{path} has {path.stat().st_size} bytes", remedy=f"at most {MAX_FILE_BYTES}")
    return path.read_text()
