"""Turns values into HTML: the Jinja environment (everything escaped), its filters, and the error page."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from starlette.requests import Request
from starlette.responses import HTMLResponse

from cloud.control.pages.model_view import release_quality
from cloud.control.pages.session import COOKIE, csrf_token
from cloud.control.pages.views import tone
from wire.errors import ForeshoreError

FOLDER = Path(__file__).parent
NAVIGATION = (("/", "Overview"), ("/devices", "Devices"), ("/groups", "Groups"), ("/models", "Models"),
              ("/rollouts", "Rollouts"), ("/decisions", "Decisions"), ("/audit", "Audit"),
              ("/enrol", "Enrol"))  # fmt: skip
ACTION_WORDS = {
    "approve": "Approve", "start": "Start", "pause": "Pause", "resume": "Resume", "halt": "Halt",
    "retry": "Retry failed", "rollback": "Roll back",
}  # fmt: skip


class Renderer:
    """Renders the templates of this folder."""

    def __init__(self) -> None:
        self._environment = Environment(
            loader=FileSystemLoader(FOLDER / "templates"),
            autoescape=select_autoescape(default=True),
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters.update(bytes=size_text, short=short, instant=instant, words=words, number=number)
        self._environment.filters["quality"] = release_quality
        self._environment.globals.update(tone=tone, navigation=NAVIGATION, action_words=ACTION_WORDS)

    def page(self, request: Request, template: str, values: Mapping[str, Any], *, status: int = 200) -> HTMLResponse:
        """One page; never stored by the browser, as it shows a session's view."""
        session = request.cookies.get(COOKIE, "")
        text = self._environment.get_template(template).render(
            **values, path=request.url.path, signed_in=bool(session), csrf=csrf_token(session) if session else ""
        )
        return HTMLResponse(text, status_code=status, headers={"cache-control": "no-store"})

    def error(self, request: Request, error: ForeshoreError) -> HTMLResponse:
        """The page that says what went wrong and what to do."""
        return self.page(
            request, "error.html", {"error": error, "title": "This did not work"}, status=error.http_status
        )


def size_text(size: float | None) -> str:
    """Bytes for people: three digits and a binary unit."""
    if size is None:
        return "–"
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def short(digest: str | None) -> str:
    """The first twelve digits of a digest."""
    return (digest or "")[:12] or "–"


def words(state: str | None) -> str:
    """A state's name as words."""
    return (state or "–").replace("_", " ")


def number(value: Any) -> str:
    """A number with four significant digits; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def instant(moment: str | datetime | None) -> str:
    """An instant in UTC to the second; the page's script adds how long ago that is."""
    if not moment:
        return "never"
    try:
        parsed = moment if isinstance(moment, datetime) else datetime.fromisoformat(moment)
    except ValueError:
        return str(moment)
    return parsed.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
