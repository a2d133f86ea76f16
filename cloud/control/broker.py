"""The managed Mosquitto: found, configured, started, watched, reloaded, stopped.

Every client shows a certificate of our authority that is not on its revocation list, and its common name is its user
name. The access list has one entry per enrolled device. `allow` has the broker read both lists again: a revoked device
hears and says nothing from then on, and its next handshake fails; `link.Link.cut_off` ends the connection it has. The
broker is a cache: when it dies it is started again with a growing pause, and the control plane publishes everything
anew. It never outlives this process.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cloud.control.authority import CONTROL_USER, Authority
from wire import topics
from wire.errors import MissingExtraError, UnavailableError
from wire.process import die_with_parent, replace_durably

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
MAX_PACKET_BYTES = 1 << 20
MAX_QUEUED_MESSAGES = 1_000_000  # not 0, "no limit": with it Mosquitto 2.0 hangs up after each publication it forbids
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
CALM_AFTER_S = 30.0  # a broker that ran this long starts again with the first pause
MAX_LOG_BYTES = 8 << 20


@dataclass(frozen=True)
class DeviceAccess:
    """One device that may use the broker."""

    tenant: str
    device_id: str


class MosquittoMissingError(MissingExtraError):
    """There is no Mosquitto on this machine."""

    def __init__(self) -> None:
        super().__init__("mosquitto", "control")
        self.message = "no Mosquitto was found on PATH, in /usr/sbin or in .cache/mosquitto"
        self.remedy = "run scripts/setup, or: apt install mosquitto, or name a broker of your own with --broker-host"


def find_mosquitto(also: Path | None = None) -> Path:
    """The Mosquitto program: `also`, PATH, the usual system folders, or what scripts/setup unpacked."""
    found = shutil.which("mosquitto")
    unpacked = Path(".cache/mosquitto/mosquitto")
    candidates = [also, Path(found) if found else None, Path("/usr/sbin/mosquitto"), Path("/usr/local/sbin/mosquitto")]
    candidates += [unpacked.resolve(), Path(__file__).resolve().parents[2] / unpacked]
    for path in candidates:
        if path is not None and path.is_file() and os.access(path, os.X_OK):
            return path
    raise MosquittoMissingError


def access_list(devices: Iterable[DeviceAccess]) -> str:
    """Mosquitto's access file: the control plane may do everything below our root, a device its own things only."""
    lines = [f"user {CONTROL_USER}", f"topic readwrite {topics.ROOT}/#", "topic read $SYS/#", ""]
    for device in sorted(devices, key=lambda one: (one.tenant, one.device_id)):
        lines.append(f"user {topics.mqtt_user(device.tenant, device.device_id)}")
        lines += [f"topic read {topics.device(device.tenant, device.device_id, leaf)}" for leaf in topics.DEVICE_READS]
        lines += [
            f"topic write {topics.device(device.tenant, device.device_id, leaf)}" for leaf in topics.DEVICE_WRITES
        ]
        lines += [f"topic read {topics.shared(device.tenant)}", f"topic read {topics.EPOCH}", ""]
    return "\n".join(lines)


