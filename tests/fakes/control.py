"""A running control plane and a small simulated device, for tests: real processes, real broker, real HTTP."""

from __future__ import annotations

import base64
import json
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import paho.mqtt.client as mqtt
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from paho.mqtt.enums import CallbackAPIVersion

from model_registry.client import ControlClient, connect
from model_registry.manifest import ArtefactFile, Chunk, Golden, Manifest, parse_release, sha256
from model_registry.trust.desk import SigningDesk
from model_registry.trust.keys import create_key, load_key
from wire import topics
from wire.envelope import parse_envelope
from wire.messages import Desired, Hardware, ModelState, Phase, Reported, Result, Status, parse
from wire.process import free_port

WAIT_S = 30.0


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
    """Poll until `condition` gives something true; fail with `what` otherwise."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s:g} s: {what}")


class ControlProcess:
    """`foreshore cloud` as a child; can be killed and started again on the same home and ports."""

    def __init__(self, home: Path) -> None:
        self.home, self.port, self.mqtt_port, self.device_port = home, free_port(), free_port(), free_port()
        self.device_url = f"https://127.0.0.1:{self.device_port}"
        self.options: list[str] = []  # more of the command line
        self.ca_file: str | None = None  # of the certificate that `options` give it
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, has_trust: bool = True) -> None:
        """Start and wait until it accepts; introduce the default tenant's offline keys unless told not to."""
        port_file = self.home / "port.json"
        port_file.unlink(missing_ok=True)
        self.home.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "cloud.cli", "cloud", "--home", str(self.home), "--port", str(self.port)]
        command += ["--mqtt-port", str(self.mqtt_port), "--port-file", str(port_file), "--die-with-parent"]
        command += ["--device-port", str(self.device_port), *self.options]
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(lambda: port_file.exists() or self.process.poll() is not None, "the control plane starts", 60)
        assert self.process.poll() is None, (self.home / "log").read_text()[-2000:]
        if has_trust:
            with connect(self.url, self.token(), ca_file=self.ca_file) as client:
                offline_desk(client, self.home)

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(20)

    def token(self, name: str = "admin") -> str:
        """A service token."""
        return (self.home / "tokens" / name).read_text()

    def call(
        self, method: str, path: str, body: Any = None, *, token: str | None = "admin", **more: Any
    ) -> httpx.Response:
        """One request; `token` is a service token's name, a secret, or None."""
        secret = self.token(token) if token in ("admin", "worker", "gateway") else token
        headers = {"authorization": f"Bearer {secret}"} if secret else {}
        return httpx.request(method, f"{self.url}/api/v1{path}", json=body, headers=headers, timeout=40, **more)

    def ok(self, method: str, path: str, body: Any = None, **more: Any) -> Any:
        """One request that must succeed; its JSON."""
        answer = self.call(method, path, body, **more)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def put_blob(self, data: bytes) -> str:
        """Upload; the digest."""
        self.put_blobs([data])
        return sha256(data)

    def put_blobs(self, blobs: Iterable[bytes]) -> None:
        """Upload several over one connection."""
        headers = {"authorization": f"Bearer {self.token()}"}
        with httpx.Client(base_url=f"{self.url}/api/v1", headers=headers, timeout=30) as client:
            for data in blobs:
                answer = client.put(f"/blobs/{sha256(data)}", content=data)
                assert answer.is_success, answer.text

    def publish(
        self, name: str, payload: bytes, version: str | None = None, *, golden: bytes | None = None
    ) -> dict[str, Any]:
        """Publish `payload` as a one-file model through a simulated worker; the release's document."""
        source = self.put_blob(b"source of " + payload[:100])
        files = [{"path": "m.onnx", "digest": source, "size_bytes": len(b"source of " + payload[:100])}]
        order = {"name": name, "targets": ["cpu-x86"], "source": {"format": "onnx", "files": files}, "version": version}
        for data in (payload, golden or b""):
            self.put_blobs(data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES))
        publication = self.ok("POST", "/publications", order)
        lease = self.ok("POST", "/jobs/lease", {"worker_id": "w"}, token="worker")
        manifest = make_manifest(name, payload, lease["spec"]["source"]["digest"], golden)
        self.put_blob(manifest.to_bytes())
        done = {"lease_id": lease["lease_id"], "manifest": manifest.digest}
        self.ok("POST", f"/jobs/{lease['job_id']}/complete", done, token="worker")
        path = f"/publications/{publication['publication_id']}"
        ready = wait_until(lambda: (p := self.ok("GET", path))["state"] == "awaiting_signature" and p, "ready to sign")
        release = parse_release(base64.b64decode(ready["release"]))
        with connect(self.url, self.token()) as client:
            role, metadata = offline_desk(client, self.home).list_release(release)
            assert client.sign_publication(publication["publication_id"], role, metadata).state == "released"
        return {"release": release.digest, "manifest": manifest}


def offline_desk(client: ControlClient, folder: Path) -> SigningDesk:
    """The tenant's offline keys below `folder`, made and introduced (`foreshore keys init`) the first time."""
    paths = [folder / "offline" / f"{name}.pem" for name in ("root", "targets", "publisher")]
    keys = [load_key(path) if path.exists() else create_key(path) for path in paths]
    desk = SigningDesk(client, folder / "offline" / "trust", keys)
    if not client.get_trust()["roles"]:
        root, targets, publisher = (key.public_key() for key in keys)
        desk.initialise([root], [targets])
        desk.add_publisher("tests", [publisher])
    return desk


