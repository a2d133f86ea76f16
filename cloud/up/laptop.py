"""Composes the whole platform on one machine from its public doors: the same commands a person would type.

Order: control plane with its broker -> publisher key -> compile worker -> serving workers -> gateway -> devices, each
enrolled once with a one-time token. Everything lives below one home folder; starting again resumes it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cloud.ports import Ports
from cloud.up.child import ChildSpec
from cloud.up.fleet import Device, Fleet, ServingWorker
from cloud.up.supervisor import Supervisor
from model_registry.client import ControlClient, connect
from model_registry.trust.desk import SigningDesk
from model_registry.trust.keys import create_key, load_key
from wire.errors import ForeshoreError, UnavailableError

HOST = "127.0.0.1"
PUBLISHER = "laptop"
ENROL_TIMEOUT_S = 60.0
CONTROL_READY_S = 60.0
SERVING_READY_S = 180.0


@dataclass(frozen=True)
class CloudModel:
    """A language model of the serving tier: its name for applications and its folder."""

    name: str
    folder: Path


def place(fleet: Fleet, models: Sequence[CloudModel]) -> list[tuple[ServingWorker, CloudModel]]:
    """Which serving worker holds which model: the fleet's workers the first one, one more worker each further one."""
    first = [(worker, models[0]) for worker in fleet.workers] if models else []
    alone = models if models and not first else models[1:]
    return first + [(ServingWorker(name=f"both-{number}", role="both"), model) for number, model in enumerate(alone, 1)]


