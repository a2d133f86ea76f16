"""Webhooks: who is told of changes, and what happened to each message."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from cloud.control.api.base import Admin, Body, Cursor, Limit, Plane, page

router = APIRouter()


class WebhookBody(Body):
    """An address and the audit actions it is told of, as patterns such as `rollout.*`."""

    url: Annotated[str, Field(max_length=2000)]
    actions: Annotated[list[Annotated[str, Field(max_length=64)]], Field(min_length=1, max_length=20)] = ["*"]


@router.get("/webhooks")
def list_webhooks(plane: Plane, by: Admin) -> dict[str, Any]:
    """The webhooks, without their secrets."""
    return {"items": plane.webhooks.all(by.tenant), "next": None}


@router.post("/webhooks", status_code=201)
def create_webhook(body: WebhookBody, plane: Plane, by: Admin) -> dict[str, Any]:
    """Make a webhook; the answer holds the secret, once."""
    return plane.webhooks.create(by, body.url, body.actions)


@router.delete("/webhooks/{webhook_id}", status_code=204)
def delete_webhook(webhook_id: str, plane: Plane, by: Admin) -> None:
    """Forget a webhook."""
    plane.webhooks.delete(by, webhook_id)


@router.post("/webhooks/{webhook_id}/ping", status_code=202)
def ping_webhook(webhook_id: str, plane: Plane, by: Admin) -> dict[str, Any]:
    """Send it a message that says nothing."""
    return plane.webhooks.ping(by, webhook_id)


@router.get("/webhooks/{webhook_id}/deliveries")
def list_deliveries(webhook_id: str, plane: Plane, by: Admin, limit: Limit = 100, cursor: Cursor = 0) -> dict[str, Any]:
    """What it was told, newest first."""
    return page(plane.webhooks.deliveries(by.tenant, webhook_id, limit=limit + 1, offset=cursor), limit, cursor)


@router.post("/webhook-deliveries/{delivery_id}/resend", status_code=202)
def resend_delivery(delivery_id: str, plane: Plane, by: Admin) -> dict[str, Any]:
    """Send a message again."""
    return plane.webhooks.resend(by, delivery_id)
