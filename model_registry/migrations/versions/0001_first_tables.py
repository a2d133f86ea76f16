"""Models, releases, artefacts, sources and references to blobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "registry_model",
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "name", name="pk_registry_model"),
    )
    op.create_table(
        "registry_release",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("licence", sa.String(200), nullable=False),
        sa.Column("source_format", sa.String(32), nullable=False),
        sa.Column("source_digest", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("document", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_registry_release"),
        sa.ForeignKeyConstraint(
            ["tenant", "name"], ["registry_model.tenant", "registry_model.name"], name="fk_registry_release_tenant"
        ),
        sa.UniqueConstraint("tenant", "name", "version", name="uq_registry_release_version"),
        sa.UniqueConstraint("tenant", "name", "sequence", name="uq_registry_release_sequence"),
    )
    op.create_table(
        "registry_artefact",
        sa.Column("release_digest", sa.String(64), nullable=False),
        sa.Column("target", sa.String(64), nullable=False),
        sa.Column("place", sa.BigInteger, nullable=False),
        sa.Column("manifest", sa.String(64), nullable=False),
        sa.Column("manifest_bytes", sa.BigInteger, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("runtime", sa.String(32), nullable=False),
        sa.Column("precision", sa.String(64), nullable=False),
        sa.Column("deltas", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("release_digest", "target", name="pk_registry_artefact"),
        sa.ForeignKeyConstraint(
            ["release_digest"],
            ["registry_release.digest"],
            name="fk_registry_artefact_release_digest",
            ondelete="CASCADE",
        ),
    )
    op.create_index("ix_registry_artefact_manifest", "registry_artefact", ["manifest"])
    op.create_table(
        "registry_source",
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("format", sa.String(32), nullable=False),
        sa.Column("files", sa.JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "digest", name="pk_registry_source"),
    )
    op.create_table(
        "registry_blob_reference",
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("blob", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("owner", "blob", "tenant", name="pk_registry_blob_reference"),
    )
    op.create_index("ix_registry_blob_reference_blob", "registry_blob_reference", ["blob"])


def downgrade() -> None:
    """Remove the tables and everything in them."""
    for table in (
        "registry_blob_reference",
        "registry_source",
        "registry_artefact",
        "registry_release",
        "registry_model",
    ):
        op.drop_table(table)
