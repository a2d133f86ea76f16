"""A device that speaks the real protocol and runs no model: it enrols, takes its signed wish, reports the phases.

It checks the wish's signature as a device must, fetches nothing, and ends each update as it was told to.
"""

from __future__ import annotations

import ssl
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import paho.mqtt.client as mqtt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from paho.mqtt.enums import CallbackAPIVersion
from tuf.api.metadata import Targets

from model_registry.trust.keys import envelope_keys
from model_registry.trust.roles import DIRECTOR, delegated_keys
from model_registry.trust.trusted import read_metadata
from wire import topics
from wire.envelope import open_envelope
from wire.messages import (
    DESIRED_TYPE,
    Desired,
    DesiredModel,
    Hardware,
    ModelState,
    Phase,
    Reported,
    Result,
    Status,
    parse,
)

PHASES = (Phase.PREFLIGHT, Phase.FETCH, Phase.VERIFY, Phase.PROBE, Phase.SWITCH, Phase.SOAK)


class SimulatedDevice:
    """One device. `hold` keeps its updates in the fetch phase until `release` is called."""

    def __init__(self, url: str, admin: str, device_id: str, folder: Path, *, hold: bool = False) -> None:
        self._hardware = Hardware(profile="simulated", targets=["cpu-x86"], architecture="x86_64")
        self._url, self._admin = url, admin
        self._enrolment = _enrol(url, admin, device_id, self._hardware, folder)
        client_id = self._enrolment["mqtt"]["client_id"]
        self._device_id = device_id
        self._may_finish = threading.Event()
        self._wish: Desired | None = None
        self._wished = threading.Event()
        self._is_stopping = False
        if not hold:
            self._may_finish.set()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id, protocol=mqtt.MQTTv5)
        context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        context.load_cert_chain(str(folder / "device.pem"), str(folder / "device.key"))
        self._client.tls_set_context(context)
        self._client.on_connect = self._connected
        self._client.on_message = self._heard
        self._worker = threading.Thread(target=self._work, name=f"device {device_id}")

    def start(self) -> None:
        """Connect and be online."""
        mqtt_at = self._enrolment["mqtt"]
        self._client.connect(mqtt_at["host"], mqtt_at["port"], keepalive=20)
        self._client.loop_start()
        self._worker.start()

    def stop(self) -> None:
        """Disconnect."""
        self._is_stopping = True
        self._may_finish.set()
        self._wished.set()
        self._worker.join(10)
        self._client.disconnect()
        self._client.loop_stop()

    def release(self) -> None:
        """Let a held update finish."""
        self._may_finish.set()

    def _topic(self, leaf: str) -> str:
        return f"{topics.ROOT}/{self._enrolment['tenant']}/d/{self._device_id}/{leaf}"

    def _connected(self, client: mqtt.Client, *_: Any) -> None:
        client.subscribe(self._topic("desired"), qos=1)
        client.publish(self._topic("status"), Status(online=True, boot_epoch=1).to_bytes(), qos=1, retain=True)
        self._report([], 0)

    def _heard(self, client: mqtt.Client, userdata: Any, message: mqtt.MQTTMessage) -> None:
        payload = open_envelope(message.payload, DESIRED_TYPE, self._director_keys())
        self._wish = parse(Desired, payload)
        self._wished.set()

    def _director_keys(self) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {self._admin}"}
        answer = httpx.get(f"{self._url}/api/v1/trust/metadata/2.targets.json", headers=headers, timeout=30)
        keys, _ = delegated_keys(read_metadata(Targets, answer.raise_for_status().content).signed, DIRECTOR)
        return envelope_keys(keys)

    def _work(self) -> None:
        while True:
            self._wished.wait(60)
            self._wished.clear()
            if self._is_stopping or self._wish is None:
                return
            for model in self._wish.models:
                for phase in PHASES:
                    self._report([self._state(model, phase)], self._wish.generation)
                    if phase is Phase.FETCH:
                        self._may_finish.wait(60)
            done = [self._state(model, Phase.COMMITTED) for model in self._wish.models]
            self._report(done, self._wish.generation)

    @staticmethod
    def _state(model: DesiredModel, phase: Phase) -> ModelState:
        is_done = phase is Phase.COMMITTED
        return ModelState(
            name=model.name, phase=phase, wanted_manifest=model.manifest, attempt=model.attempt,
            rollout_id=model.rollout_id, result=Result.SUCCEEDED if is_done else None,
            active_version=model.version if is_done else None, active_manifest=model.manifest if is_done else None,
        )  # fmt: skip

    def _report(self, models: list[ModelState], generation: int) -> None:
        reported = Reported(
            generation=generation, agent_version="simulated", boot_epoch=1, reported_at=datetime.now(UTC),
            hardware=self._hardware, models=models,
        )  # fmt: skip
        self._client.publish(self._topic("reported"), reported.to_bytes(), qos=1, retain=True)


def _enrol(url: str, admin: str, device_id: str, hardware: Hardware, folder: Path) -> dict[str, Any]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device_id)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    with httpx.Client(base_url=f"{url}/api/v1", timeout=30, headers={"authorization": f"Bearer {admin}"}) as client:
        token = client.post("/enrolments", json={"device_id": device_id}).raise_for_status().json()
        body = {
            "enrolment_token": token["enrolment_token"], "csr_pem": request.public_bytes(pem).decode(),
            "hardware": hardware.model_dump(mode="json", exclude_none=True),
        }  # fmt: skip
        answer: dict[str, Any] = client.post("/enrol", json=body).raise_for_status().json()
    folder.mkdir(parents=True, exist_ok=True)
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "device.key").write_bytes(private)
    (folder / "device.pem").write_text(answer["certificate_pem"])
    (folder / "ca.pem").write_text(answer["ca_pem"])
    return answer
