"""Which artefact of a release a device gets, decided by what the device says of itself; and why others get none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloud.control.tables import Device
from model_registry import catalogue
from model_registry.blobs import BlobStore
from model_registry.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from model_registry.tables import ArtefactRow, ReleaseRow


@dataclass(frozen=True)
class Placement:
    """The artefact for each device that can run the release, in the order asked, and why the others cannot."""

    chosen: Mapping[str, ArtefactRow]
    skipped: Mapping[str, str]


def place(blobs: BlobStore, release: ReleaseRow, devices: Sequence[Device]) -> Placement:
    """Give each device the first of its targets that nothing speaks against."""
    chosen: dict[str, ArtefactRow] = {}
    skipped: dict[str, str] = {}
    manifests: dict[str, Manifest] = {}
    for device in devices:
        targets = [str(one) for one in (device.hardware or {}).get("targets", [])]
        reasons = [] if targets else ["it has not said which targets it runs"]
        for artefact in catalogue.artefacts_for(release, targets):
            if artefact.manifest not in manifests:
                data = blobs.get(artefact.manifest, max_bytes=MAX_MANIFEST_BYTES)
                manifests[artefact.manifest] = parse_manifest(data, expected_digest=artefact.manifest)
            problem = find_obstacle(manifests[artefact.manifest], device.hardware or {})
            if problem is None:
                chosen[device.device_id] = artefact
                break
            reasons.append(f"{artefact.target}: {problem}")
        else:
            known = ", ".join(artefact.target for artefact in release.artefacts)
            skipped[device.device_id] = "; ".join(reasons) or f"no artefact for it; the release has {known}"
    return Placement(chosen, skipped)


def find_obstacle(manifest: Manifest, hardware: Mapping[str, Any]) -> str | None:
    """Why a device cannot run an artefact, by what it reports of itself; None when nothing speaks against it."""
    needs, budget = manifest.requires, int(hardware.get("memory_budget_bytes") or 0)
    if budget and needs.memory_bytes > budget:
        return f"needs {needs.memory_bytes >> 20} MiB of memory, the budget is {budget >> 20} MiB"
    disk = int(hardware.get("disk_free_bytes") or 0)
    if disk and needs.disk_bytes > disk:
        return f"needs {needs.disk_bytes >> 20} MiB of disk, {disk >> 20} MiB are free"
    architecture = str(hardware.get("architecture") or "")
    if architecture and needs.architectures and architecture not in needs.architectures:
        return f"is for {', '.join(needs.architectures)}, the device is {architecture}"
    missing = sorted(set(needs.cpu_features) - set(hardware.get("cpu_features") or ()))
    if missing and hardware.get("cpu_features"):
        return f"the processor lacks {', '.join(missing)}"
    if needs.hardware_key and needs.hardware_key != hardware.get("hardware_key"):
        return f"was built for {needs.hardware_key}, the device is {hardware.get('hardware_key') or 'another'}"
    return None
