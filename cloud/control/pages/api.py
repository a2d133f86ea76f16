"""How the pages talk to the API: in the same process, over ASGI, with the browser's own token.

The pages hold no rights and no queries of their own: whatever the API refuses to this token, the page cannot show or
do. Problem details (RFC 9457) come back as the error types of `wire.errors`, with their remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

import httpx
from starlette.types import ASGIApp

from wire.errors import (
    ConflictError,
    ForeshoreError,
    InvalidInputError,
    NotAllowedError,
    NotAuthenticatedError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)

PREFIX: Final = "/api/v1"
TIMEOUT_S: Final = 15.0
MAX_PAGES: Final = 50

_ERRORS: Final[Mapping[int, type[ForeshoreError]]] = {
    400: InvalidInputError,
    401: NotAuthenticatedError,
    403: NotAllowedError,
    404: NotFoundError,
    409: ConflictError,
    422: InvalidInputError,
    429: OverloadedError,
    503: UnavailableError,
}


class PageApi:
    """The API as one browser session sees it. An empty token asks as nobody.

    `address` is how the browser reached us: what the API says about its own address has to hold for the browser.
    """

    def __init__(self, app: ASGIApp, address: str, token: str) -> None:
        self._app = app
        self._root = address.rstrip("/") + PREFIX
        self._headers = {"authorization": f"Bearer {token}"} if token else {}

    async def get(self, path: str, **params: Any) -> Any:
        """The JSON at `path`; raises the `ForeshoreError` that fits the status."""
        return await self._call("GET", path, params=params)

    async def all(self, path: str, **params: Any) -> list[dict[str, Any]]:
        """All items of a listing, page by page, up to `MAX_PAGES`."""
        items: list[dict[str, Any]] = []
        for _ in range(MAX_PAGES):
            page = await self.get(path, **params)
            if isinstance(page, list):
                return page
            items += page["items"]
            cursor = page.get("next")
            if cursor is None:
                break
            params["cursor"] = cursor
        return items

    async def newest(self, path: str, limit: int, **params: Any) -> list[dict[str, Any]]:
        """The first `limit` items of a listing that the API gives newest first."""
        page = await self.get(path, limit=limit, **params)
        items: list[dict[str, Any]] = page if isinstance(page, list) else page["items"]
        return items[:limit]

    async def post(self, path: str, body: Any = None) -> Any:
        """Send `body` as JSON; the answer's JSON, None when it has no body."""
        return await self._call("POST", path, json=body)

    async def put(self, path: str, body: Any) -> Any:
        """Replace what is at `path`."""
        return await self._call("PUT", path, json=body)

    async def delete(self, path: str) -> Any:
        """Delete what is at `path`."""
        return await self._call("DELETE", path)

    async def _call(self, method: str, path: str, *, params: Mapping[str, Any] | None = None, json: Any = None) -> Any:
        wanted = {name: value for name, value in (params or {}).items() if value not in (None, "")}
        transport = httpx.ASGITransport(app=self._app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, timeout=TIMEOUT_S) as client:
            response = await client.request(method, self._root + path, params=wanted, json=json, headers=self._headers)
        if response.is_success:
            return response.json() if response.content else None
        raise _error(response)


def _error(response: httpx.Response) -> ForeshoreError:
    try:
        problem = response.json()
    except ValueError:
        problem = {}
    if not isinstance(problem, dict):
        problem = {}
    kind = _ERRORS.get(response.status_code, ForeshoreError)
    detail = str(problem.get("detail") or problem.get("title") or f"the API answered {response.status_code}")
    remedy = str(problem.get("remedy") or "")
    return kind(detail, remedy=remedy)


def part(text: str) -> str:
    """`text` as one part of a path."""
    return quote(text, safe="")


def inside(target: str | None) -> str:
    """An address of ours to go on to; anything that could lead elsewhere becomes the overview."""
    is_ours = target is not None and target.startswith("/") and not target.startswith(("//", "/\\"))
    return target if target and is_ours and target.isprintable() else "/"
