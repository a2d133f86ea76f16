"""Which artefact of a release a device gets, by `model_registry.compatibility`; and why others get none.

The one place where the control plane asks whether something will run: rollouts, joining devices, the catalogue's
compatibility and the model page all ask here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from cloud.control.tables import Device
from model_registry.blobs import BlobStore
from model_registry.compatibility import ArtefactFacts, Choice, choose, facts_of
from model_registry.manifest import MAX_MANIFEST_BYTES, parse_manifest
from model_registry.tables import ArtefactRow, ReleaseRow
from wire.messages import Hardware


@dataclass(frozen=True)
class Placement:
    """The artefact for each device that can run the release, in the order asked, and why the others cannot."""

    chosen: Mapping[str, ArtefactRow]
    skipped: Mapping[str, str]
    choices: Mapping[str, Choice]


def place(blobs: BlobStore, release: ReleaseRow, devices: Sequence[Device]) -> Placement:
    """Give each device the first of its targets that no rule speaks against."""
    artefacts = {artefact.target: artefact for artefact in release.artefacts}
    known: dict[str, ArtefactFacts] = {}

    def facts(target: str) -> ArtefactFacts:
        if target not in known:
            known[target] = read_facts(blobs, artefacts[target].manifest)
        return known[target]

    choices = {
        device.device_id: choose(list(artefacts), facts, hardware_of(device.hardware or {})) for device in devices
    }
    chosen = {device_id: artefacts[one.target] for device_id, one in choices.items() if one.target is not None}
    skipped = {device_id: f"{one.reason} ({one.rule})" for device_id, one in choices.items() if one.target is None}
    return Placement(chosen, skipped, choices)


def read_facts(blobs: BlobStore, manifest: str) -> ArtefactFacts:
    """What decides about a stored artefact."""
    return facts_of(parse_manifest(blobs.get(manifest, max_bytes=MAX_MANIFEST_BYTES), expected_digest=manifest))


def hardware_of(stored: Mapping[str, Any]) -> Hardware:
    """A device's hardware as it is stored; what does not read as such tells nothing."""
    try:
        return Hardware.model_validate({"profile": "untold", **stored})
    except ValidationError:
        return Hardware(profile="untold")
