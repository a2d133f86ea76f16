"""Serving workers for tests: real gRPC servers over tiny models, in this process or as processes of their own."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cloud.serving.engine import EngineConfig, build_engine
from cloud.serving.engine_thread import EngineThread
from cloud.serving.scheduler import SchedulerConfig
from cloud.serving.worker import WorkerConfig, WorkerServer
from wire import engine_pb2 as pb

BLOCK_SIZE = 8
LIMITS = SchedulerConfig(max_batch_tokens=40, max_chunk_tokens=24, max_running=8, max_waiting=8)


@asynccontextmanager
async def running_worker(
    model: Path, role: str, *, name: str = "", token: str | None = None, blocks: int = 128
) -> AsyncIterator[tuple[str, WorkerServer]]:
    """A worker in this process; yields its address and the server."""
    engine = build_engine(EngineConfig(model, num_blocks=blocks, block_size=BLOCK_SIZE, scheduler=LIMITS))
    server = WorkerServer(WorkerConfig(name or role, role, token), EngineThread(engine))
    port = await server.start("127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{port}", server
    finally:
        await server.drain(0)


class WorkerProcess:
    """A worker as its own process, to be killed for real."""

    def __init__(self, model: Path, role: str, *options: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "cloud.serving.cli", "--model", str(model), "--role", role, "--threads", "1"]
        command += ["--port", str(port), "--block-size", str(BLOCK_SIZE), "--kv-blocks", "128", "--die-with-parent"]
        self.process = subprocess.Popen(
            [*command, "--chunk-tokens", "24", *options], stdout=subprocess.PIPE, env={**os.environ}, text=True
        )
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], 120)
        line = self.process.stdout.readline() if readable else ""
        if not line:
            self.process.kill()
            self.process.wait()
            raise RuntimeError(f"the {role} worker did not start")
        self.address = str(json.loads(line)["address"])

    def kill(self, signum: int = signal.SIGKILL) -> int:
        """Send a signal and wait for the end."""
        self.process.send_signal(signum)
        code = self.process.wait(timeout=60)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def stop(self) -> None:
        """End the process if it still runs."""
        if self.process.poll() is None:
            self.kill()
        elif self.process.stdout is not None:
            self.process.stdout.close()


def generate_request(request_id: str, token_ids: list[int], **options: Any) -> Any:
    """A greedy request of 16 tokens that ignores end-of-sequence; `options` are sampling fields or message fields."""
    sampling: dict[str, Any] = {"max_tokens": 16, "ignore_eos": True}
    names = set(pb.Sampling.DESCRIPTOR.fields_by_name)
    sampling |= {key: value for key, value in options.items() if key in names}
    message = {key: value for key, value in options.items() if key not in names}
    return pb.GenerateRequest(
        protocol_version=message.pop("protocol_version", 1),
        request_id=request_id,
        token_ids=token_ids,
        salt=message.pop("salt", b"tenant"),
        sampling=pb.Sampling(**sampling),
        **message,
    )


def wait_until(condition: Any, timeout_s: float = 30.0) -> None:
    """Wait for a condition that another process brings about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.02)
