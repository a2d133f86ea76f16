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


def _rollout() -> dict[str, Any]:
    """A rollout whose canary was good and whose second wave halted it."""
    slots = [{"device_id": "dock-camera-1", "wave": 1, "state": "succeeded", "phase": "committed"},
             {"device_id": "till-17", "wave": 2, "state": "failed", "phase": "probe", "attempts": 2,
              "reason": "probe_failed: 3 of 8 golden inputs gave another label"},
             {"device_id": "gate-box-2", "wave": 2, "state": "withdrawn", "phase": "fetch",
              "reason": "the rollout was halted"}]  # fmt: skip
    slots += [{"device_id": f"till-{n}", "wave": 2, "state": "succeeded", "phase": "committed"} for n in range(18, 23)]
    slots += [{"device_id": f"kiosk-{n}", "wave": 3, "state": "skipped", "reason": "the rollout was halted"}
              for n in range(12)]  # fmt: skip
    slots.append({"device_id": "old-box", "wave": None, "state": "skipped",
                  "reason": "cpu-x86: needs 512 MiB of memory, the budget is 256 MiB"})  # fmt: skip
    return {
        "rollout_id": "ro-1", "status": "halted", "model": "vision", "version": "1.1.0", "release": DIGEST,
        "group": "all", "wave": 2, "num_waves": 3, "num_devices": 21, "approved_by": "bert", "created_by": "anna",
        "counts": {"succeeded": 6, "failed": 1, "withdrawn": 1, "skipped": 13}, "approval": "operator", "joins": True,
        "gate": {"max_failures": 0, "min_success_ratio": 0.9, "min_settled_ratio": 0.8}, "created_at": NOW,
        "pace": {"per_minute": 10, "factor": 2, "every": 50, "max_per_minute": 200}, "rate_per_minute": 10,
        "window": {"opens_s": 79_200, "lasts_s": 21_600, "weekdays": [5, 6]}, "soak_s": 30, "device_timeout_s": 600,
        "waves_planned": [{"count": 1}, {"percent": 40}, {"percent": 100}], "decision_id": "de-1",
        "reason": "1 failed, 0 are allowed (till-17: probe_failed: 3 of 8 golden inputs gave another label)",
        "waves": [{"wave": 1, "is_canary": True}, {"wave": 2, "is_current": True}, {"wave": 3}],
        "devices": slots,
    }  # fmt: skip


def _other_rollouts(rollout: dict[str, Any]) -> list[dict[str, Any]]:
    """One that moves and one that waits for a second person."""
    moving = {**rollout, "rollout_id": "ro-2", "status": "running", "reason": "", "version": "1.2.0",
              "decision_id": None, "counts": {"succeeded": 40, "offered": 12, "pending": 50},
              "num_devices": 102}  # fmt: skip
    moving["devices"] = [
        {"device_id": "dock-camera-1", "wave": 1, "state": "succeeded", "phase": "committed"},
        {"device_id": "till-17", "wave": 2, "state": "offered", "phase": "wait_window", "deadline": NOW},
        {"device_id": "gate-box-2", "wave": 2, "state": "pending"},
        {"device_id": "kiosk-1", "wave": 3, "state": "pending"},
    ]  # fmt: skip
    waiting = {**rollout, "rollout_id": "ro-3", "status": "awaiting_approval", "reason": "", "approved_by": None,
               "counts": {"pending": 3}, "num_devices": 3, "decision_id": None, "devices": [], "waves": []}  # fmt: skip
    return [moving, waiting]


def _audit() -> list[dict[str, Any]]:
    """Some changes."""
    rows = [("rollout.halted", "rollout-engine", "ro-1", {"reason": "1 failed, 0 are allowed (till-17: probe_failed)"}),
            ("device.wish", "rollout-engine", "till-17", {"model": "vision", "version": "1.1.0", "generation": 4}),
            ("publisher-key.add", "anna", DIGEST, {"name": "release key"}),
            ("rollout.create", "anna", "ro-1", {"release": DIGEST, "group": "all", "devices": 20})]  # fmt: skip
    return [
        {"sequence": len(rows) - n, "at": NOW, "tenant": "home", "actor": actor, "action": action, "subject": subject,
         "details": details, "digest": DIGEST}
        for n, (action, actor, subject, details) in enumerate(rows)
    ]  # fmt: skip