class Laptop:
    """One machine's worth of Foreshore."""

    def __init__(self, home: Path, fleet: Fleet, models: Sequence[CloudModel], supervisor: Supervisor) -> None:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.home = home
        self._fleet = fleet
        self._models = tuple(models)
        self._supervisor = supervisor
        self._ports = Ports(home / "ports.json")

    @property
    def control_url(self) -> str:
        """Where the control plane and its pages are."""
        return self._supervisor.addresses["control"]

    @property
    def admin_token_file(self) -> Path:
        """The token that the control plane made at its first start."""
        return self.home / "cloud" / "tokens" / "admin"

    @property
    def keys_folder(self) -> Path:
        """Where the offline keys of this machine lie: root, targets and the publisher `laptop`."""
        return self.home / "keys"

    def start(self) -> None:
        """Start everything and return when the last process accepts connections."""
        gateway_port = self._ports.get("gateway") if self._has_serving else None
        self._start_control(gateway_port)
        self._establish_trust()
        self._start_compile_worker()
        if gateway_port is not None:
            self._start_serving(gateway_port)
        for device in self._fleet.devices:
            self._start_device(device)

    @property
    def _has_serving(self) -> bool:
        return bool(self._models)

    def _start_control(self, gateway_port: int | None) -> None:
        port, mqtt_port = self._ports.get("control"), self._ports.get("mqtt")
        command = ["cloud", "--home", str(self.home / "cloud"), "--port", str(port), "--mqtt-port", str(mqtt_port)]
        device_port = self._ports.get("devices")
        command += ["--device-port", str(device_port)]
        if gateway_port is not None:
            command += ["--gateway-url", f"http://{HOST}:{gateway_port}"]
        self._supervisor.start_and_wait(self._foreshore("control", command), timeout_s=CONTROL_READY_S)
        self._supervisor.addresses["control"] = f"http://{HOST}:{port}"
        self._supervisor.addresses["devices"] = f"https://{HOST}:{device_port}"
        self._supervisor.addresses["mqtt"] = f"mqtts://{HOST}:{mqtt_port}"

    def _establish_trust(self) -> None:
        """Once: the offline keys, the root of trust and the publisher `laptop`, as `foreshore keys init` does."""
        with self._client() as client:
            if any(one["role"] == PUBLISHER for one in client.get_trust()["roles"]):
                return
            paths = [self.keys_folder / f"{name}.pem" for name in ("root", "targets", "publisher")]
            root, targets, publisher = (load_key(path) if path.exists() else create_key(path) for path in paths)
            desk = SigningDesk(client, self.keys_folder / "trust", [root, targets, publisher])
            desk.initialise([root.public_key()], [targets.public_key()])
            desk.add_publisher(PUBLISHER, [publisher.public_key()])

    def _start_compile_worker(self) -> None:
        token = self.home / "cloud" / "tokens" / "worker"
        command = ["worker", "--url", self.control_url, "--token-file", str(token)]
        self._supervisor.start(self._foreshore("compile-1", command, has_port=False))

    def _start_serving(self, gateway_port: int) -> None:
        placed = [(worker, model, self._ports.get(worker.name)) for worker, model in place(self._fleet, self._models)]
        children = [self._supervisor.start(self._serving_spec(worker, model, port)) for worker, model, port in placed]
        command = ["gateway", "--port", str(gateway_port), "--control", self.control_url]
        command += ["--control-token-file", str(self.home / "cloud" / "tokens" / "gateway")]
        for model in self._models:
            command += ["--model-name", model.name, "--tokenizer", str(model.folder)]
        for worker, model, port in placed:
            command += ["--worker", f"{worker.name}={worker.role}@{HOST}:{port}#{model.name}"]
        children.append(self._supervisor.start(self._foreshore("gateway", command)))
        self._supervisor.run_until(
            lambda: all(child.is_ready for child in children), timeout_s=SERVING_READY_S, what="the serving tier"
        )
        self._supervisor.addresses["gateway"] = f"http://{HOST}:{gateway_port}"

    def _serving_spec(self, worker: ServingWorker, model: CloudModel, port: int) -> ChildSpec:
        command = ["serve", "--role", worker.role, "--model", str(model.folder), "--port", str(port)]
        return self._foreshore(worker.name, command)

    def _start_device(self, device: Device) -> None:
        home = self.home / "devices" / device.device_id
        if not (home / "identity.json").exists():
            self._enrol(device, home)
        port = self._ports.get(device.device_id)
        port_file = self._port_file(device.device_id)
        command = ("run", "--home", str(home), "--port", str(port), "--port-file", str(port_file))
        spec = ChildSpec(
            device.device_id,
            (sys.executable, "-m", "edge_agent.cli", *command),
            self._log_file(device.device_id),
            port_file,
        )
        self._supervisor.start_and_wait(spec)
        self._supervisor.addresses[device.device_id] = f"http://{HOST}:{port}"

    def _enrol(self, device: Device, home: Path) -> None:
        with self._client() as client:
            enrolment = client.post("/enrolments", {"device_id": device.device_id})
        url = self._supervisor.addresses["devices"]
        command = [sys.executable, "-m", "edge_agent.cli", "enrol", "--url", url, "--home", str(home)]
        command += ["--token-file", "-", "--profile", device.profile]  # a command line can be read by everyone
        token = enrolment["enrolment_token"]
        result = subprocess.run(
            command, input=token, capture_output=True, text=True, timeout=ENROL_TIMEOUT_S, check=False
        )
        if result.returncode != 0:
            raise ForeshoreError(f"{device.device_id} could not enrol: {result.stderr.strip()[-500:]}")

    def _client(self) -> ControlClient:
        if not self.admin_token_file.exists():
            raise UnavailableError(f"{self.admin_token_file} is missing", remedy="the control plane makes it at start")
        return connect(self.control_url, self.admin_token_file.read_text().strip())

    def _foreshore(self, name: str, command: list[str], *, has_port: bool = True) -> ChildSpec:
        port_file = self._port_file(name) if has_port else None
        if port_file is not None:
            command = [*command, "--port-file", str(port_file)]
        return ChildSpec(name, (sys.executable, "-m", "cloud.cli", *command), self._log_file(name), port_file)

    def _port_file(self, name: str) -> Path:
        return self.home / "run" / f"{name}.port"

    def _log_file(self, name: str) -> Path:
        return self.home / "logs" / f"{name}.log"
