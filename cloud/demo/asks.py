"""Real requests to a device's local API, and what the device said about where they ran.

A request that meets a process which is being restarted is sent again; the answer says how many tries it took.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from cloud.demo.patience import WrongPlaceError
from cloud.demo.platform import Platform
from cloud.demo.report import AnswerResult
from wire.errors import ForeshoreError, NotFoundError, UnavailableError

TIMEOUT = httpx.Timeout(120.0, connect=5.0)
QUEUE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Chat:
    """One chat completion to send; `prefer` is a wish for `device` or `cloud`."""

    what: str
    device_id: str
    prompt: str
    model: str = "smollm2"
    max_tokens: int = 24
    prefer: str | None = None


class Asker:
    """Sends requests to the devices of one platform."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform

    def classify(self, device_id: str, image: Path, model: str = "vision") -> AnswerResult:
        """Send a photograph to a device; the answer is its best label."""
        return self._until("device", lambda: classify(self._platform.address(device_id), device_id, image, model=model))

    def chat(self, request: Chat, expected: str) -> AnswerResult:
        """Stream a chat completion; `WrongPlaceError` when it keeps running elsewhere than `expected`."""
        return self._until(expected, lambda: chat(self._platform.address(request.device_id), request))

    def queue_lengths(self, device_id: str) -> tuple[int, int]:
        """How many generations run and wait on a device, by its own metrics."""
        text = httpx.get(f"{self._platform.address(device_id)}/metrics", timeout=TIMEOUT).text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and line[0] != "#")
        running, waiting = (values[f"foreshore_agent_num_requests_{kind}"] for kind in ("running", "waiting"))
        return int(float(running)), int(float(waiting))

    def _until(self, expected: str, ask: Callable[[], AnswerResult]) -> AnswerResult:
        tries = 0

        def once() -> AnswerResult:
            nonlocal tries
            tries += 1
            answer = ask()
            if answer.location != expected:
                raise WrongPlaceError(
                    f"{answer.what!r} ran on the {answer.location}, expected on the {expected}: {answer.reason}"
                )
            return answer

        return replace(self._platform.patiently(once), tries=tries)


def classify(url: str, device_id: str, image: Path, *, model: str) -> AnswerResult:
    """Send a photograph once."""
    begin = time.perf_counter()
    try:
        response = httpx.post(
            f"{url}/v1/classify", params={"model": model}, content=image.read_bytes(), timeout=TIMEOUT
        )
    except httpx.TransportError as error:
        raise UnavailableError(f"{device_id} broke off: {error}") from error
    _check(response)
    best = response.json()["labels"][0]
    return AnswerResult(
        what=image.name,
        device_id=device_id,
        location=response.headers["x-foreshore-location"],
        reason=response.headers["x-foreshore-reason"],
        answer=f"{best['label']} ({best['score']:.2f})",
        ttft_ms=(time.perf_counter() - begin) * 1e3,
    )


def chat(url: str, request: Chat) -> AnswerResult:
    """Stream a chat completion once."""
    body = {
        "model": request.model,
        "messages": [{"role": "user", "content": request.prompt}],
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {} if request.prefer is None else {"x-foreshore-prefer": request.prefer}
    begin, first = time.perf_counter(), None
    text = ""
    usage: dict[str, Any] = {}
    cloud: dict[str, Any] = {}
    try:
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=TIMEOUT
        ) as response:
            if response.status_code != 200:
                response.read()
            _check(response)
            for chunk in _events(response):
                usage = chunk.get("usage") or usage
                cloud = chunk.get("foreshore") or cloud
                for choice in chunk.get("choices", []):
                    piece = choice.get("delta", {}).get("content") or ""
                    first = first or (time.perf_counter() if piece else None)
                    text += piece
            said = response.headers
    except httpx.TransportError as error:
        raise UnavailableError(f"{request.device_id} broke off: {error}") from error
    end = time.perf_counter()
    num_tokens = int(usage.get("completion_tokens", 0))
    decode_s = end - first if first else 0.0
    return AnswerResult(
        what=request.what,
        device_id=request.device_id,
        location=said["x-foreshore-location"],
        reason=said["x-foreshore-reason"],
        answer=text.strip().replace("\n", " "),
        ttft_ms=(first - begin) * 1e3 if first else None,
        tokens_per_s=(num_tokens - 1) / decode_s if num_tokens > 1 and decode_s > 0 else None,
        prompt_tokens=int(usage.get("prompt_tokens", 0)),
        cached_tokens=int((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)),
        path=_path(cloud),
    )


def _path(cloud: dict[str, Any]) -> str:
    """Which workers computed an offloaded answer, and how much KV went from one to the other."""
    if not cloud:
        return ""
    moved = int(cloud.get("kv_bytes_moved") or 0)
    return f"{cloud.get('prefill_worker') or '-'} -> {cloud.get('decode_worker')} ({moved / 1e6:.1f} MB of KV)"


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            event = json.loads(line[len("data: ") :])
            if "error" in event:
                raise UnavailableError(f"the stream ended with an error: {event['error']}")
            yield event


def _check(response: httpx.Response) -> None:
    if response.status_code == 200:
        return
    kind = {404: NotFoundError, 429: UnavailableError, 502: UnavailableError, 503: UnavailableError}
    raise kind.get(response.status_code, ForeshoreError)(
        f"{response.request.url} answered {response.status_code}: {response.text[:500]}"
    )
