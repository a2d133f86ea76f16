"""The running platform as the demo sees it: a `foreshore up` child process, its addresses, and the public commands.

Every call is patient: a process that is killed meanwhile comes back, and the call goes on. `foreshore up` itself is
started again when it dies; its home folder holds everything it needs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cloud.demo.patience import PATIENCE_S, patiently
from model_registry.client import ControlClient, connect
from model_registry.exit_codes import UNREACHABLE
from wire.errors import ForeshoreError, TimedOutError, UnavailableError
from wire.tether import tethered

READY_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 30.0
COMMAND_TIMEOUT_S = 900.0
T = TypeVar("T")


class Platform:
    """Starts and stops `foreshore up`, and calls what it serves."""

    def __init__(self, home: Path, cloud_models: Sequence[str]) -> None:
        self.home = home
        self._cloud_models = tuple(cloud_models)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start everything and wait until it is ready."""
        self._state_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "cloud.cli", "up", "--home", str(self.home)]
        for model in self._cloud_models:
            command += ["--cloud-model", model]
        self._process = subprocess.Popen(tethered(command), stdin=subprocess.DEVNULL)  # ends with us, however we end
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self.state().get("ready"):
            if self._process.poll() is not None:
                raise ForeshoreError(
                    f"foreshore up ended with exit code {self._process.returncode}", remedy=f"see {self.home / 'logs'}"
                )
            if time.monotonic() > deadline:
                raise TimedOutError("foreshore up did not become ready", remedy=f"see {self.home / 'logs'}")
            time.sleep(0.2)

    def ensure_running(self) -> None:
        """Start `foreshore up` again if it has died."""
        if self._process is not None and self._process.poll() is not None:
            self.start()

    def stop(self) -> int:
        """Stop everything as Ctrl-C would; the exit code of `foreshore up`."""
        if self._process is None:
            return 0
        self._process.terminate()
        try:
            return self._process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait(timeout=STOP_TIMEOUT_S)

    def wait(self) -> int:
        """Wait until somebody stops `foreshore up`."""
        return 0 if self._process is None else self._process.wait()

    def state(self) -> dict[str, Any]:
        """The supervisor's state file; empty before it exists."""
        return json.loads(self._state_file.read_text()) if self._state_file.exists() else {}

    def address(self, name: str) -> str:
        """The URL of a process: `control`, `gateway` or a device id."""
        try:
            return str(self.state()["addresses"][name])
        except KeyError as error:
            raise UnavailableError(f"{name} is not running", remedy=f"see {self.home / 'logs'}") from error

    def patiently(self, call: Callable[[], T], *, timeout_s: float = PATIENCE_S) -> T:
        """Repeat `call` while a process that it needs is being restarted."""
        return patiently(call, timeout_s=timeout_s, before_retry=self.ensure_running)

    def control(self, call: Callable[[ControlClient], T]) -> T:
        """One exchange with the control plane, with the administrator's token."""

        def exchange() -> T:
            with connect(self.address("control"), self.token_file.read_text().strip()) as client:
                return call(client)

        return self.patiently(exchange)

    def publish(self, path: Path, arguments: Sequence[str]) -> dict[str, Any]:
        """`foreshore publish`, its progress on the terminal; what it printed as JSON."""
        return self.patiently(lambda: self._publish(path, arguments))

    def _publish(self, path: Path, arguments: Sequence[str]) -> dict[str, Any]:
        command = ["publish", str(path), "--url", self.address("control"), "--token-file", str(self.token_file)]
        command += ["--key", str(self.home / "keys" / "publisher.pem"), "--json", *arguments]
        result = subprocess.run(
            [sys.executable, "-m", "cloud.cli", *command],
            stdout=subprocess.PIPE,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        lines = result.stdout.decode().strip().splitlines()
        document = json.loads(lines[-1]) if lines else {}
        if result.returncode == UNREACHABLE:
            raise UnavailableError(f"foreshore publish did not reach the control plane: {document}", remedy="try again")
        if result.returncode != 0:
            raise ForeshoreError(f"foreshore publish ended with exit code {result.returncode}: {document}")
        return dict(document)

    @property
    def token_file(self) -> Path:
        """The administrator's token."""
        return self.home / "cloud" / "tokens" / "admin"

    @property
    def _state_file(self) -> Path:
        return self.home / "state.json"
