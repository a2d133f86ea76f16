"""One of everything for a tenant, through the API: device, group, model, release, job, rollout, decision, token, audit.

Names and contents carry the tenant's marker, so that a test sees at once when another tenant gets hold of them.
"""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from model_registry.manifest import parse_release, sha256
from model_registry.trust.desk import SigningDesk
from tests.fakes.control import CHUNK_BYTES, make_manifest
from tests.fakes.control_app import ControlApp


def seed(control: ControlApp, tenant: str) -> dict[str, str]:
    """Fill the tenant; path parameters of the API by name, each with something that exists, besides other ids."""
    api = Seed(control, tenant)
    mark = f"mark-{tenant}"
    device = control.enrol(f"{mark}-device", tenant)
    api.ok("admin", "POST", "/groups", {"name": f"{mark}-group", "device_ids": [f"{mark}-device"]})
    release, publication, job, manifest, chunk = api.publish(f"{mark}-model", f"weights of {mark} ".encode() * 9000)
    order = {"release": release, "group": f"{mark}-group", "waves": [{"count": 1}], "start": False}
    rollout = api.ok("operator", "POST", "/rollouts", order)["rollout_id"]
    token = api.ok("admin", "POST", "/tokens", {"name": f"{mark}-token", "role": "viewer"})["token_id"]
    hook = {"url": f"http://127.0.0.1:9/{mark}", "actions": ["nothing.ever"]}
    webhook = api.ok("admin", "POST", "/webhooks", hook)["webhook_id"]
    delivery = api.ok("admin", "POST", f"/webhooks/{webhook}/ping")["delivery_id"]
    return {
        "device_id": f"{mark}-device", "serial": device["serial"], "device_token": device["token"],
        "name": f"{mark}-model", "group": f"{mark}-group", "release": release, "publication_id": publication,
        "job_id": job, "digest": chunk, "manifest": manifest, "rollout_id": rollout, "token_id": token, "order": "halt",
        "webhook_id": webhook, "delivery_id": delivery,
    }  # fmt: skip


class Seed:
    """The API as this tenant's people, and as the platform's worker."""

    def __init__(self, control: ControlApp, tenant: str) -> None:
        self._control, self._tenant = control, tenant

    def ok(self, role: str, method: str, path: str, body: Any = None, content: bytes | None = None) -> Any:
        """One request that must succeed; its JSON."""
        tenant = "default" if role == "worker" else self._tenant
        client = self._control.client(role, tenant)
        answer = client.request(method, f"/api/v1{path}", json=body, content=content)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def get_trust(self) -> dict[str, Any]:
        """See `trust.desk.Counter`."""
        return dict(self.ok("admin", "GET", "/trust"))

    def submit_metadata(self, role: str, metadata: bytes) -> dict[str, Any]:
        """See `trust.desk.Counter`."""
        body = {"role": role, "metadata": base64.b64encode(metadata).decode()}
        return dict(self.ok("admin", "POST", "/trust/metadata", body))

    def find_metadata(self, name: str, max_bytes: int) -> bytes | None:
        """See `trust.desk.Counter`."""
        answer = self._control.client("admin", self._tenant).get(f"/api/v1/trust/metadata/{name}")
        return answer.content if answer.status_code == 200 else None

    def _desk(self) -> SigningDesk:
        """The tenant's offline keys, made and introduced now."""
        root, targets, publisher = (Ed25519PrivateKey.generate() for _ in range(3))
        folder = Path(tempfile.mkdtemp(dir=self._control.plane.settings.home))
        desk = SigningDesk(self, folder, [root, targets, publisher])
        desk.initialise([root.public_key()], [targets.public_key()])
        desk.add_publisher("seed", [publisher.public_key()])
        return desk

    def publish(self, name: str, payload: bytes) -> tuple[str, str, str, str, str]:
        """A released one-file model: digests and ids of release, publication, job, manifest and first chunk."""
        source = b"source of " + payload[:100]
        self.ok("publisher", "PUT", f"/blobs/{sha256(source)}", content=source)
        files = [{"path": "m.onnx", "digest": sha256(source), "size_bytes": len(source)}]
        body = {"name": name, "targets": ["cpu-x86"], "source": {"format": "onnx", "files": files}}
        publication = self.ok("publisher", "POST", "/publications", body)["publication_id"]
        lease = self.ok("worker", "POST", "/jobs/lease", {"worker_id": "seed"})
        manifest = make_manifest(name, payload, lease["spec"]["source"]["digest"])
        chunks = [payload[start : start + CHUNK_BYTES] for start in range(0, len(payload), CHUNK_BYTES)]
        for data in [*chunks, manifest.to_bytes()]:
            self.ok("worker", "PUT", f"/blobs/{sha256(data)}", content=data)
        done = {"lease_id": lease["lease_id"], "manifest": manifest.digest}
        self.ok("worker", "POST", f"/jobs/{lease['job_id']}/complete", done)
        self._control.plane.publications.tick()
        proposed = self.ok("publisher", "GET", f"/publications/{publication}")["release"]
        release = parse_release(base64.b64decode(proposed))
        role, metadata = self._desk().list_release(release)
        body = {"role": role, "metadata": base64.b64encode(metadata).decode()}
        self.ok("publisher", "POST", f"/publications/{publication}/sign", body)
        return release.digest, publication, str(lease["job_id"]), manifest.digest, sha256(chunks[0])
