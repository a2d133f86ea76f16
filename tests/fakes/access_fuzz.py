"""Tries every door of every other tenant: topics at the real broker, addresses at the API. What came through is listed.

Mosquitto grants a SUBSCRIBE that the access list forbids and filters what it delivers, so delivery is what is tested:
many filters, many topics, and who got what. The rule that decides what is right is written here a second time, on
purpose, and shares nothing with the access list.
"""

from __future__ import annotations

import itertools
import random
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from cloud.control.broker import client_context
from model_registry.client import connect
from tests.contracts.test_control_guards import MAY_CALL
from tests.fakes.control import ControlProcess, FakeDevice, offline_desk, wait_until
from tests.fakes.control_app import LADDER, ControlApp
from tests.fakes.control_seed import seed

TENANTS = ("acme", "acme-2", "globex")
DEVICES = ("d1", "d2", "d1-2")
LEAVES = (
    "desired", "chunk", "cmd/ack", "cmd/report", "cmd", "cmd/a/b", "reported", "status", "need", "event", "rsp/x",
    "rsp", "rsp/a/b", "other", "desired/x", "event/x",
)  # fmt: skip
DIGEST = "ab" * 32


@dataclass
class Outcome:
    """What a fuzz run saw: pairs tried, what crossed a border, what was rightly wanted and did not arrive."""

    num_pairs: int = 0
    crossings: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)


def may_read(tenant: str, device: str, topic: str) -> bool:
    """Whether a device may hear a topic."""
    parts = topic.split("/")
    if parts == ["fs", "1", "epoch"]:
        return True
    if parts[:3] != ["fs", "1", tenant] or len(parts) < 4:
        return False
    if parts[3] == "a":
        return True
    is_own = parts[3] == "d" and parts[4:5] == [device]
    return is_own and (parts[5:] in (["desired"], ["chunk"]) or (parts[5:6] == ["cmd"] and len(parts) == 7))


def may_write(tenant: str, device: str, topic: str) -> bool:
    """Whether a device may say something on a topic."""
    parts = topic.split("/")
    if parts[:5] != ["fs", "1", tenant, "d", device]:
        return False
    return parts[5:] in (["reported"], ["status"], ["need"], ["event"]) or (parts[5:6] == ["rsp"] and len(parts) == 7)


class Listener:
    """One MQTT client that remembers everything it hears."""

    def __init__(self, name: str, at: dict[str, Any], tls: ssl.SSLContext, client_id: str) -> None:
        self.name = name
        self.heard: set[tuple[str, bytes]] = set()
        self._is_connected = threading.Event()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id, protocol=mqtt.MQTTv5)
        self._client.max_queued_messages_set(0)
        self._client.tls_set_context(tls)
        self._client.on_connect = lambda *_: self._is_connected.set()
        self._client.on_message = lambda _c, _u, message: self.heard.add((message.topic, bytes(message.payload)))
        self._client.connect(at["host"], at["port"], clean_start=True)
        self._client.loop_start()
        assert self._is_connected.wait(20)

    def listen(self, filters: list[str]) -> None:
        """Subscribe, and wait until the broker has answered."""
        is_granted = threading.Event()
        self._client.on_subscribe = lambda *_: is_granted.set()
        self._client.subscribe([(one, mqtt.SubscribeOptions(qos=1)) for one in filters])
        assert is_granted.wait(20)

    def forget(self, filters: list[str]) -> None:
        """Unsubscribe."""
        is_done = threading.Event()
        self._client.on_unsubscribe = lambda *_: is_done.set()
        self._client.unsubscribe(filters)
        assert is_done.wait(20)

    def say(self, topic: str, payload: bytes) -> None:
        """Publish."""
        self._client.publish(topic, payload, qos=1)

    def close(self) -> None:
        """Go away."""
        self._client.disconnect()
        self._client.loop_stop()


