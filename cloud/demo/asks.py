"""Real requests to a device's local API, and what the device said about where they ran."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from cloud.demo.report import AnswerResult
from wire.errors import ForeshoreError

TIMEOUT = httpx.Timeout(120.0, connect=5.0)


def classify(url: str, device_id: str, image: Path, model: str = "vision") -> AnswerResult:
    """Send a photograph to a device; the answer is its best label."""
    begin = time.perf_counter()
    response = httpx.post(f"{url}/v1/classify", params={"model": model}, content=image.read_bytes(), timeout=TIMEOUT)
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


def chat(
    url: str, device_id: str, what: str, prompt: str, *, model: str = "smollm2", max_tokens: int = 24, **headers: str
) -> AnswerResult:
    """Stream a chat completion from a device; `headers` are x-foreshore ones with underscores for hyphens."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = {f"x-foreshore-{name.replace('_', '-')}": value for name, value in headers.items()}
    begin, first = time.perf_counter(), None
    text = ""
    usage: dict[str, Any] = {}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=sent, timeout=TIMEOUT) as response:
        if response.status_code != 200:
            response.read()
        _check(response)
        for chunk in _events(response):
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", []):
                piece = choice.get("delta", {}).get("content") or ""
                first = first or (time.perf_counter() if piece else None)
                text += piece
        said = response.headers
    end = time.perf_counter()
    num_tokens = int(usage.get("completion_tokens", 0))
    decode_s = end - first if first else 0.0
    return AnswerResult(
        what=what,
        device_id=device_id,
        location=said["x-foreshore-location"],
        reason=said["x-foreshore-reason"],
        answer=text.strip().replace("\n", " "),
        ttft_ms=(first - begin) * 1e3 if first else None,
        tokens_per_s=(num_tokens - 1) / decode_s if num_tokens > 1 and decode_s > 0 else None,
        cached_tokens=int((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)),
    )


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            event = json.loads(line[len("data: ") :])
            if "error" in event:
                raise ForeshoreError(f"the stream ended with an error: {event['error']}")
            yield event


def _check(response: httpx.Response) -> None:
    if response.status_code != 200:
        raise ForeshoreError(f"{response.request.url} answered {response.status_code}: {response.text[:500]}")