def _deliveries() -> list[dict[str, Any]]:
    """What a webhook was told."""
    return [
        {"delivery_id": "msg-3", "action": "rollout.halted", "state": "pending", "attempts": 2, "created_at": NOW,
         "answer": "no answer: ConnectError: connection refused", "due_at": NOW, "finished_at": None},
        {"delivery_id": "msg-2", "action": "rollout.running", "state": "delivered", "attempts": 1, "created_at": NOW,
         "answer": "204 No Content", "due_at": None, "finished_at": NOW},
        {"delivery_id": "msg-1", "action": "rollout.create", "state": "given_up", "attempts": 16, "created_at": NOW,
         "answer": "503 Service Unavailable", "due_at": None, "finished_at": NOW},
    ]  # fmt: skip


def _fits() -> list[dict[str, Any]]:
    """What the devices would get, as the resolver says it."""
    runs = "runs: none of 16 rules objects"
    needs = "needs processor features avx512_vnni, here are all but avx512_vnni"
    return [
        {"device_id": "dock-camera-1", "target": None, "rule": "contrib_operator", "online": True, "verdicts": {},
         "reason": "jetson-orin uses operator com.microsoft.GroupQueryAttention[qk_norm], which exists in "
         "CUDAExecutionProvider from 1.32, WebGpuExecutionProvider from 1.32; here are CPUExecutionProvider of 1.23.2"},
        {"device_id": "gate-box-2", "target": "cpu-x86", "rule": "every_rule", "online": True, "verdicts": {},
         "reason": f"cpu-x86 {runs}; wanted more: cpu-x86-int8 {needs}"},
        {"device_id": "till-17", "target": "cpu-x86-int8", "rule": "every_rule", "online": False, "verdicts": {},
         "reason": f"cpu-x86-int8 {runs}"},
    ]  # fmt: skip


def _webhook() -> dict[str, Any]:
    """A webhook with its newest delivery."""
    return {"webhook_id": "hook-1", "url": "https://example.org/foreshore", "actions": ["rollout.*", "device.revoke"],
            "created_by": "anna", "created_at": NOW, "newest_delivery": _deliveries()[0]}  # fmt: skip


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
         "precision": "fp32", "deltas": [], "recipe_digest": DIGEST,
         "tools": {"onnxruntime": "1.32.0", "onnx": "1.23.2"},
         "gates": [{"name": "top1_agreement", "value": 1.0, "limit": 0.97, "sense": ">=", "passed": True}]},
        {"target": "cpu-x86-int8", "manifest": DIGEST, "size_bytes": 4 << 20, "runtime": "onnxruntime",
         "precision": "int8-qdq", "deltas": [{"name": "from-1-0-0", "wire_bytes": 310_000}], "gates": gates,
         "recipe_digest": DIGEST, "tools": {"onnxruntime": "1.32.0"}, "reproducibility": "byte-identical",
         "runtime_choice": {
             "basis": "rule",
             "chosen": {"runtime": "onnxruntime", "reason": "the only runtime of this target", "figures": {}},
             "rejected": [{"runtime": "tensorrt", "reason": "the target has no GPU", "figures": {"latency_ms": 3.2}}],
         }},
    ]  # fmt: skip
    release = {"release": DIGEST, "name": "vision", "version": "1.1.0", "sequence": 2, "kind": "tensor",
               "licence": "BSD-3-Clause", "created_at": NOW, "artefacts": artefacts,
               "signed_by": {"publisher": "alice", "keys": [DIGEST, "ab" * 32]}}  # fmt: skip
    rollout = _rollout()
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
        "devices": devices, "rollouts": [rollout, *_other_rollouts(rollout)], "releases": [release],
        "models": [{"name": "vision", "kind": "tensor"}], "decisions": [record],
        "groups": [
            {"name": "all", "filter": None, "device_ids": None, "num_devices": 3},
            {"name": "docks", "filter": "profile = jetson* and not label.site = lab", "num_devices": 1},
            {"name": "tills", "filter": None, "device_ids": ["till-17", "till-18"], "num_devices": 2},
        ],
        "audit": _audit(), "webhooks": [_webhook()],
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

    @app.get("/api/v1/audit/verify")
    def verify(request: Request) -> dict[str, Any]:
        check(request)
        return {"entries": 4, "head": DIGEST, "is_whole": True, "fault": None}

    @app.get("/api/v1/webhooks/{webhook_id}/deliveries")
    def deliveries(webhook_id: str, request: Request) -> dict[str, Any]:
        check(request)
        return {"items": _deliveries(), "next": None}

    @app.get("/api/v1/models/{name}/compatibility")
    def compatibility(name: str, request: Request) -> dict[str, Any]:
        check(request)
        return {"name": name, "version": "1.1.0", "items": _fits(), "next": None}

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
        if table == "webhooks":
            return {**_webhook(), "secret": "whsec_c2VjcmV0IG9mIHRoZSBzYW1wbGU="}
        return {"rollout_id": "ro-1"}

    install(app)
    return app