CHUNK_BYTES = 64 * 1024


def make_manifest(name: str, payload: bytes, source_digest: str, golden: bytes | None = None) -> Manifest:
    """A manifest of one file in chunks of 64 KiB, and of golden cases where there are some."""
    files = {"m.onnx": payload} | ({"golden.npz": golden} if golden is not None else {})
    return Manifest(
        name=name, kind="tensor", target="cpu-x86", runtime="onnxruntime", precision="fp32",
        files=[_file(path, data) for path, data in files.items()], entry="m.onnx", source_digest=source_digest,
        golden=Golden(path="golden.npz", num_cases=3, max_abs_error=1e-4) if golden is not None else None,
    )  # fmt: skip


def _file(path: str, data: bytes) -> ArtefactFile:
    pieces = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
    chunks = [Chunk(digest=sha256(piece), size_bytes=len(piece)) for piece in pieces]
    return ArtefactFile(path=path, size_bytes=len(data), digest=sha256(data), chunks=chunks)


class FakeDevice:
    """A device on the real broker that obeys (`behaviour` decides how an update ends: ok, fail, silent)."""

    def __init__(self, control: ControlProcess, device_id: str, behaviour: str = "ok", *, admin: str = "admin") -> None:
        self.device_id, self.behaviour = device_id, behaviour
        self.received: list[tuple[str, bytes]] = []
        self.desired: Desired | None = None
        self._models: dict[str, ModelState] = {}
        self._lock = threading.Lock()
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "whatever")])
        csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
        token = control.ok("POST", "/enrolments", {"device_id": device_id}, token=admin)["enrolment_token"]
        body = {"enrolment_token": token, "csr_pem": csr.public_bytes(Encoding.PEM).decode()}
        self.identity = control.ok("POST", "/enrol", body, token=None)
        self.tenant = str(self.identity["tenant"])
        folder = control.home / "devices" / self.tenant / device_id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        (folder / "pem").write_text(self.identity["certificate_pem"])
        self.tls = ssl.create_default_context(cadata=self.identity["ca_pem"])
        self.tls.load_cert_chain(folder / "pem", folder / "key")
        client_id = self.identity["mqtt"]["client_id"]
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id, protocol=mqtt.MQTTv5)
        self.client.tls_set_context(self.tls)
        self.client.reconnect_delay_set(1, 1)
        self.client.on_connect = self._on_connect
        self.client.on_message = self._on_message
        self.is_connected = threading.Event()

    def connect(self) -> None:
        """Come online and report."""
        self.client.connect(self.identity["mqtt"]["host"], self.identity["mqtt"]["port"], clean_start=True)
        self.client.loop_start()
        assert self.is_connected.wait(WAIT_S)

    def call(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """One request through the devices' door, with the certificate."""
        url = f"{self.identity['control_url']}/api/v1{path}"
        return httpx.request(method, url, json=body, verify=self.tls, timeout=20)

    def close(self) -> None:
        """Go away."""
        self.client.disconnect()
        self.client.loop_stop()

    def topic(self, leaf: str) -> str:
        """One of its own topics."""
        return topics.device(self.tenant, self.device_id, leaf)

    def report(self) -> None:
        """Publish what it is."""
        reported = Reported(
            generation=self.desired.generation if self.desired else 0, agent_version="test", boot_epoch=1,
            reported_at=datetime.now(UTC), hardware=Hardware(profile="fake", targets=["cpu-x86"]),
            models=list(self._models.values()),
        )  # fmt: skip
        self.client.publish(self.topic("reported"), reported.to_bytes(), qos=1, retain=True)

    def _on_connect(self, client: mqtt.Client, *_: Any) -> None:
        for filter_ in (self.topic("desired"), self.topic("chunk"), self.topic("cmd/+"), topics.shared(self.tenant)):
            client.subscribe(filter_, qos=1)
        client.publish(self.topic("status"), Status(online=True, boot_epoch=1).to_bytes(), qos=1, retain=True)
        self.report()
        self.is_connected.set()

    def _on_message(self, _client: mqtt.Client, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        self.received.append((message.topic, message.payload))
        if message.topic != self.topic("desired") or not message.payload:
            return
        desired = parse(Desired, parse_envelope(message.payload).payload)
        if self.desired is not None and desired.generation < self.desired.generation:
            return
        self.desired = desired
        if self.behaviour == "silent":
            return
        old, self._models = self._models, {}
        for wish in desired.models:
            before = old.get(wish.name)
            fails = self.behaviour == "fail" and wish.version.startswith("bad")
            self._models[wish.name] = ModelState(
                name=wish.name,
                active_version=(before.active_version if before else None) if fails else wish.version,
                active_manifest=(before.active_manifest if before else None) if fails else wish.manifest,
                phase=Phase.IDLE if fails else Phase.COMMITTED,
                wanted_manifest=wish.manifest,
                attempt=wish.attempt,
                rollout_id=wish.rollout_id,
                result=Result.FAILED_NO_CHANGE if fails else Result.SUCCEEDED,
                reason="probe_failed: golden outputs differ" if fails else None,
            )
        self.report()


def body_of(payload: bytes) -> Any:
    """JSON."""
    return json.loads(payload)
