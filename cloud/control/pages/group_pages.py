"""The pages of groups: all of them, the form, and which devices a filter would hold."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from starlette.responses import RedirectResponse, Response

from cloud.control.pages.api import PageApi, part
from cloud.control.pages.forms import group_body
from cloud.control.pages.render import Renderer
from wire.errors import ConflictError, ForeshoreError, InvalidInputError, NotAllowedError, NotFoundError


class GroupPages:
    """Handlers; see `routes`."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer

    async def groups(self, request: Request, api: PageApi) -> Response:
        """All groups; with `?filter=`, which devices such a group would hold now."""
        given = {"filter": request.query_params.get("filter", ""), "name": request.query_params.get("name", "")}
        return await self._groups(request, api, given, None)

    async def _groups(
        self, request: Request, api: PageApi, given: dict[str, str], problem: ForeshoreError | None
    ) -> Response:
        found: list[dict[str, Any]] | None = None
        if given.get("filter") and problem is None:
            try:
                found = await api.all("/devices", filter=given["filter"])
            except InvalidInputError as error:
                problem = error
        return self._page(
            request, "groups.html", status=problem.http_status if problem else 200, problem=problem, given=given,
            found=found, groups=await api.all("/groups"),
        )  # fmt: skip

    async def create_group(self, request: Request, api: PageApi) -> Response:
        """Make a group."""
        form: dict[str, str] = request.state.form
        try:
            await api.post("/groups", group_body(form))
        except (ConflictError, InvalidInputError, NotAllowedError, NotFoundError) as error:
            return await self._groups(request, api, form, error)
        return RedirectResponse("/groups", status_code=303)

    async def delete_group(self, request: Request, api: PageApi) -> Response:
        """Forget a group."""
        await api.delete(f"/groups/{part(request.path_params['name'])}")
        return RedirectResponse("/groups", status_code=303)

    def _page(self, request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
        return self._renderer.page(request, template, values, status=status)
