"""The pages of changes: the audit chain, the webhooks that are told of it, and what became of each message."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request
from starlette.responses import RedirectResponse, Response

from cloud.control.pages.api import PageApi, inside, part
from cloud.control.pages.forms import webhook_body
from cloud.control.pages.render import Renderer
from wire.errors import ConflictError, ForeshoreError, InvalidInputError, NotAllowedError, NotFoundError

LOG_LENGTH = 100
WEBHOOK_ACTIONS = frozenset({"ping", "delete"})


class ChangePages:
    """Handlers; see `routes`."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer

    async def audit(self, request: Request, api: PageApi) -> Response:
        """Who changed what, newest first; with `?verify=`, whether the chain is whole."""
        action = request.query_params.get("action", "")[:64]
        entries = await api.newest("/audit", LOG_LENGTH, action=action)
        verdict = await api.get("/audit/verify") if request.query_params.get("verify") else None
        return self._page(request, "audit.html", entries=entries, verdict=verdict, action=action)

    async def export_audit(self, request: Request, api: PageApi) -> Response:
        """The chain as a file; the API gives it to the browser's own session."""
        return RedirectResponse("/api/v1/audit/export", status_code=303)

    async def webhooks(self, request: Request, api: PageApi) -> Response:
        """Who is told of changes, and the form for one more."""
        return await self._webhooks(request, api, {}, None, None)

    async def _webhooks(
        self, request: Request, api: PageApi, given: dict[str, str], made: Any, problem: ForeshoreError | None
    ) -> Response:
        return self._page(
            request, "webhooks.html", status=problem.http_status if problem else 200, problem=problem, given=given,
            made=made, webhooks=await api.all("/webhooks"),
        )  # fmt: skip

    async def create_webhook(self, request: Request, api: PageApi) -> Response:
        """Make a webhook and show its secret, once."""
        form: dict[str, str] = request.state.form
        try:
            made = await api.post("/webhooks", webhook_body(form))
        except (ConflictError, InvalidInputError, NotAllowedError, NotFoundError) as error:
            return await self._webhooks(request, api, form, None, error)
        return await self._webhooks(request, api, {}, made, None)

    async def webhook(self, request: Request, api: PageApi) -> Response:
        """One webhook with what it was told."""
        webhook_id = request.path_params["webhook_id"]
        hooks, deliveries = await asyncio.gather(
            api.all("/webhooks"), api.newest(f"/webhooks/{part(webhook_id)}/deliveries", LOG_LENGTH)
        )
        hook = next(one for one in hooks if one["webhook_id"] == webhook_id)
        return self._page(request, "webhook.html", hook=hook, deliveries=deliveries)

    async def steer_webhook(self, request: Request, api: PageApi) -> Response:
        """Try a webhook, or forget it."""
        webhook_id, action = part(request.path_params["webhook_id"]), request.path_params["action"]
        if action not in WEBHOOK_ACTIONS:
            raise NotFoundError(f"a webhook has no action {action!r}", remedy=f"one of {', '.join(WEBHOOK_ACTIONS)}")
        if action == "delete":
            await api.delete(f"/webhooks/{webhook_id}")
            return RedirectResponse("/webhooks", status_code=303)
        await api.post(f"/webhooks/{webhook_id}/ping")
        return RedirectResponse(f"/webhooks/{webhook_id}", status_code=303)

    async def resend(self, request: Request, api: PageApi) -> Response:
        """Send a message again."""
        await api.post(f"/webhook-deliveries/{part(request.path_params['delivery_id'])}/resend")
        return RedirectResponse(inside(request.state.form.get("next")), status_code=303)

    def _page(self, request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
        return self._renderer.page(request, template, values, status=status)
