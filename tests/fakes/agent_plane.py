"""A small control plane for agent tests: real Mosquitto with mutual TLS, real HTTP, signed documents, chunk frames."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import paho.mqtt.client as mqtt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper, numpy_helper
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from cloud.control.authority import CONTROL_USER, Authority
from cloud.control.broker import Broker, DeviceAccess, client_context
from model_registry.encodings import whole_frames
from model_registry.manifest import ArtefactFile, Chunk, Golden, Manifest, Release, ReleaseArtefact, Requirements
from tests.fakes.trust import MemoryTrust
from wire import topics
from wire.envelope import sign
from wire.frames import ChunkFrame, Codec
from wire.messages import DESIRED_TYPE, Desired, DesiredModel, Need, parse
from wire.process import free_port

TENANT, DEVICE = "acme", "edge-1"
CHUNK_BYTES = 64 * 1024
PAGE_BYTES = 64 * 1024


def tiny_model(scale: float, *, padding_bytes: int = 0) -> bytes:
    """y = scale * x for 4 numbers; `padding_bytes` that no codec shortens make the file as large as a test wants it."""
    rng = np.random.default_rng(int(scale * 1000))
    padding = np.frombuffer(rng.bytes(4 * max(padding_bytes // 4, 1)), np.int32)
    nodes = [helper.make_node("Mul", ["x", "scale"], ["y"])]
    weights = [numpy_helper.from_array(np.float32([scale]), "scale"), numpy_helper.from_array(padding, "padding")]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def golden_bytes(scale: float) -> bytes:
    """Inputs and outputs of `tiny_model(scale)`."""
    x = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    out = io.BytesIO()
    np.savez(out, **{"input.x": x, "output.y": x * np.float32(scale)})
    return out.getvalue()


class Plane:
    """Plays the control plane for one device."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chunks: dict[str, bytes] = {}
        self.manifests: dict[str, Manifest] = {}
        self.releases: dict[str, bytes] = {}
        self.reported: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.needs: list[Need] = []
        self.sent_chunks: list[int] = []
        self.http_chunks = 0
        self.pause_s = 0.0
        self.is_silent = False
        self.lies: dict[str, bytes] = {}  # metadata that is served instead of the true one
        self.is_closed = False
        self.generation = 0
        self.assignment = b""  # the last wish as it was sent
        self.trust = MemoryTrust(folder / "trust")
        self.authority = Authority(folder / "pki")
        self.broker = Broker(
            folder / "mosquitto", self.authority, host="127.0.0.1", port=free_port(), advertised=["127.0.0.1"]
        )
        self.broker.start([DeviceAccess(TENANT, DEVICE)])
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self._client = self._connect()

    def close(self) -> None:
        self.is_closed = True
        self._client.disconnect()
        self._client.loop_stop()
        self._http.shutdown()
        self._http.server_close()
        self.broker.stop()

    def enrolment(self, csr_pem: str) -> dict[str, Any]:
        issued = self.authority.issue_device(topics.mqtt_user(TENANT, DEVICE), csr_pem)
        return {
            "tenant": TENANT,
            "device_id": DEVICE,
            "certificate_pem": issued.certificate_pem,
            "ca_pem": self.authority.ca_pem,
            "mqtt": {"host": "127.0.0.1", "port": self.broker.port},
            "gateway_url": None,
            "device_token": "t",
            "trust": self.trust.enrolment(),
        }

    def publish(
        self,
        scale: float,
        version: str,
        *,
        golden_scale: float | None = None,
        padding_bytes: int = 0,
        memory: int = 1,
        is_listed: bool = True,
    ) -> DesiredModel:
        """Make a release of the tiny model; a different `golden_scale` makes it a bad one."""
        contents = {
            "model.onnx": tiny_model(scale, padding_bytes=padding_bytes),
            "golden.npz": golden_bytes(scale if golden_scale is None else golden_scale),
        }
        return self.publish_tensor("tiny", contents, version, memory=memory, is_listed=is_listed)

    def publish_tensor(
        self,
        name: str,
        contents: Mapping[str, bytes],
        version: str,
        *,
        memory: int = 1,
        is_listed: bool = True,
        **requires: Any,
    ) -> DesiredModel:
        """Make a release of `model.onnx` with `golden.npz`."""
        manifest = Manifest(
            name=name,
            kind="tensor",
            target="cpu-x86",
            runtime="onnxruntime",
            precision="fp32",
            files=[self._file(path, data) for path, data in contents.items()],
            entry="model.onnx",
            requires=Requirements(memory_bytes=memory, **requires),
            golden=Golden(path="golden.npz", num_cases=1, max_abs_error=1e-4),
            source_digest="0" * 64,
        )
        return self._released(manifest, version, is_listed=is_listed)

    def forget_content(self) -> None:
        """Drop what was published so far: a long run would fill the memory."""
        for held in (self.chunks, self.manifests):
            held.clear()

    def publish_language(self, folder: Path, version: str, golden: bytes) -> DesiredModel:
        """Make a release of an onnxruntime-genai folder, named `chat`."""
        contents = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        contents["golden.json"] = golden
        manifest = Manifest(
            name="chat",
            kind="language",
            target="cpu-x86",
            runtime="onnxruntime-genai",
            precision="int4",
            files=[self._file(path, data) for path, data in contents.items() if data],
            entry=".",
            context_tokens=512,
            golden=Golden(path="golden.json", num_cases=1, min_token_agreement=0.5),
            source_digest="0" * 64,
        )
        return self._released(manifest, version)

    def wish(self, *models: DesiredModel, key: Ed25519PrivateKey | None = None, **changes: Any) -> int:
        """Sign and retain the next generation of the desired state; `changes` make it another's, older, ..."""
        self.generation += 1
        now = datetime.now(UTC)
        desired = Desired(
            tenant=TENANT,
            device_id=DEVICE,
            generation=self.generation,
            issued_at=now,
            expires_at=now + timedelta(days=1),
            models=list(models),
        ).model_copy(update=changes)
        self.assignment = sign(DESIRED_TYPE, desired.to_bytes(), key or self.trust.counter.director()).to_bytes()
        self._client.publish(topics.device(TENANT, DEVICE, "desired"), self.assignment, qos=1, retain=True)
        return self.generation

    def tell(self, topic: str, payload: bytes) -> None:
        """Publish with QoS 1."""
        self._client.publish(topic, payload, qos=1)

    def await_report(self, check: Callable[[dict[str, Any]], bool], timeout_s: float = 40) -> dict[str, Any]:
        """The first report that passes `check`."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            for document in reversed(self.reported[-3:]):
                if check(document):
                    return document
            time.sleep(0.05)
        raise AssertionError(f"the device never said so; last report: {self.reported[-1:]}")

    def await_model(
        self, check: Callable[[dict[str, Any]], bool], timeout_s: float = 40, name: str = "tiny"
    ) -> dict[str, Any]:
        """The first reported state of the model that passes `check`."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            for document in reversed(self.reported[-3:]):
                for model in document["models"]:
                    if model["name"] == name and document["generation"] == self.generation and check(model):
                        return dict(model)
            time.sleep(0.05)
        raise AssertionError(f"the device never got there; last report: {self.reported[-1:]}")

    def _released(self, manifest: Manifest, version: str, *, is_listed: bool = True) -> DesiredModel:
        self.manifests[manifest.digest] = manifest
        release = Release(
            tenant=TENANT,
            name=manifest.name,
            version=version,
            sequence=len(self.releases) + 1,
            kind=manifest.kind,
            source_format="onnx",
            source_digest="0" * 64,
            created_at="2026-01-01T00:00:00Z",
            artefacts=[
                ReleaseArtefact(
                    target="cpu-x86",
                    manifest=manifest.digest,
                    manifest_bytes=len(manifest.to_bytes()),
                    size_bytes=manifest.size_bytes,
                    runtime=manifest.runtime,
                    precision=manifest.precision,
                )
            ],
        )
        self.releases[release.digest] = release.to_bytes()
        if is_listed:
            self.trust.list_release(release)
        return DesiredModel(
            name=manifest.name,
            version=version,
            release=release.digest,
            manifest=manifest.digest,
            manifest_bytes=len(manifest.to_bytes()),
            target="cpu-x86",
        )

    def _file(self, path: str, data: bytes) -> ArtefactFile:
        chunks = []
        for at in range(0, len(data), CHUNK_BYTES):
            part = data[at : at + CHUNK_BYTES]
            digest = hashlib.sha256(part).hexdigest()
            self.chunks[digest] = part
            chunks.append(Chunk(digest=digest, size_bytes=len(part)))
        return ArtefactFile(path=path, size_bytes=len(data), digest=hashlib.sha256(data).hexdigest(), chunks=chunks)

    def _connect(self) -> mqtt.Client:
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="plane", protocol=MQTTProtocolVersion.MQTTv5)
        certificate, key = self.authority.ensure_client(CONTROL_USER)
        ca_file = self.folder / "ca.pem"
        ca_file.write_text(self.authority.ca_pem)
        client.tls_set_context(client_context(ca_file, certificate, key))
        client.reconnect_delay_set(1, 1)
        client.on_connect = lambda c, *_: c.subscribe([(topics.all_devices("+"), 1)])
        client.on_message = self._on_message
        client.on_socket_open = lambda _c, _u, s: s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.connect("127.0.0.1", self.broker.port)
        client.loop_start()
        return client

    def _on_message(self, client: mqtt.Client, _: object, message: mqtt.MQTTMessage) -> None:
        leaf = message.topic.rsplit("/", 1)[-1]
        if leaf == "reported":
            self.reported.append(json.loads(message.payload))
        elif leaf == "event":
            event = json.loads(message.payload)
            self.events.append(event)
            ack = json.dumps({"event_ids": [event["event_id"]]})
            client.publish(topics.device(TENANT, DEVICE, "cmd/ack"), ack, qos=1)
        elif leaf == "need" and not self.is_silent:
            need = parse(Need, message.payload)
            self.needs.append(need)
            threading.Thread(target=self._serve, args=(need,), daemon=True).start()

    def _serve(self, need: Need) -> None:
        manifest = self.manifests.get(need.manifest)
        if manifest is None:
            return
        if need.manifest_wanted:
            self._send_manifest(manifest)
        wanted = {index for first, count in need.missing for index in range(first, first + count)}
        topic = topics.chunks(TENANT, need.manifest, "whole")
        for index, frame in enumerate(whole_frames(manifest, self.chunks.__getitem__)):
            if index in wanted:
                self.sent_chunks.append(index)
                if self.is_closed:
                    return
                with contextlib.suppress(RuntimeError, ValueError):  # the broker is away: the device asks again
                    self._client.publish(topic, frame, qos=1).wait_for_publish(2)
                time.sleep(self.pause_s)

    def _send_manifest(self, manifest: Manifest) -> None:
        data = manifest.to_bytes()
        for page in range(len(data) // PAGE_BYTES + 1):
            body = data[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]
            frame = ChunkFrame(
                bytes.fromhex(manifest.digest)[:8], page, len(body), Codec.RAW, body, hashlib.sha256(body).digest()[:16]
            )
            self._client.publish(topics.manifest_page(TENANT, manifest.digest), frame.to_bytes(), qos=1)


def _handler(plane: Plane) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, digest = self.path.split("/")[-2:]
            if kind == "metadata":
                found = plane.lies.get(digest) or plane.trust.fetch(digest, 1 << 20)
                self._answer(found or b"", 200 if found else 404)
            elif kind == "chunks":
                plane.http_chunks += 1
                self._answer(plane.chunks[digest])
            elif kind == "manifests":
                self._answer(plane.manifests[digest].to_bytes())
            else:
                self._answer(plane.releases[digest])

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self._answer(json.dumps(plane.enrolment(body["csr_pem"])).encode())

        def _answer(self, data: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    return Handler


class AgentProcess:
    """A real agent, started and killed as processes are."""

    def __init__(self, home: Path, *, port_file: Path | None = None, log: Path | None = None) -> None:
        self.home = home
        self.port_file = port_file or home.parent / "agent.port"
        self.log = log or home.parent / "agent.log"
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def enrol(self, url: str, profile: str, token: str = "x") -> None:
        command = ["enrol", "--url", url, "--token", token, "--home", str(self.home), "--profile", profile]
        subprocess.run([sys.executable, "-m", "edge_agent.cli", *command], check=True, timeout=60)

    def start(self, timeout_s: float = 40) -> None:
        self.launch()
        assert self.await_port(timeout_s), self.log.read_text()[-3000:]

    def launch(self, environment: Mapping[str, str] | None = None) -> None:
        """Start the process and do not wait for it."""
        self.port_file.unlink(missing_ok=True)
        command = ["run", "--home", str(self.home), "--port-file", str(self.port_file), "--die-with-parent"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edge_agent.cli", *command],
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
            )

    def await_port(self, timeout_s: float = 40) -> bool:
        """Whether it listens now; False when it died first."""
        until = time.monotonic() + timeout_s
        while not self.port_file.exists():
            if not self.is_alive:
                return False
            assert time.monotonic() < until, "the agent did not start"
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{json.loads(self.port_file.read_text())['port']}"
        return True

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(10)

    def await_death(self, timeout_s: float = 10) -> None:
        assert self._process is not None
        self._process.wait(timeout_s)

    def stop(self) -> int:
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self._process.terminate()
        return self._process.wait(20)

    def scale(self) -> float:
        """What the running tiny model multiplies by, asked through the local API."""
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1.0, 1.0, 1.0, 1.0]}]}
        answer = httpx.post(f"{self.url}/v2/models/tiny/infer", json=body, timeout=10)
        answer.raise_for_status()
        return float(answer.json()["outputs"][0]["data"][0])
