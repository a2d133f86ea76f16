"""`/api/docs`: the API's operations as one page of plain HTML, made of its own OpenAPI document.

No scripts and nothing from elsewhere: the page works without the internet and runs nobody's code beside a session.
"""

from __future__ import annotations

from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

DOCS_URL = "/api/docs"
OPENAPI_URL = "/api/openapi.json"


def install(app: FastAPI) -> None:
    """Add the page."""

    @app.get(DOCS_URL, include_in_schema=False)
    def docs() -> HTMLResponse:
        """All operations, by path."""
        return HTMLResponse(_page(app.openapi()))


def _page(document: dict[str, Any]) -> str:
    rows = [
        f"<tr><td><code>{escape(method.upper())}</code></td><td><code>{escape(path)}</code></td>"
        f"<td>{escape(str(operation.get('description') or operation.get('summary') or ''))}</td></tr>"
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    title = f"{escape(document['info']['title'])} {escape(document['info']['version'])}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><h1>{title}</h1>'
        f'<p>The whole description, with every body: <a href="{OPENAPI_URL}">{OPENAPI_URL}</a> (OpenAPI).</p>'
        f"<table><tbody>{''.join(rows)}</tbody></table></html>"
    )
