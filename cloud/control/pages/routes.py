"""The web pages: one handler per address, each a few API calls and a template.

A page asks the API as the person who looks (see `api`); a form is checked (origin, session token), sent to the API and
answered with a redirect, or shown again with what was wrong. Everything works without scripts; with them it is live.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, FastAPI, Request
from fastapi.staticfiles import StaticFiles
from starlette.responses import RedirectResponse, Response

from cloud.control.pages.api import PageApi
from cloud.control.pages.forms import group_body, labels_body, rollout_order, webhook_body
from cloud.control.pages.qr import qr_svg
from cloud.control.pages.render import Renderer
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
    ConflictError,
    ForeshoreError,
    InvalidInputError,
    NotAllowedError,
    NotAuthenticatedError,
    NotFoundError,
)

MAX_FORM_BYTES = 64 * 1024
RECENT = 8
LOG_LENGTH = 100
ROLLOUT_ACTIONS = frozenset({"approve", "start", "pause", "resume", "halt", "retry", "rollback"})
WEBHOOK_ACTIONS = frozenset({"ping", "delete"})
REFUSALS = (ConflictError, InvalidInputError, NotAllowedError, NotFoundError)

Handler = Callable[[Request, PageApi], Awaitable[Response]]


def install(app: FastAPI) -> None:
    """Add the pages, their static files and the session cookie's middleware to the control plane's app."""
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"), name="static")
    app.include_router(router(app))
    app.add_middleware(CookieToBearer)


def router(app: FastAPI) -> APIRouter:
    """The pages of the control plane whose API `app` serves."""
    pages = Pages(app, Renderer())
    routes = APIRouter(include_in_schema=False)
    for path, handler in (
        ("/", pages.overview), ("/devices", pages.devices), ("/devices/{device_id}", pages.device),
        ("/models", pages.models), ("/models/{name}", pages.model), ("/groups", pages.groups),
        ("/rollouts", pages.rollouts), ("/rollouts/new", pages.new_rollout), ("/rollouts/{rollout_id}", pages.rollout),
        ("/decisions", pages.decisions), ("/decisions/{decision_id}", pages.decision), ("/enrol", pages.enrol),
        ("/audit", pages.audit), ("/audit/export", pages.export_audit), ("/webhooks", pages.webhooks),
        ("/webhooks/{webhook_id}", pages.webhook),
    ):  # fmt: skip
        routes.add_api_route(path, pages.shown(handler), methods=["GET"])
    for path, handler in (
        ("/rollouts", pages.create_rollout), ("/rollouts/{rollout_id}/{action}", pages.steer_rollout),
        ("/devices/{device_id}/revoke", pages.revoke), ("/devices/{device_id}/labels", pages.label),
        ("/groups", pages.create_group), ("/groups/{name}/delete", pages.delete_group),
        ("/webhooks", pages.create_webhook), ("/webhooks/{webhook_id}/{action}", pages.steer_webhook),
        ("/webhook-deliveries/{delivery_id}/resend", pages.resend), ("/enrol", pages.create_enrolment),
        ("/logout", pages.logout),
    ):  # fmt: skip
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
                return await handler(request, PageApi(self._app, session))
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
        return self._page(request, "login.html", next=_inside(request.query_params.get("next")), problem=ended)

    async def login(self, request: Request) -> Response:
        """Check the token with the API, then keep it in the cookie."""
        target = "/"
        try:
            require_same_origin(request.headers)
            form = await _form(request)
            target = _inside(form.get("next"))
            token = form.get("token", "").strip()
            if not token.isascii() or not 0 < len(token) <= MAX_TOKEN_LENGTH or not token.isprintable():
                raise NotAuthenticatedError("that is not a token", remedy="paste the whole line of tokens/admin")
            await PageApi(self._app, token).get("/groups")
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
            api.get(f"/devices/{_part(name)}"), api.newest("/decisions", RECENT, subject=name)
        )
        desired = {one["name"]: one for one in (device.get("desired") or {}).get("models", [])}
        return self._page(request, "device.html", device=device, desired=desired, decisions=decisions)

    async def revoke(self, request: Request, api: PageApi) -> Response:
        """Revoke a device."""
        await api.delete(f"/devices/{_part(request.path_params['device_id'])}")
        return RedirectResponse("/devices", status_code=303)

    async def models(self, request: Request, api: PageApi) -> Response:
        """All models with their releases."""
        models, releases = await asyncio.gather(api.all("/models"), api.all("/releases"))
        return self._page(request, "models.html", models=models, releases=releases)

    async def model(self, request: Request, api: PageApi) -> Response:
        """One model: each release, its artefacts, gates, sizes and encodings."""
        name = request.path_params["name"]
        model, releases = await asyncio.gather(api.get(f"/models/{_part(name)}"), api.all("/releases"))
        own = model.get("versions") or model.get("releases") or [r for r in releases if r.get("name") == name]
        return self._page(request, "model.html", model=model, releases=own)

    async def label(self, request: Request, api: PageApi) -> Response:
        """Replace a device's labels."""
        name = _part(request.path_params["device_id"])
        await api.put(f"/devices/{name}/labels", labels_body(request.state.form))
        return RedirectResponse(f"/devices/{name}#labels", status_code=303)

    # groups

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
        except REFUSALS as error:
            return await self._groups(request, api, form, error)
        return RedirectResponse("/groups", status_code=303)

    async def delete_group(self, request: Request, api: PageApi) -> Response:
        """Forget a group."""
        await api.delete(f"/groups/{_part(request.path_params['name'])}")
        return RedirectResponse("/groups", status_code=303)

    # rollouts

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
        except REFUSALS as error:
            return await self._new_rollout(request, api, form, error)
        return RedirectResponse(f"/rollouts/{_part(str(created['rollout_id']))}", status_code=303)

    async def rollout(self, request: Request, api: PageApi) -> Response:
        """One rollout as it moves."""
        return await self._rollout(request, api, None)

    async def _rollout(self, request: Request, api: PageApi, problem: ForeshoreError | None) -> Response:
        document = await api.get(f"/rollouts/{_part(request.path_params['rollout_id'])}")
        return self._page(
            request, "rollout.html", status=problem.http_status if problem else 200, rollout=rollout_view(document),
            problem=problem,
        )  # fmt: skip

    async def back_to_rollout(self, request: Request, api: PageApi) -> Response:
        """The address of an order, opened as a page: the rollout itself."""
        return RedirectResponse(f"/rollouts/{_part(request.path_params['rollout_id'])}", status_code=303)

    async def steer_rollout(self, request: Request, api: PageApi) -> Response:
        """Approve, start, pause, resume, halt, retry what failed, or roll back."""
        rollout_id, action = _part(request.path_params["rollout_id"]), request.path_params["action"]
        if action not in ROLLOUT_ACTIONS:
            raise NotFoundError(f"a rollout has no action {action!r}", remedy=f"one of {', '.join(ROLLOUT_ACTIONS)}")
        reason = request.state.form.get("reason", "").strip()[:500]
        try:
            await api.post(f"/rollouts/{rollout_id}/{action}", {"reason": reason})
        except (ConflictError, NotAllowedError) as error:
            return await self._rollout(request, api, error)
        return RedirectResponse(f"/rollouts/{rollout_id}", status_code=303)

    # audit and webhooks

    async def audit(self, request: Request, api: PageApi) -> Response:
        """Who changed what, newest first, and whether the chain is whole."""
        action = request.query_params.get("action", "")[:64]
        entries, verdict = await asyncio.gather(
            api.newest("/audit", LOG_LENGTH, action=action), api.get("/audit/verify")
        )
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
        except REFUSALS as error:
            return await self._webhooks(request, api, form, None, error)
        return await self._webhooks(request, api, {}, made, None)

    async def webhook(self, request: Request, api: PageApi) -> Response:
        """One webhook with what it was told."""
        webhook_id = request.path_params["webhook_id"]
        hooks, deliveries = await asyncio.gather(
            api.all("/webhooks"), api.newest(f"/webhooks/{_part(webhook_id)}/deliveries", LOG_LENGTH)
        )
        hook = next(one for one in hooks if one["webhook_id"] == webhook_id)
        return self._page(request, "webhook.html", hook=hook, deliveries=deliveries)

    async def steer_webhook(self, request: Request, api: PageApi) -> Response:
        """Try a webhook, or forget it."""
        webhook_id, action = _part(request.path_params["webhook_id"]), request.path_params["action"]
        if action not in WEBHOOK_ACTIONS:
            raise NotFoundError(f"a webhook has no action {action!r}", remedy=f"one of {', '.join(WEBHOOK_ACTIONS)}")
        if action == "delete":
            await api.delete(f"/webhooks/{webhook_id}")
            return RedirectResponse("/webhooks", status_code=303)
        await api.post(f"/webhooks/{webhook_id}/ping")
        return RedirectResponse(f"/webhooks/{webhook_id}", status_code=303)

    async def resend(self, request: Request, api: PageApi) -> Response:
        """Send a message again."""
        await api.post(f"/webhook-deliveries/{_part(request.path_params['delivery_id'])}/resend")
        return RedirectResponse(_inside(request.state.form.get("next")), status_code=303)

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
        document = await api.get(f"/decisions/{_part(request.path_params['decision_id'])}")
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
        address = f"{request.url.scheme}://{request.url.netloc}"
        command = enrolment.get("command") or shlex.join(
            ["foreshore-agent", "enrol", "--url", address, "--token", enrolment["enrolment_token"]]
        )
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


def _part(text: str) -> str:
    return quote(text, safe="")


def _inside(target: str | None) -> str:
    """An address of ours to go on to; anything that could lead elsewhere becomes the overview."""
    is_ours = target is not None and target.startswith("/") and not target.startswith(("//", "/\\"))
    return target if target and is_ours and target.isprintable() else "/"
