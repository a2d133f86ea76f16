"""A fleet file: which serving workers and which devices `foreshore up` runs on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from wire.errors import InvalidInputError, NotFoundError
from wire.messages import Name

FLEETS = Path(__file__).resolve().parent.parent.parent / "fleet_configs" / "fleets"
MAX_FILE_BYTES = 64 * 1024


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServingWorker(_Entry):
    """A serving worker of the gateway."""

    name: Name
    role: Literal["prefill", "decode", "both"]


class Device(_Entry):
    """An edge agent on this machine; `profile` names a file of `fleet_configs/devices`."""

    device_id: Name
    profile: Name


class Fleet(_Entry):
    """Everything `foreshore up` starts besides the control plane, its broker and a compile worker."""

    name: Name
    workers: list[ServingWorker] = Field(default_factory=list, max_length=16)
    devices: list[Device] = Field(default_factory=list, max_length=64)

    @model_validator(mode="after")
    def _names_each_process_once(self) -> Self:
        names = [worker.name for worker in self.workers] + [device.device_id for device in self.devices]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is named twice")
        return self


def load_fleet(name_or_path: str) -> Fleet:
    """A shipped fleet by name, or a fleet file by path; what is wrong in it is named."""
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        path = FLEETS / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FLEETS.glob("*.yaml")))
        raise NotFoundError(f"there is no fleet {name_or_path!r}", remedy=f"give a YAML file or one of: {known}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InvalidInputError(f"{path} has {path.stat().st_size} bytes", remedy=f"at most {MAX_FILE_BYTES}")
    try:
        return Fleet.model_validate(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, ValidationError) as error:
        raise InvalidInputError(f"{path.name}: {error}", remedy="see fleet_configs/fleets/laptop.yaml") from error