class TopicFuzz:
    """Devices of several tenants on one broker, each trying what belongs to all the others."""

    def __init__(self, control: ControlProcess, chance: random.Random) -> None:
        self._chance, self.outcome = chance, Outcome()
        self._numbers = itertools.count()
        at = {"host": "127.0.0.1", "port": control.mqtt_port}
        pki = control.home / "pki"
        tls = client_context(pki / "ca.pem", pki / "control.pem", pki / "control.key")
        self.observer = Listener("observer", at, tls, "observer")
        self.observer.listen(["fs/1/#", "$SYS/#"])
        self.devices: dict[tuple[str, str], Listener] = {}
        for tenant in TENANTS:
            owner = control.ok("POST", "/tokens", {"name": "owner", "role": "admin", "tenant": tenant})["token"]
            with connect(control.url, owner) as client:
                offline_desk(client, control.home / tenant)
            order = {"name": tenant, "role": "operator", "tenant": tenant}
            admin = control.ok("POST", "/tokens", order)["token"]
            for name in DEVICES:
                device = FakeDevice(control, name, admin=admin)
                mqtt_at = device.identity["mqtt"]
                self.devices[tenant, name] = Listener(f"{tenant}.{name}", mqtt_at, device.tls, mqtt_at["client_id"])

    def close(self) -> None:
        """Disconnect all."""
        for one in [self.observer, *self.devices.values()]:
            one.close()

    def topics(self, count: int) -> list[str]:
        """Topics of everyone, right and crooked ones, a different choice each time."""
        own = [f"fs/1/{t}/d/{d}/{leaf}" for t in TENANTS for d in DEVICES for leaf in LEAVES]
        shared = [f"fs/1/{t}/a{rest}" for t in TENANTS for rest in ("", f"/{DIGEST}/manifest", f"/{DIGEST}/c/whole")]
        odd = [
            "fs/1/epoch", "fs/1/epoch/x", "fs/1", "fs", "fs/2/acme/d/d1/desired", "/fs/1/acme/d/d1/desired",
            "fs/1//d/d1/desired", "fs/1/acme/d//desired", "fs/1/acme/d/d1", "fs/1/ACME/d/d1/desired",
            "fs/1/acme/D/d1/x", "fs/1/acme/d/d1/desired/", "fs/1/acme /d/d1/desired", "fs/1/acme.d1/d/d1/desired",
            "fs/1/foreign/a/x/manifest", "fs/1/globex/d/d3/desired", "fs/1/acme/b/x", "fs/1/acmé/d/d1/desired",
        ]  # fmt: skip
        pool = own + shared + odd
        return self._chance.sample(pool, min(count, len(pool)))

    def filters(self, topics: list[str]) -> list[str]:
        """Filters that would catch what is not one's own: everything, levels replaced, shared subscriptions."""
        chosen = {"#", "+/#", "fs/1/+/d/+/desired", "fs/1/+/a/#"} if self._chance.random() < 0.5 else {"fs/#"}
        for topic in self._chance.sample(topics, min(20, len(topics))):
            levels = topic.split("/")
            at = self._chance.randrange(len(levels))
            levels[at] = "+"
            if self._chance.random() < 0.3:
                levels = [*levels[: at + 1], "#"]
            chosen |= {topic, "/".join(levels)}
            if self._chance.random() < 0.1:
                chosen.add("$share/group/" + topic)
        return sorted(chosen)

    def hear_round(self, count: int) -> None:
        """The control plane says something on each topic; who hears it?"""
        topics = self.topics(count)
        wanted = {key: self.filters(topics) for key in self.devices}
        for key, device in self.devices.items():
            device.listen(wanted[key])
            device.heard.clear()
        said = {f"hear-{next(self._numbers)}".encode(): topic for topic in topics}
        for payload, topic in said.items():
            self.observer.say(topic, payload)
        self._settle()
        for (tenant, name), device in self.devices.items():
            heard = {payload: topic for topic, payload in device.heard}
            for payload, topic in said.items():
                self.outcome.num_pairs += 1
                is_allowed = may_read(tenant, name, topic)
                if payload in heard and not is_allowed:
                    self.outcome.crossings.append(f"{device.name} heard {topic}")
                is_wanted = any(mqtt.topic_matches_sub(f, topic) for f in wanted[tenant, name] if not f.startswith("$"))
                if is_allowed and is_wanted and payload not in heard:
                    self.outcome.losses.append(f"{device.name} did not hear {topic}")
            device.forget(wanted[tenant, name])

    def say_round(self, count: int) -> None:
        """Each device says something on each topic; does anyone hear it?"""
        topics = self.topics(count)
        for device in self.devices.values():
            device.listen(["#"])
        said: dict[bytes, tuple[str, str, str]] = {}
        for (tenant, name), device in self.devices.items():
            for topic in topics:
                payload = f"say-{next(self._numbers)}".encode()
                said[payload] = (tenant, name, topic)
                device.say(topic, payload)
        self._settle()
        everyone = [self.observer, *self.devices.values()]
        heard = {payload: one.name for one in everyone for _, payload in one.heard}
        observed = {payload for _, payload in self.observer.heard}
        for payload, (tenant, name, topic) in said.items():
            self.outcome.num_pairs += 1
            is_allowed = may_write(tenant, name, topic)
            if payload in heard and not is_allowed:
                self.outcome.crossings.append(f"{tenant}.{name} said {topic}, {heard[payload]} heard it")
            if is_allowed and payload not in observed:
                self.outcome.losses.append(f"{tenant}.{name} was not heard on {topic}")
        for device in self.devices.values():
            device.forget(["#"])

    def _settle(self) -> None:
        """Until everything said so far has arrived: the broker keeps the order of each sender to each hearer."""
        mark = f"mark-{next(self._numbers)}".encode()
        for (tenant, name), device in self.devices.items():
            device.listen([f"fs/1/{tenant}/d/{name}/cmd/mark"])
            device.say(f"fs/1/{tenant}/d/{name}/rsp/mark", mark + name.encode() + tenant.encode())
        marks = {mark + name.encode() + tenant.encode() for tenant, name in self.devices}
        wait_until(lambda: marks <= {payload for _, payload in self.observer.heard.copy()}, "the devices' marks", 60)
        for tenant, name in self.devices:
            self.observer.say(f"fs/1/{tenant}/d/{name}/cmd/mark", mark)
        for device in self.devices.values():
            wait_until(lambda d=device: any(p == mark for _, p in d.heard.copy()), "the control plane's mark", 60)


