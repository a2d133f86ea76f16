"""The JSON messages between control plane and devices, each with a version, parsed strictly at the rim.

`desired` travels signed (see `wire.envelope`, type `DESIRED_TYPE`); the others are authenticated by the broker's access
list: a topic under `d/{device}/` can only be written by that device. Unknown fields are refused, an unknown version
first of all, and bytes over `MAX_MESSAGE_BYTES` are never parsed.
"""

from __future__ import annotations

import json
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wire.errors import InvalidInputError, TooLargeError, UnknownVersionError
from wire.window import Window

VERSION = 1
MAX_MESSAGE_BYTES = 16 * 1024
DESIRED_TYPE = "application/vnd.foreshore.desired+json;v=1"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$")]
Count = Annotated[int, Field(ge=0, le=2**53)]
Text = Annotated[str, Field(max_length=2000)]


class Message(BaseModel):
    """Base of all messages: immutable, strict about fields, versioned."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null", allow_inf_nan=False)
    v: Literal[1] = 1

    def to_bytes(self) -> bytes:
        """The message as it travels: compact JSON."""
        return self.model_dump_json(exclude_none=True).encode()


class Phase(StrEnum):
    """Where a device is with one model. The order is the order of an update."""

    IDLE = "idle"
    PREFLIGHT = "preflight"
    FETCH = "fetch"
    VERIFY = "verify"
    WAIT_WINDOW = "wait_window"
    STAGED = "staged"
    PROBE = "probe"
    SWITCH = "switch"
    SOAK = "soak"
    COMMITTED = "committed"
    REMOVED = "removed"


class Result(StrEnum):
    """How an update ended, told honestly."""

    SUCCEEDED = "succeeded"
    FAILED_NO_CHANGE = "failed_no_change"
    ROLLED_BACK = "rolled_back"
    UNABLE_TO_ROLL_BACK = "unable_to_roll_back"
    REJECTED = "rejected"
    TIMED_OUT = "timed_out"


class DesiredModel(Message):
    """What one model name shall be on this device. `attempt` rises when the same release is to be tried again."""

    name: Name
    version: Annotated[str, Field(max_length=64)]
    release: Digest  # of the signed release document
    manifest: Digest  # of the artefact's manifest for this device's target
    manifest_bytes: Count
    target: Name
    attempt: Count = 0
    soak_s: Annotated[float, Field(ge=0, le=86400)] = 0.0
    rollout_id: Annotated[str, Field(max_length=64)] | None = None
    window: Window | None = None  # download at once, switch only while it is open


class Desired(Message):
    """The complete wish for one device; models not named shall go. `generation` only ever rises."""

    tenant: Name
    device_id: Name
    generation: Count
    issued_at: datetime
    expires_at: datetime
    models: list[DesiredModel] = Field(default_factory=list, max_length=32)


class ModelState(Message):
    """One model on the device: what runs, what is being done, how the last update ended."""

    name: Name
    active_version: str | None = None
    active_manifest: Digest | None = None
    previous_manifest: Digest | None = None
    phase: Phase = Phase.IDLE
    wanted_manifest: Digest | None = None
    attempt: Count = 0
    rollout_id: str | None = None
    result: Result | None = None
    reason: Text | None = None  # error code of the result, then a colon and a sentence
    bytes_done: Count = 0
    bytes_total: Count = 0
    wire_bytes: Count = 0  # received for this update, encoded
    encoding: str | None = None
    runtime: str | None = None
    providers: list[str] = Field(default_factory=list, max_length=8)
    latency_ms: float | None = None
    engine: Digest | None = None  # of the engine that answers
    engine_note: Text | None = None  # why none does, though one was built: error code, a colon and a sentence


class Hardware(Message):
    """What the device is, as far as it can tell."""

    profile: Name
    targets: list[Name] = Field(default_factory=list, max_length=16)  # most wanted first
    architecture: str = ""
    cpu_features: list[str] = Field(default_factory=list, max_length=64)
    memory_bytes: Count = 0
    memory_budget_bytes: Count = 0
    disk_free_bytes: Count = 0
    accelerator: str | None = None
    hardware_key: str | None = None
    runtimes: dict[str, str] = Field(default_factory=dict)  # name -> version
    max_context_tokens: Count = 0
    providers: Annotated[list[str], Field(max_length=16)] | None = None  # execution providers whose hardware is here
    compute_capability: Annotated[str, Field(pattern=r"^[0-9]{1,2}\.[0-9]$")] | None = None
    jetpack: Annotated[str, Field(max_length=32)] | None = None
    driver: Annotated[str, Field(max_length=32)] | None = None


class Reported(Message):
    """The device's answer: which generation it works on, and the state of each model."""

    generation: Count
    agent_version: str
    boot_epoch: Count
    reported_at: datetime
    hardware: Hardware
    models: list[ModelState] = Field(default_factory=list, max_length=32)
    local_api: Annotated[str, Field(max_length=200)] | None = None
    error: Text | None = None


class Status(Message):
    """Birth and last will on one topic; a status with an older epoch than the last seen is ignored."""

    online: bool
    boot_epoch: Count


class Need(Message):
    """Which chunks of a manifest the device still lacks. `missing` holds [first, count] ranges of chunk indexes.

    `manifest_wanted` asks for the manifest itself first. `held` are manifests the device holds and has re-hashed, the
    bases it can decode deltas against. `received` counts chunks so far: it is the credit the publisher paces by.
    """

    manifest: Digest
    manifest_wanted: bool = False
    encoding: Name = "whole"
    missing: list[tuple[Count, Count]] = Field(default_factory=list, max_length=1000)
    received: Count = 0
    held: list[Digest] = Field(default_factory=list, max_length=8)


class Event(Message):
    """One durable piece of telemetry; `event_id` makes repeated delivery harmless."""

    event_id: Annotated[str, Field(max_length=64)]
    kind: Literal["decision", "inference", "update", "alarm", "metric"]
    at: datetime
    body: dict[str, Any]


class Epoch(Message):
    """The control plane's sign of life; when it is missing after a broker restart, everything is published again."""

    epoch: Count
    started_at: datetime


M = TypeVar("M", bound=Message)


def parse(kind: type[M], data: bytes, *, max_bytes: int = MAX_MESSAGE_BYTES) -> M:
    """Read one message of type `kind`; anything else is refused with what is wrong and what to do."""
    if len(data) > max_bytes:
        raise TooLargeError(
            f"{kind.__name__} message has {len(data)} bytes", remedy=f"at most {max_bytes} are accepted"
        )
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{kind.__name__} message is not JSON", remedy="send UTF-8 JSON") from error
    if not isinstance(document, dict):
        raise InvalidInputError(f"{kind.__name__} message is not an object", remedy="send a JSON object")
    if document.get("v") != VERSION:
        raise UnknownVersionError(
            f"{kind.__name__} message has version {document.get('v')!r}",
            remedy=f"this build speaks version {VERSION}; update the older side",
        )
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "message"
        raise InvalidInputError(
            f"{kind.__name__} message: {where}: {first['msg']}", remedy="see docs/interfaces.md"
        ) from error
