"""Widen rollouts, label devices, chain audit by tenant, add webhooks"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Widen rollouts, label devices, chain audit by tenant, add webhooks"""
    with op.batch_alter_table("devices") as batch:
        batch.add_column(sa.Column("labels", sa.JSON(), nullable=False, server_default="{}"))
    with op.batch_alter_table("rollouts") as batch:
        batch.add_column(sa.Column("joins", sa.Boolean(), nullable=False, server_default=sa.false()))
        batch.add_column(sa.Column("created_with", sa.String(length=40), nullable=False, server_default=""))
    with op.batch_alter_table("audit", recreate="always") as batch:
        batch.drop_constraint("pk_audit", type_="primary")
        batch.drop_constraint("uq_audit_previous", type_="unique")
        batch.create_primary_key("pk_audit", ["tenant", "sequence"])
    op.create_table(
        "device_facts",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("device_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=80), nullable=False),
        sa.Column("value", sa.String(length=200), nullable=False),
        sa.Column("number", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("tenant", "device_id", "name", "value", name=op.f("pk_device_facts")),
    )
    op.create_index("ix_device_facts_value", "device_facts", ["tenant", "name", "value"])
    op.create_table(
        "webhooks",
        sa.Column("webhook_id", sa.String(length=40), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("url", sa.String(length=2000), nullable=False),
        sa.Column("actions", sa.JSON(), nullable=False),
        sa.Column("secret", sa.String(length=100), nullable=False),
        sa.Column("created_by", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("webhook_id", name=op.f("pk_webhooks")),
    )
    op.create_index("ix_webhooks_tenant", "webhooks", ["tenant"])
    op.create_table(
        "webhook_deliveries",
        sa.Column("delivery_id", sa.String(length=40), nullable=False),
        sa.Column("webhook_id", sa.String(length=40), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("answer", sa.String(length=300), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("delivery_id", name=op.f("pk_webhook_deliveries")),
    )
    op.create_index("ix_webhook_deliveries_due", "webhook_deliveries", ["webhook_id", "state", "created_at"])
    op.create_index("ix_webhook_deliveries_newest", "webhook_deliveries", ["webhook_id", "created_at"])


def downgrade() -> None:
    """Undo it."""
    op.drop_table("webhook_deliveries")
    op.drop_table("webhooks")
    op.drop_table("device_facts")
    with op.batch_alter_table("audit", recreate="always") as batch:
        batch.drop_constraint("pk_audit", type_="primary")
        batch.create_primary_key("pk_audit", ["sequence"])
        batch.create_unique_constraint("uq_audit_previous", ["previous"])
    with op.batch_alter_table("rollouts") as batch:
        batch.drop_column("created_with")
        batch.drop_column("joins")
    with op.batch_alter_table("devices") as batch:
        batch.drop_column("labels")
