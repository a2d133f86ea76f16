"""A small control plane for the publish client's tests: blobs, one publication at a time, events, on a real socket.

It answers by docs/interfaces.md. `faults` are answered (or connections cut) before anything else, once each, in order.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from model_registry.client import ControlClient
from model_registry.manifest import Manifest, Release, ReleaseArtefact, sha256
from model_registry.sources import SourceFile, source_digest
from model_registry.transport import Transport
from tests.fakes.trust import MemoryCounter

TOKEN = "publisher-token"


@dataclass
class ControlState:
    """What the server knows and what it was asked; tests change it."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: list[tuple[str, int]] = field(default_factory=list)  # (path start, status; 0 = cut the connection)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    publication: dict[str, Any] = field(default_factory=dict)
    signed: bytes | None = None
    cancelled: bool = False
    build: Callable[[dict[str, Any], ControlState], dict[str, Any]] | None = None
    stages: int = 2  # looks at the publication until it is built
    streams: bool = True
    counter: MemoryCounter = field(default_factory=MemoryCounter)


def client_for(url: str, token: str = TOKEN) -> ControlClient:
    """The real client, which does not wait between its attempts."""
    return ControlClient(Transport(url, token, sleep=lambda _: None))


def write_model(folder: Path) -> Path:
    """The smallest ONNX model."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [result])
    onnx.save(
        helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)]), folder / "model.onnx"
    )
    return folder / "model.onnx"


def build_release(body: dict[str, Any], state: ControlState, **changes: Any) -> dict[str, Any]:
    """Compile as a control plane would, without compiling: a manifest per target and a release to sign."""
    files = [SourceFile(**file) for file in body["source"]["files"]]
    digest = source_digest(body["source"]["format"], files)
    artefacts = []
    for target in body["targets"]:
        manifest = manifest_for(body, target, digest)
        state.blobs[manifest.digest] = manifest.to_bytes()
        artefacts.append(
            ReleaseArtefact(
                target=target,
                manifest=manifest.digest,
                manifest_bytes=len(manifest.to_bytes()),
                size_bytes=manifest.size_bytes,
                runtime=manifest.runtime,
                precision=manifest.precision,
            )
        )
    fields = {
        "tenant": "demo", "name": body["name"], "version": body.get("version", "1.0.0"), "sequence": 1,
        "kind": body["kind"], "licence": body["licence"], "source_format": body["source"]["format"],
        "source_digest": digest, "created_at": "2026-01-01T00:00:00Z", "artefacts": artefacts,
    }  # fmt: skip
    release = Release(**{**fields, **changes})
    return {"state": "awaiting_signature", "release": base64.b64encode(release.to_bytes()).decode()}


def manifest_for(body: dict[str, Any], target: str, digest: str, /, **changes: Any) -> Manifest:
    """A manifest as the compiler would make it for this publication."""
    document = {
        "schema": "foreshore.manifest/1", "name": body["name"], "kind": body["kind"], "target": target,
        "runtime": "onnxruntime", "precision": "int8", "entry": "model.onnx", "source_digest": digest,
        "files": [
            {"path": "model.onnx", "size_bytes": 1, "digest": sha256(b"x"),
             "chunks": [{"digest": sha256(b"x"), "size_bytes": 1}]}
        ],
        "gates": [{"name": "top1", "value": 0.99, "limit": 0.9, "sense": ">=", "passed": True}],
        **changes,
    }  # fmt: skip
    return Manifest.model_validate(document)


@contextmanager
def running_control(state: ControlState) -> Iterator[str]:
    """Serve `state` on loopback; yields the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    server.daemon_threads = False
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="fake control plane")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join(timeout=10)
        server.server_close()


def _handler(state: ControlState) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """One request."""

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

        def do_HEAD(self) -> None:
            self._route(b"")

        def do_GET(self) -> None:
            self._route(b"")

        def do_PUT(self) -> None:
            self._route(self._body())

        def do_POST(self) -> None:
            self._route(self._body())

        def _body(self) -> bytes:
            if self.headers.get("transfer-encoding") == "chunked":
                data = b""
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data
            return self.rfile.read(int(self.headers.get("content-length", 0)))

        def _route(self, body: bytes) -> None:
            path = self.path.removeprefix("/api/v1/").split("?")[0]
            state.requests.append(f"{self.command} {path}")
            fault = next((f for f in state.faults if f"{self.command} {path}".startswith(f[0])), None)
            if fault is not None:
                state.faults.remove(fault)
                if fault[1] == 0:
                    self.close_connection = True
                    self.connection.close()
                    return
                self._problem(fault[1], "", "told to")
            elif self.headers.get("authorization") != f"Bearer {TOKEN}":
                self._problem(401, "not_authenticated", "who are you?")
            elif path.startswith("blobs/"):
                self._blob(path[6:], body)
            elif path == "publications":
                document = json.loads(body)
                state.publication = {"publication_id": "p1", "state": "compiling", "body": document, "looks": 0}
                self._json(self._look())
            elif path == "publications/p1":
                self._json(self._look())
            elif path == "publications/p1/events" and state.streams:
                self._send(200, b": hello\n\nevent: publication\ndata: {}\n\n", "text/event-stream")
            elif path == "publications/p1/sign":
                document = json.loads(body)
                state.signed = base64.b64decode(document["metadata"])
                state.counter.submit_metadata(document["role"], state.signed)
                state.publication["state"] = "released"
                self._json({"publication_id": "p1", "state": "released"})
            elif path == "publications/p1/cancel":
                state.cancelled = True
                self._json({})
            elif path == "trust":
                self._json(state.counter.get_trust())
            elif path == "trust/metadata":
                document = json.loads(body)
                self._json(state.counter.submit_metadata(document["role"], base64.b64decode(document["metadata"])))
            elif path.startswith("trust/metadata/"):
                found = state.counter.find_metadata(path.rsplit("/", 1)[-1], 1 << 20)
                if found is None:
                    self._problem(404, "not_found", "no such metadata")
                else:
                    self._send(200, found, "application/json")
            else:
                self._problem(404, "not_found", f"no {path}")

        def _look(self) -> dict[str, Any]:
            publication = state.publication
            publication["looks"] += 1
            if publication["state"] == "compiling" and publication["looks"] > state.stages:
                publication.update((state.build or build_release)(publication["body"], state))
            shown = {key: value for key, value in publication.items() if key not in ("body", "looks")}
            return {"jobs": state.jobs, **shown}

        def _blob(self, digest: str, body: bytes) -> None:
            if self.command == "PUT":
                if sha256(body) != digest:
                    self._problem(422, "integrity", "wrong digest")
                    return
                state.blobs[digest] = body
                self._json({})
            elif digest not in state.blobs:
                self._problem(404, "not_found", "no such blob")
            else:
                data = state.blobs[digest]
                start = int((self.headers.get("range") or "bytes=0-")[6:].rstrip("-"))
                self._send(206 if start else 200, data[start:], "application/octet-stream")

        def _json(self, document: Any) -> None:
            self._send(200, json.dumps(document).encode(), "application/json")

        def _problem(self, status: int, code: str, detail: str) -> None:
            document = {"status": status, "code": code, "detail": detail, "remedy": "try something else"}
            self._send(status, json.dumps(document).encode(), "application/problem+json")

        def _send(self, status: int, data: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    return Handler
