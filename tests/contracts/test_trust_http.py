"""A hostile HTTP server against the client's source: each answer is refused by its name and read no further."""

from __future__ import annotations

import asyncio
import ssl
import tracemalloc
from pathlib import Path

import pytest

from edge_agent.config import Identity, Mqtt, Trust
from edge_agent.fetch import HttpSource as ContentSource
from model_registry.trust.client import MAX_TIMESTAMP_BYTES, TrustClient
from model_registry.trust.clock import TrustedClock
from model_registry.trust.errors import MetadataUnavailableError, TrustError
from model_registry.trust.source import HttpSource
from tests.fakes import hostile_http
from tests.fakes.hostile_http import Answer, hostile_server
from tests.fakes.trust import MemoryTrust
from wire.errors import ForeshoreError

ATTACKS: list[tuple[Answer, str]] = [
    (hostile_http.endless, "endless_metadata"),
    (hostile_http.chunked_endless, "endless_metadata"),
    (hostile_http.oversized, "oversized_metadata"),
    (hostile_http.slow, "slow_metadata"),
    (hostile_http.slow_headers, "slow_metadata"),
    (hostile_http.silent, "slow_metadata"),
    (hostile_http.bomb, "malformed_metadata"),
    (hostile_http.cut, "metadata_unavailable"),
    (hostile_http.redirect, "metadata_unavailable"),
    (hostile_http.garbage, "metadata_unavailable"),
]


@pytest.mark.parametrize(("answer", "code"), ATTACKS, ids=lambda one: getattr(one, "__name__", None))
def test_a_hostile_answer_is_refused_by_its_name(answer: Answer, code: str, tmp_path: Path) -> None:
    trust = MemoryTrust(tmp_path / "desk")
    TrustClient.initialise(tmp_path / "device", trust.counter.repository.roots[0])
    with hostile_server(answer) as url:
        client = TrustClient(tmp_path / "device", HttpSource(url, grace_s=0.5), TrustedClock())
        with pytest.raises((TrustError, MetadataUnavailableError)) as refused:
            client.refresh()
    assert refused.value.code == code
    assert [path.name for path in (tmp_path / "device").iterdir()] == ["root.json"]


@pytest.mark.parametrize("answer", [hostile_http.endless, hostile_http.bomb, hostile_http.chunked_endless])
def test_no_more_than_the_limit_is_ever_held(answer: Answer) -> None:
    with hostile_server(answer) as url:
        source = HttpSource(url, grace_s=0.5)
        with pytest.raises(TrustError):
            source.fetch("timestamp.json", MAX_TIMESTAMP_BYTES)  # warms up imports
        tracemalloc.start()
        with pytest.raises(TrustError):
            source.fetch("timestamp.json", MAX_TIMESTAMP_BYTES)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 8 << 20  # the socket's pieces and an HTTP client, not what was sent


@pytest.mark.parametrize(
    "answer", [hostile_http.endless, hostile_http.oversized, hostile_http.bomb], ids=lambda one: one.__name__
)
def test_content_is_read_no_further_than_its_signed_length(answer: Answer) -> None:
    async def ask(url: str) -> None:
        identity = Identity(
            tenant="acme", device_id="edge-1", control_url=url, device_token="t", mqtt=Mqtt(host="127.0.0.1", port=1),
            trust=Trust.model_validate({"root": "", "time": "2026-11-01T00:00:00Z"}),
        )  # fmt: skip
        source = ContentSource(identity, ssl.create_default_context())
        try:
            await source.chunk("a" * 64, 1000)
        finally:
            await source.close()

    with hostile_server(answer) as url, pytest.raises(ForeshoreError) as refused:
        asyncio.run(ask(url))
    assert refused.value.code in {"too_large", "integrity"}
