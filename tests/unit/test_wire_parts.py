"""Topics, envelopes, errors, decisions and process promises: the small parts of the wire."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from wire import decision, errors, process, topics
from wire.decision import Candidate, Input, decide, rank, score
from wire.envelope import MAX_SIGNATURES, Envelope, Signature, key_id, open_envelope, parse_envelope, sign
from wire.errors import (
    ForeshoreError,
    InvalidInputError,
    MissingExtraError,
    SignatureError,
    TooLargeError,
    UnavailableError,
)
from wire.exposure import listen
from wire.frames import HEADER, MAX_BODY_BYTES, ChunkFrame, Codec, parse_frame

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)


@given(tenant=NAMES, device=NAMES, leaf=st.sampled_from(["reported", "need", "rsp/report", "event"]))
def test_a_device_topic_is_taken_apart_as_it_was_built(tenant: str, device: str, leaf: str) -> None:
    parsed = topics.parse_device(topics.device(tenant, device, leaf))
    assert (parsed.tenant, parsed.device_id, parsed.leaf) == (tenant, device, leaf)


@given(st.text(max_size=80))
def test_only_names_without_wildcards_and_separators_stand_in_topics(name: str) -> None:
    try:
        built = topics.device(name, "d", "need")
    except InvalidInputError:
        return
    assert not set(name) & set("/+#.$ \n")
    assert built.count("/") == 5


@pytest.mark.parametrize(
    "topic", ["", "fs/1/epoch", "fs/2/t/d/x/need", "fs/1/t/a/x/need", "fs/1/T/d/x/need", "fs/1/t/d/x"]
)
def test_other_topics_are_refused(topic: str) -> None:
    with pytest.raises(InvalidInputError):
        topics.parse_device(topic)


def test_shared_topics_name_an_artefact() -> None:
    assert topics.chunks("t", "a" * 64, "whole") == f"fs/1/t/a/{'a' * 64}/c/whole"
    assert topics.manifest_page("t", "a" * 64).startswith(topics.shared("t")[:-1])
    with pytest.raises(InvalidInputError):
        topics.chunks("t", "A" * 64, "whole")


def test_every_error_has_a_code_of_its_own_and_a_status() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, ForeshoreError)]
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert all(400 <= kind.http_status < 600 for kind in kinds)


def test_an_error_says_what_happened_and_what_to_do() -> None:
    error = TooLargeError("it has 5 bytes", remedy="at most 4", size_bytes=5)
    assert str(error) == "it has 5 bytes (at most 4)"
    assert error.to_dict()["details"] == {"size_bytes": 5}
    assert "pip install 'foreshore[control]'" in str(MissingExtraError("obstore", "control"))


def test_an_envelope_over_its_limits_is_refused_before_it_is_read() -> None:
    with pytest.raises(TooLargeError):
        parse_envelope(b"x" * 101, max_bytes=100)
    crowded = Envelope("t", b"p", tuple(Signature(str(n), b"s") for n in range(MAX_SIGNATURES + 1)))
    with pytest.raises(SignatureError, match="17"):
        parse_envelope(crowded.to_bytes())


def test_every_changed_byte_of_a_signed_payload_is_noticed() -> None:
    key = Ed25519PrivateKey.generate()
    trusted = {key_id(key.public_key()): key.public_key()}
    envelope = sign("t", b"payload", key)
    assert open_envelope(envelope.to_bytes(), "t", trusted) == b"payload"
    for place in range(7):
        changed = bytearray(b"payload")
        changed[place] ^= 1
        with pytest.raises(SignatureError):
            open_envelope(Envelope("t", bytes(changed), envelope.signatures).to_bytes(), "t", trusted)


def test_a_frame_notices_every_flipped_bit() -> None:
    whole = ChunkFrame(bytes(8), 1, 5, Codec.RAW, b"hello", bytes(16)).to_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        with pytest.raises(ForeshoreError):
            parse_frame(bytes(changed))


def test_a_frame_over_its_size_is_refused() -> None:
    with pytest.raises(TooLargeError):
        parse_frame(bytes(HEADER.size + MAX_BODY_BYTES + 1))
    with pytest.raises(TooLargeError):
        parse_frame(ChunkFrame(bytes(8), 1, 256 * 1024 + 1, Codec.RAW, b"", bytes(16)).to_bytes())


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    """Up to six options with terms or reasons against them."""
    values = st.floats(-1e6, 1e6)
    found = []
    for index in range(draw(st.integers(0, 6))):
        excluded = draw(st.sampled_from([(), (), ("offline",), ("too large", "private")]))
        terms = draw(st.dictionaries(st.sampled_from(["latency_s", "cost", "energy_j"]), values, max_size=3))
        found.append(Candidate(f"c{index}", terms, excluded))
    return found


@given(options=candidates(), weights=st.dictionaries(st.sampled_from(["latency_s", "cost"]), st.floats(0, 100)))
def test_a_record_that_crossed_a_boundary_replays_to_the_same_choice(
    options: list[Candidate], weights: dict[str, float]
) -> None:
    made = decide(
        decision_id="d", kind="route", policy="p/1", config={}, decided_at="2026-01-01T00:00:00+00:00",
        inputs={"load": Input(1, 0.1)}, candidates=options, weights=weights,
    )  # fmt: skip
    again = decision.from_dict(json.loads(json.dumps(made.to_dict())))
    assert decision.replay(again) == made.chosen
    open_options = [option for option in options if not option.excluded]
    assert (made.chosen is None) == (not open_options)
    if made.chosen is not None:
        best = min(score(option, weights) for option in open_options)
        assert score(rank(options, weights)[0], weights) == best
    assert made.reason


def test_what_would_have_changed_the_answer_does_change_it() -> None:
    options = [Candidate("a", {"latency_s": 1.0}), Candidate("b", {"latency_s": 2.0, "cost": 1.0})]
    made = decide(
        decision_id="d", kind="route", policy="p", config={}, decided_at="t", inputs={}, candidates=options, weights={}
    )
    assert made.counterfactual == "b wins if latency_s < 0"
    better = Candidate("b", {"latency_s": -0.001, "cost": 1.0})
    assert rank([options[0], better], {})[0].name == "b"


def test_an_unknown_kind_of_decision_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="horoscope"):
        decide(
            decision_id="d",
            kind="horoscope",
            policy="p",
            config={},
            decided_at="t",
            inputs={},
            candidates=[],
            weights={},
        )


def test_a_port_file_appears_whole_and_with_its_mode(tmp_path: Path) -> None:
    process.write_port_file(tmp_path / "a" / "port.json", "127.0.0.1", 99)
    document = json.loads((tmp_path / "a" / "port.json").read_bytes())
    assert document == {"host": "127.0.0.1", "port": 99, "pid": os.getpid()}
    process.replace_durably(tmp_path / "secret", b"x", mode=0o600)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "secret"]


def _replace_for_ever(path: Path) -> None:
    letter = 0
    while True:
        letter += 1
        process.replace_durably(path, bytes([65 + letter % 26]) * 100_000)


def test_a_writer_killed_at_any_moment_leaves_one_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "state"
    spawn = multiprocessing.get_context("fork")
    for delay_ms in range(1, 30, 4):
        writer = spawn.Process(target=_replace_for_ever, args=(path,))
        writer.start()
        time.sleep(delay_ms / 1000)
        writer.kill()
        writer.join(10)
        data = path.read_bytes() if path.exists() else b"A" * 100_000
        assert len(data) == 100_000
        assert len(set(data)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux only")
def test_a_process_ends_with_its_parent() -> None:
    child = "import time, wire.process as p; p.die_with_parent(); print('up', flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE);\
 p.stdout.readline(); print(p.pid, flush=True)"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, timeout=60, check=True)
    pid = int(done.stdout)
    deadline = time.monotonic() + 30
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux only")
def test_a_tethered_command_ends_with_a_killed_parent_and_never_begins_for_a_dead_one() -> None:
    parent = "import subprocess as s, time; from wire.tether import tethered;\
 p = s.Popen(tethered(['sh', '-c', 'echo up; exec sleep 60']), stdout=s.PIPE);\
 p.stdout.readline(); print(p.pid, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        pid = int(running.stdout.readline())
        assert _runs(pid)
        running.kill()
    deadline = time.monotonic() + 30
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(pid)
    orphan = [sys.executable, "-m", "wire.tether", str(int(signal.SIGKILL)), str(pid), "echo", "begun"]
    done = subprocess.run(orphan, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_connection_of_a_listener_sends_at_once() -> None:
    async def accepted() -> int:
        sent_at_once = asyncio.get_running_loop().create_future()

        def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            sent_at_once.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(greet, sock=listen("127.0.0.1", 0)) as server:
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.close()
            return int(await sent_at_once)

    assert asyncio.run(accepted()) == 1


def test_a_taken_port_is_named() -> None:
    with listen("127.0.0.1", 0) as first, pytest.raises(UnavailableError, match=str(first.getsockname()[1])):
        listen("127.0.0.1", first.getsockname()[1])


def test_a_free_port_lies_where_no_client_connects_from_and_is_free() -> None:
    lowest_lent = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [process.free_port() for _ in range(20)]
    assert len(set(ports)) > 10
    assert all(process.LOWEST_FREE_PORT <= port < lowest_lent for port in ports)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", ports[0]))


def test_without_room_below_the_lent_ports_any_free_port_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_lowest_lent_port", lambda: process.LOWEST_FREE_PORT)
    assert process.free_port() > 1023
