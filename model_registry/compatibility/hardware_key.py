"""The hardware key: one engine serves every device of the same key, and no other.

It holds what an engine is bound to: the builder with its exact version, the compute capability, the processor's
architecture and, on Jetson, the JetPack, whose driver and libraries the engine was tuned against. Written as
`tensorrt-10.3.0.sm87.aarch64.jetpack-6.2`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from model_registry.compatibility.tables import ENGINE_RUNTIMES
from wire.messages import Hardware

_TEXT = re.compile(
    r"(?P<builder>tensorrt-rtx|tensorrt)-(?P<version>[0-9]+(?:\.[0-9]+)*)\.sm(?P<sm>[0-9]{2,3})"
    r"\.(?P<architecture>[a-z0-9_]+?)(?:\.jetpack-(?P<jetpack>[0-9]+(?:\.[0-9]+)*))?"
)


@dataclass(frozen=True)
class HardwareKey:
    """What an engine is bound to."""

    builder: str
    version: str
    compute_capability: str
    architecture: str
    jetpack: str | None = None

    def __str__(self) -> str:
        text = f"{self.builder}-{self.version}.sm{self.compute_capability.replace('.', '')}.{self.architecture}"
        return f"{text}.jetpack-{self.jetpack}" if self.jetpack else text


def key_of(hardware: Hardware) -> HardwareKey | None:
    """The key of a device that can run engines; None where it does not tell enough to have one."""
    builder = next((name for name in ENGINE_RUNTIMES if name in hardware.runtimes), None)
    if builder is None or not hardware.compute_capability or not hardware.architecture:
        return None
    version = hardware.runtimes[builder].split("+")[0]
    return HardwareKey(builder, version, hardware.compute_capability, hardware.architecture, hardware.jetpack)


def parse_key(text: str) -> HardwareKey | None:
    """The key that `text` writes; None when it writes none."""
    match = _TEXT.fullmatch(text)
    if match is None:
        return None
    sm = match["sm"]
    return HardwareKey(
        match["builder"], match["version"], f"{sm[:-1]}.{sm[-1]}", match["architecture"], match["jetpack"]
    )
