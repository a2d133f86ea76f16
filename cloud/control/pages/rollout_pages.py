"""The pages of rollouts: all of them, the form, and one as it moves, with its orders."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request
from starlette.responses import RedirectResponse, Response

from cloud.control.pages.api import PageApi, part
from cloud.control.pages.forms import rollout_order
from cloud.control.pages.render import Renderer
from cloud.control.pages.rollout_view import rollout_view
from wire.errors import ConflictError, ForeshoreError, InvalidInputError, NotAllowedError, NotFoundError

ROLLOUT_ACTIONS = frozenset({"approve", "start", "pause", "resume", "halt", "retry", "rollback"})


class RolloutPages:
    """Handlers; see `routes`."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer

    async def rollouts(self, request: Request, api: PageApi) -> Response:
        """All rollouts."""
        rollouts = await api.all("/rollouts")
        return self._page(request, "rollouts.html", rollouts=[rollout_view(one) for one in rollouts])

    async def new_rollout(self, request: Request, api: PageApi) -> Response:
        """The form for a new rollout."""
        given = {name: request.query_params.get(name, "") for name in ("release", "group")}
        return await self._new_rollout(request, api, given, None)

    async def _new_rollout(
        self, request: Request, api: PageApi, given: dict[str, str], problem: ForeshoreError | None
    ) -> Response:
        releases, groups = await asyncio.gather(api.all("/releases"), api.all("/groups"))
        if not any(group["name"] == "all" for group in groups):
            groups = [{"name": "all"}, *groups]
        return self._page(
            request, "rollout_new.html", status=problem.http_status if problem else 200, problem=problem, given=given,
            releases=releases, groups=groups,
        )  # fmt: skip

    async def create_rollout(self, request: Request, api: PageApi) -> Response:
        """Create a rollout as the form says, and start it unless it is to stay a draft."""
        form: dict[str, str] = request.state.form
        try:
            created = await api.post("/rollouts", rollout_order(form))
        except (ConflictError, InvalidInputError, NotAllowedError, NotFoundError) as error:
            return await self._new_rollout(request, api, form, error)
        return RedirectResponse(f"/rollouts/{part(str(created['rollout_id']))}", status_code=303)

    async def rollout(self, request: Request, api: PageApi) -> Response:
        """One rollout as it moves."""
        return await self._rollout(request, api, None)

    async def _rollout(self, request: Request, api: PageApi, problem: ForeshoreError | None) -> Response:
        document = await api.get(f"/rollouts/{part(request.path_params['rollout_id'])}")
        return self._page(
            request, "rollout.html", status=problem.http_status if problem else 200, rollout=rollout_view(document),
            problem=problem,
        )  # fmt: skip

    async def back_to_rollout(self, request: Request, api: PageApi) -> Response:
        """The address of an order, opened as a page: the rollout itself."""
        return RedirectResponse(f"/rollouts/{part(request.path_params['rollout_id'])}", status_code=303)

    async def steer_rollout(self, request: Request, api: PageApi) -> Response:
        """Approve, start, pause, resume, halt, retry what failed, or roll back."""
        rollout_id, action = part(request.path_params["rollout_id"]), request.path_params["action"]
        if action not in ROLLOUT_ACTIONS:
            raise NotFoundError(f"a rollout has no action {action!r}", remedy=f"one of {', '.join(ROLLOUT_ACTIONS)}")
        reason = request.state.form.get("reason", "").strip()[:500]
        try:
            await api.post(f"/rollouts/{rollout_id}/{action}", {"reason": reason})
        except (ConflictError, NotAllowedError) as error:
            return await self._rollout(request, api, error)
        return RedirectResponse(f"/rollouts/{rollout_id}", status_code=303)

    def _page(self, request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
        return self._renderer.page(request, template, values, status=status)
