"""A gateway as its own process before serving workers, for tests with real clients."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

TOKEN = "test-token"


class GatewayProcess:
    """`foreshore gateway` with a token file; stopped by `stop`."""

    def __init__(self, folder: Path, workers: dict[str, tuple[str, str]], model: Path, *options: str) -> None:
        tokens = folder / "tokens"
        tokens.write_text(f"{TOKEN}\n")
        command = [sys.executable, "-m", "cloud.gateway.cli", "--model-name", "tiny", "--tokenizer", str(model)]
        for name, (role, address) in workers.items():
            command += ["--worker", f"{name}={role}@{address}"]
        if "--control" not in options:
            command += ["--token-file", str(tokens)]
        self.process = subprocess.Popen([*command, "--die-with-parent", *options], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], 60)
        line = self.process.stdout.readline() if readable else ""
        if not line:
            self.stop()
            raise RuntimeError("the gateway did not start")
        self.url = f"http://{json.loads(line)['address']}"

    def wait_for_workers(self, count: int) -> None:
        """Wait until the gateway has heard of this many workers."""
        deadline = time.monotonic() + 30
        while True:
            workers = httpx.get(f"{self.url}/healthz", timeout=10).json()["workers"]["tiny"]
            if len(workers) >= count:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"only {workers} answered")
            time.sleep(0.05)

    def stop(self) -> int:
        """End the process cleanly and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code
