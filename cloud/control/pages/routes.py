"""The web pages: one handler per address, each a few API calls and a template.

A page asks the API as the person who looks (see `api`); a form is checked (origin, session token), sent to the API and
answered with a redirect, or shown again with what was wrong. Everything works without scripts; with them it is live.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, FastAPI, Request
from fastapi.staticfiles import StaticFiles
from starlette.responses import RedirectResponse, Response

from cloud.control.pages.api import PageApi, inside, part
from cloud.control.pages.change_pages import ChangePages
from cloud.control.pages.forms import labels_body
from cloud.control.pages.group_pages import GroupPages
from cloud.control.pages.qr import qr_svg
from cloud.control.pages.render import Renderer
from cloud.control.pages.rollout_pages import RolloutPages
from cloud.control.pages.rollout_view import rollout_view
from cloud.control.pages.session import (
    COOKIE,
    CSRF_FIELD,
    MAX_TOKEN_LENGTH,
    CookieToBearer,
    end_session,
    require_csrf,
    require_same_origin,
    set_session,
)
from cloud.control.pages.views import candidates_of, fleet_health
from wire import decision
from wire.errors import (
    ForeshoreError,
    InvalidInputError,
    NotAuthenticatedError,
)

MAX_FORM_BYTES = 64 * 1024
RECENT = 8
COMPATIBLE_DEVICES = 200
LOG_LENGTH = 100

Handler = Callable[[Request, PageApi], Awaitable[Response]]


def install(app: FastAPI) -> None:
    """Add the pages, their static files and the session cookie's middleware to the control plane's app."""
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"), name="static")
    app.include_router(router(app))
    app.add_middleware(CookieToBearer)


def router(app: FastAPI) -> APIRouter:
    """The pages of the control plane whose API `app` serves."""
    renderer = Renderer()
    pages, changes = Pages(app, renderer), ChangePages(renderer)
    groups, rollouts = GroupPages(renderer), RolloutPages(renderer)
    routes = APIRouter(include_in_schema=False)
    shown: dict[str, Handler] = {
        "/": pages.overview,
        "/devices": pages.devices,
        "/devices/{device_id}": pages.device,
        "/groups": groups.groups,
        "/models": pages.models,
        "/models/{name}": pages.model,
        "/rollouts": rollouts.rollouts,
        "/rollouts/new": rollouts.new_rollout,
        "/rollouts/{rollout_id}": rollouts.rollout,
        "/rollouts/{rollout_id}/{action}": rollouts.back_to_rollout,
        "/decisions": pages.decisions,
        "/decisions/{decision_id}": pages.decision,
        "/audit": changes.audit,
        "/audit/export": changes.export_audit,
        "/webhooks": changes.webhooks,
        "/webhooks/{webhook_id}": changes.webhook,
        "/enrol": pages.enrol,
    }
    sent: dict[str, Handler] = {
        "/devices/{device_id}/revoke": pages.revoke,
        "/devices/{device_id}/labels": pages.label,
        "/groups": groups.create_group,
        "/groups/{name}/delete": groups.delete_group,
        "/rollouts": rollouts.create_rollout,
        "/rollouts/{rollout_id}/{action}": rollouts.steer_rollout,
        "/webhooks": changes.create_webhook,
        "/webhooks/{webhook_id}/{action}": changes.steer_webhook,
        "/webhook-deliveries/{delivery_id}/resend": changes.resend,
        "/enrol": pages.create_enrolment,
        "/logout": pages.logout,
    }
    for path, handler in shown.items():
        routes.add_api_route(path, pages.shown(handler), methods=["GET"])
    for path, handler in sent.items():
        routes.add_api_route(path, pages.sent(handler), methods=["POST"])
    routes.add_api_route("/login", pages.login_form, methods=["GET"])
    routes.add_api_route("/login", pages.login, methods=["POST"])
    return routes


class Pages:
    """The handlers. `app` is asked for the data."""

    def __init__(self, app: FastAPI, renderer: Renderer) -> None:
        self._app = app
        self._renderer = renderer

    # around every handler

    def shown(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """`handler` with a session; without one, the way to the login page; errors become the error page."""

        async def show(request: Request) -> Response:
            session = request.cookies.get(COOKIE, "")
            if not session:
                return RedirectResponse(f"/login?next={quote(request.url.path)}", status_code=303)
            try:
                return await handler(request, PageApi(self._app, str(request.base_url), session))
            except NotAuthenticatedError:
                response = RedirectResponse(f"/login?next={quote(request.url.path)}&ended=1", status_code=303)
                end_session(response)
                return response
            except ForeshoreError as error:
                return self._renderer.error(request, error)

        return show

    def sent(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """`shown`, for a form: same origin and the session's own form token are required first."""

        async def checked(request: Request, api: PageApi) -> Response:
            require_same_origin(request.headers)
            form = await _form(request)
            require_csrf(request.cookies.get(COOKIE, ""), form.get(CSRF_FIELD))
            request.state.form = form
            return await handler(request, api)

        return self.shown(checked)

    def _page(self, request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
        return self._renderer.page(request, template, values, status=status)

    # session

    async def login_form(self, request: Request) -> Response:
        """Ask for the token."""
        ended = "Your session has ended. Sign in again." if request.query_params.get("ended") else ""
        return self._page(request, "login.html", next=inside(request.query_params.get("next")), problem=ended)

    async def login(self, request: Request) -> Response:
        """Check the token with the API, then keep it in the cookie."""
        target = "/"
        try:
            require_same_origin(request.headers)
            form = await _form(request)
            target = inside(form.get("next"))
            token = form.get("token", "").strip()
            if not token.isascii() or not 0 < len(token) <= MAX_TOKEN_LENGTH or not token.isprintable():
                raise NotAuthenticatedError("that is not a token", remedy="paste the whole line of tokens/admin")
            await PageApi(self._app, str(request.base_url), token).get("/groups")
        except ForeshoreError as error:
            return self._page(request, "login.html", status=error.http_status, next=target, problem=str(error))
        response = RedirectResponse(target, status_code=303)
        set_session(response, token, secure=request.url.scheme == "https")
        return response

    async def logout(self, request: Request, api: PageApi) -> Response:
        """Forget the session."""
        response = RedirectResponse("/login", status_code=303)
        end_session(response)
        return response

    # the fleet

    async def overview(self, request: Request, api: PageApi) -> Response:
        """Fleet health, what is rolling out, what was published last."""
        devices, rollouts, releases, decisions = await asyncio.gather(
            api.all("/devices"), api.all("/rollouts"), api.all("/releases"), api.newest("/decisions", RECENT)
        )
        return self._page(
            request, "overview.html", health=fleet_health(devices), devices=devices[:RECENT],
            rollouts=[rollout_view(one) for one in rollouts[:RECENT]], releases=releases[:RECENT], decisions=decisions,
        )  # fmt: skip

    async def devices(self, request: Request, api: PageApi) -> Response:
        """The table of devices; the filter works on the page."""
        return self._page(request, "devices.html", devices=await api.all("/devices"))

    async def device(self, request: Request, api: PageApi) -> Response:
        """One device: wish and report side by side."""
        name = request.path_params["device_id"]
        device, decisions = await asyncio.gather(
            api.get(f"/devices/{part(name)}"), api.newest("/decisions", RECENT, subject=name)
        )
        desired = {one["name"]: one for one in (device.get("desired") or {}).get("models", [])}
        return self._page(request, "device.html", device=device, desired=desired, decisions=decisions)

    async def revoke(self, request: Request, api: PageApi) -> Response:
        """Revoke a device."""
        await api.delete(f"/devices/{part(request.path_params['device_id'])}")
        return RedirectResponse("/devices", status_code=303)

    async def models(self, request: Request, api: PageApi) -> Response:
        """All models with their releases."""
        models, releases = await asyncio.gather(api.all("/models"), api.all("/releases"))
        return self._page(request, "models.html", models=models, releases=releases)

    async def model(self, request: Request, api: PageApi) -> Response:
        """One model: each release, its artefacts, gates, sizes and encodings."""
        name = request.path_params["name"]
        model, releases = await asyncio.gather(api.get(f"/models/{part(name)}"), api.all("/releases"))
        own = model.get("versions") or model.get("releases") or [r for r in releases if r.get("name") == name]
        fleet = await api.get(f"/models/{part(name)}/compatibility", limit=COMPATIBLE_DEVICES) if own else None
        return self._page(request, "model.html", model=model, releases=own, compatibility=fleet)

    async def label(self, request: Request, api: PageApi) -> Response:
        """Replace a device's labels."""
        name = part(request.path_params["device_id"])
        await api.put(f"/devices/{name}/labels", labels_body(request.state.form))
        return RedirectResponse(f"/devices/{name}#labels", status_code=303)

    # decisions

    async def decisions(self, request: Request, api: PageApi) -> Response:
        """The decision log, newest first."""
        kind = request.query_params.get("kind", "")
        subject = request.query_params.get("subject", "")[:200]
        if kind and kind not in decision.KINDS:
            raise InvalidInputError(f"decision kind {kind[:40]!r} is unknown", remedy="choose one from the list")
        records = await api.newest("/decisions", LOG_LENGTH, kind=kind, subject=subject)
        return self._page(
            request, "decisions.html", decisions=records, kind=kind, subject=subject, kinds=sorted(decision.KINDS)
        )

    async def decision(self, request: Request, api: PageApi) -> Response:
        """One decision with its arithmetic."""
        document = await api.get(f"/decisions/{part(request.path_params['decision_id'])}")
        plain = {name: value for name, value in document.items() if name in decision.Decision.__dataclass_fields__}
        record = decision.from_dict(plain)
        replayed = decision.replay(record)
        return self._page(
            request, "decision.html", record=record, candidates=candidates_of(record), replays=replayed == record.chosen
        )

    # enrolment

    async def enrol(self, request: Request, api: PageApi) -> Response:
        """The form for a new device."""
        return self._page(request, "enrol.html", given={}, problem=None, enrolment=None)

    async def create_enrolment(self, request: Request, api: PageApi) -> Response:
        """Make a one-time token and show its command, as text and as a QR code."""
        form: dict[str, str] = request.state.form
        try:
            enrolment = await api.post("/enrolments", {"device_id": form.get("device_id", "").strip()})
        except ForeshoreError as error:
            return self._page(
                request, "enrol.html", status=error.http_status, given=form, problem=error, enrolment=None
            )
        command = enrolment["command"]
        return self._page(
            request, "enrol.html", given={}, problem=None, enrolment=enrolment, command=command,
            qr=qr_svg(command, f"QR code of the command for {enrolment['device_id']}"),
        )  # fmt: skip


async def _form(request: Request) -> dict[str, str]:
    length = request.headers.get("content-length", "")
    if not length.isdigit() or int(length) > MAX_FORM_BYTES:
        raise InvalidInputError("the form is too large or of unknown size", remedy="shorten what you typed")
    form = await request.form(max_files=0, max_fields=50)
    return {name: value for name, value in form.items() if isinstance(value, str)}
