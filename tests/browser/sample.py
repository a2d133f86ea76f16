"""A control plane's API with fixed, plausible documents: for looking at the pages and for tests of their own rules.

Not a stand-in for the control plane in tests of behaviour: those run the real one.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse

from cloud.control.pages import install
from wire.decision import Candidate, Input, decide

TOKEN = "sample-token"
NOW = "2026-11-24T07:30:00+00:00"
DIGEST = "4f" * 32


def device(name: str, profile: str, *, online: bool = True, **model: Any) -> dict[str, Any]:
    """One device document."""
    report = {"name": "vision", "active_version": "1.0.0", "active_manifest": DIGEST, "phase": "committed", **model}
    hardware = {
        "profile": profile, "targets": ["cpu-x86-int8", "cpu-x86"], "architecture": "x86_64",
        "memory_bytes": 8 << 30, "memory_budget_bytes": 2 << 30, "disk_free_bytes": 40 << 30,
        "runtimes": {"onnxruntime": "1.23.0"},
    }  # fmt: skip
    wished = {"name": "vision", "version": "1.1.0", "manifest": "ab" * 32}
    return {
        "device_id": name, "tenant": "home", "online": online, "last_seen_at": NOW, "enrolled_at": NOW, "generation": 4,
        "reported_generation": 4 if model.get("phase") is None else 3, "is_in_sync": model.get("phase") is None,
        "boot_epoch": 3, "agent_version": "0.1.0", "profile": profile, "hardware": hardware, "models": [report],
        "local_api": "http://127.0.0.1:8411", "error": None, "desired": {"generation": 4, "models": [wished]},
    }  # fmt: skip


def sample_app() -> FastAPI:
    """The sample control plane with the real pages."""
    app = FastAPI()
    devices = [
        device("dock-camera-1", "jetson-orin", result="succeeded"),
        device("gate-box-2", "cpu-small", phase="fetch", bytes_done=9 << 20, bytes_total=14 << 20, encoding="whole"),
        device("till-17", "cpu-x86", online=False, result="rolled_back",
               reason="probe_failed: 3 of 8 golden inputs gave another label"),
    ]  # fmt: skip
    gates = [{"name": "top1_agreement", "value": 0.984, "limit": 0.97, "sense": ">=", "passed": True}]
    artefacts = [
        {"target": "cpu-x86", "manifest": DIGEST, "size_bytes": 14 << 20, "runtime": "onnxruntime",
         "precision": "fp32", "deltas": [], "gates": []},
        {"target": "cpu-x86-int8", "manifest": DIGEST, "size_bytes": 4 << 20, "runtime": "onnxruntime",
         "precision": "int8-qdq", "deltas": [{"name": "from-1-0-0", "wire_bytes": 310_000}], "gates": gates},
    ]  # fmt: skip
    release = {"release": DIGEST, "name": "vision", "version": "1.1.0", "sequence": 2, "kind": "tensor",
               "licence": "BSD-3-Clause", "created_at": NOW, "artefacts": artefacts}  # fmt: skip
    rollout: dict[str, Any] = {
        "rollout_id": "ro-1", "status": "halted", "model": "vision", "version": "1.1.0", "release": DIGEST,
        "group": "all", "wave": 1, "num_waves": 2, "num_devices": 3, "counts": {"failed": 1, "skipped": 2},
        "gate": {"max_failures": 0, "min_success_ratio": 1.0}, "created_at": NOW, "decision_id": "de-1",
        "reason": "1 device failed and none may: till-17 rolled back (probe_failed: 3 of 8 golden inputs differ)",
        "waves": [{"wave": 1, "is_current": True}, {"wave": 2, "is_current": False}],
        "devices": [
            {"device_id": "till-17", "wave": 1, "state": "failed", "phase": "probe", "reason": "probe_failed"},
            {"device_id": "dock-camera-1", "wave": 2, "state": "skipped"},
            {"device_id": "gate-box-2", "wave": 2, "state": "skipped"},
        ],
    }  # fmt: skip
    record = decide(
        decision_id="de-1", kind="offload", policy="offload/1", config={}, decided_at=NOW, subject="gate-box-2",
        inputs={"queue_length": Input(3, 0.0), "round_trip_ms": Input(42.5, 1.8)},
        candidates=[
            Candidate("device", {"wait_ms": 2100.0, "energy_j": 40.0}),
            Candidate("cloud", {"wait_ms": 320.0, "transfer_ms": 61.0}),
            Candidate("neighbour", excluded=("no site peer is known",)),
        ],
        weights={"energy_j": 2.0},
    ).to_dict()  # fmt: skip
    tables: dict[str, list[dict[str, Any]]] = {
        "devices": devices, "rollouts": [rollout], "releases": [release], "groups": [{"name": "shop", "filter": "x"}],
        "models": [{"name": "vision", "kind": "tensor"}], "decisions": [record],
    }  # fmt: skip

    def check(request: Request) -> None:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            raise HTTPException(401, "no token")

    @app.get("/api/v1/events")
    async def events(request: Request) -> StreamingResponse:
        check(request)

        async def stream() -> Any:
            yield ": hello\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    @app.get("/api/v1/{table}")
    def listing(table: str, request: Request) -> dict[str, Any]:
        check(request)
        return {"items": tables[table], "next": None}

    @app.get("/api/v1/{table}/{key}")
    def one(table: str, key: str, request: Request) -> dict[str, Any]:
        check(request)
        for row in tables[table]:
            if key in (row.get("device_id"), row.get("rollout_id"), row.get("decision_id"), row.get("name")):
                return row
        raise HTTPException(404, f"{key} does not exist")

    @app.post("/api/v1/{table}", status_code=201)
    async def create(table: str, request: Request) -> dict[str, Any]:
        check(request)
        if table == "enrolments":
            name = (await request.json())["device_id"]
            command = f"foreshore-agent enrol --url http://127.0.0.1:8080 --token fs-enrol-{'x' * 32}"
            return {"enrolment_token": "t", "device_id": name, "expires_at": NOW, "command": command}
        return {"rollout_id": "ro-1"}

    install(app)
    return app