class Broker:
    """One Mosquitto as a child process, its files in `folder`."""

    def __init__(
        self,
        folder: Path,
        authority: Authority,
        *,
        host: str,
        port: int,
        advertised: list[str],
        program: Path | None = None,
    ) -> None:
        self.host, self.port = host, port
        self.restarts = 0
        self._folder = folder
        self._authority = authority
        self._advertised = advertised
        self._program = find_mosquitto(program)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._is_stopping = threading.Event()
        self._watcher: threading.Thread | None = None
        self._is_decided = threading.Event()  # the first start has ended, well or not
        self._failure: Exception | None = None

    def start(self, devices: Iterable[DeviceAccess]) -> None:
        """Write the files, start the broker, wait until it listens. Raises `UnavailableError` with its last words."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        self._write_access(devices)
        self._write_config()
        self._watcher = threading.Thread(target=self._watch, name="broker-watch", daemon=True)
        self._watcher.start()
        if not self._is_decided.wait(START_TIMEOUT_S + 1) or self._failure is not None:
            failure = self._failure or UnavailableError("Mosquitto did not start in time", remedy="read mosquitto.log")
            self.stop()
            raise failure

    def allow(self, devices: Iterable[DeviceAccess]) -> None:
        """Replace the access list and have the broker read it and the authority's revocation list."""
        with self._lock:
            self._write_access(devices)
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signal.SIGHUP)

    @property
    def pid(self) -> int | None:
        """The broker's process id while it runs."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def stop(self) -> None:
        """End the broker: ask, wait, insist."""
        self._is_stopping.set()
        with self._lock:
            process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_TIMEOUT_S)
        if self._watcher is not None:
            self._watcher.join(STOP_TIMEOUT_S)

    def _watch(self) -> None:
        # All starts happen on this one thread: the kernel's death signal follows the thread that made the child.
        pause, chance = FIRST_PAUSE_S, random.Random()
        while not self._is_stopping.is_set():
            started = time.monotonic()
            try:
                self._launch()
            except (UnavailableError, OSError) as error:
                self._failure = error
            process = self._process
            self._is_decided.set()
            if process is not None:
                process.wait()
            pause = FIRST_PAUSE_S if time.monotonic() - started > CALM_AFTER_S else min(pause * 2, LONGEST_PAUSE_S)
            if self._is_stopping.wait(pause * (0.5 + chance.random() / 2)):
                return
            self.restarts += 1

    def _launch(self) -> None:
        log = self._folder / "mosquitto.log"
        if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
        with self._lock:
            if self._is_stopping.is_set():
                return
            with log.open("ab") as output:
                self._process = process = subprocess.Popen(
                    [str(self._program), "-c", str(self._folder / "mosquitto.conf")],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    preexec_fn=_die_with_parent,
                    start_new_session=True,
                )
        self._await_listening(process, log)

    def _await_listening(self, process: subprocess.Popen[bytes], log: Path) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                break
            try:
                socket.create_connection((self.host, self.port), 1.0).close()
                return
            except OSError:
                time.sleep(0.02)
        words = log.read_bytes()[-600:].decode(errors="replace").strip()
        raise UnavailableError(f"Mosquitto does not listen on port {self.port}: {words}", remedy="read mosquitto.log")

    def _write_access(self, devices: Iterable[DeviceAccess]) -> None:
        replace_durably(self._folder / "access", access_list(devices).encode(), mode=0o600)

    def _write_config(self) -> None:
        certificate, key = self._authority.ensure_server([self.host, "localhost", *self._advertised])
        user = ["user root"] if os.geteuid() == 0 else []  # as `mosquitto` it could not read our 0600 files
        lines = [
            *user,
            "per_listener_settings true",
            f"max_queued_messages {MAX_QUEUED_MESSAGES}",
            "max_inflight_messages 100",
            f"max_packet_size {MAX_PACKET_BYTES}",
            "set_tcp_nodelay true",
            "persistent_client_expiration 7d",
            "persistence true",
            f"persistence_location {self._folder}/",
            "autosave_interval 60",
            "log_dest stderr",
            "log_type error",
            "log_type warning",
            "log_type notice",
            "connection_messages false",
            f"listener {self.port} {self.host}",
            "allow_anonymous false",
            f"acl_file {self._folder / 'access'}",
            f"cafile {self._authority.ca_file}",
            f"certfile {certificate}",
            f"keyfile {key}",
            f"crlfile {self._authority.crl_file}",
            "require_certificate true",
            "use_identity_as_username true",
            "tls_version tlsv1.2",
        ]
        replace_durably(self._folder / "mosquitto.conf", ("\n".join(lines) + "\n").encode(), mode=0o600)


def client_context(ca_file: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS for a client of the broker: our authority only, and our own certificate."""
    context = ssl.create_default_context(cafile=str(ca_file))
    context.load_cert_chain(str(certificate), str(key))
    return context


def _die_with_parent() -> None:
    die_with_parent(signal.SIGTERM)