def fuzz_topics(control: ControlProcess, num_pairs: int, seed_number: int) -> Outcome:
    """At least `num_pairs` of client and topic, half of them heard, half of them said."""
    fuzz = TopicFuzz(control, random.Random(seed_number))
    try:
        while fuzz.outcome.num_pairs < num_pairs:
            count = min(150, -(-(num_pairs - fuzz.outcome.num_pairs) // (2 * len(fuzz.devices))))
            fuzz.hear_round(count)
            fuzz.say_round(count)
    finally:
        fuzz.close()
    return fuzz.outcome


def fuzz_api(control: ControlApp, num_pairs: int, seed_number: int) -> Outcome:
    """`num_pairs` of caller and another tenant's address: never a success on it, never a word about it."""
    chance, outcome = random.Random(seed_number), Outcome()
    things = {tenant: seed(control, tenant) for tenant in ("acme", "globex", "default")}
    callers = [(tenant, role) for tenant in ("acme", "globex") for role in (*LADDER, "device", "none")]
    callers += [("default", role) for role in LADDER[:-1]]  # its administrators are the platform's
    for tenant, role in itertools.islice(_endless(callers, chance), num_pairs):
        operation = chance.choice(sorted(MAY_CALL))
        theirs = things[chance.choice([other for other in things if other != tenant])]
        method, path = operation.split(" ")
        body = _body(chance, path, theirs) if method in ("POST", "PUT") else None
        address = path
        for name, value in theirs.items():
            address = address.replace(f"{{{name}}}", chance.choice(_values(theirs, name, value)))
        if "{" in address:
            address = address.replace("{decision_id}", "none")
        client = control.device_client(things[tenant]["serial"]) if role == "device" else control.client(role, tenant)
        answer = client.request(method, address, json=body)
        outcome.num_pairs += 1
        told = answer.text
        secret = {value for name, value in theirs.items() if name != "order"} - {"all"}
        leaked = [value for value in secret if value in told and value not in f"{address} {body}"]
        is_theirs = address != path or (body is not None and _names_theirs(path))
        if leaked or (answer.is_success and is_theirs and path != "/api/v1/enrol"):
            outcome.crossings.append(f"{tenant} {role}: {method} {address} -> {answer.status_code}, leaked {leaked}")
    return outcome


def _names_theirs(path: str) -> bool:
    return path.rsplit("/", 1)[-1] in ("rollouts", "publications", "enrolments", "tokens")


def _values(theirs: dict[str, str], name: str, value: str) -> list[str]:
    if name == "digest":
        return [theirs["digest"], theirs["manifest"], theirs["release"]]
    return [theirs["name"], theirs["group"]] if name == "name" else [value]


def _body(chance: random.Random, path: str, theirs: dict[str, str]) -> dict[str, Any]:
    tenant = theirs["group"].removeprefix("mark-").removesuffix("-group")
    bodies: dict[str, dict[str, Any]] = {
        "rollouts": {"release": theirs["release"], "group": chance.choice(["all", theirs["group"]])},
        "publications": {
            "name": "stolen", "targets": ["cpu-x86"],
            "source": {"format": "onnx", "files": [{"path": "m.onnx", "digest": theirs["digest"], "size_bytes": 9}]},
        },
        "enrolments": {"device_id": "intruder", "tenant": tenant},
        "tokens": {"name": "intruder", "role": "viewer", "tenant": tenant},
        "labels": {"labels": {"stolen": "yes"}},
        "introspect": {"token": theirs["device_token"]},
        theirs["name"]: {"device_ids": [theirs["device_id"]]},
        "{name}": {"device_ids": [theirs["device_id"]]},
    }  # fmt: skip
    return bodies.get(path.rsplit("/", 1)[-1], {})


def _endless(callers: list[tuple[str, str]], chance: random.Random) -> Iterator[tuple[str, str]]:
    while True:
        yield chance.choice(callers)
