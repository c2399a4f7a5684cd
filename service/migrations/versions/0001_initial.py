"""The first tables: projects, keys, files, jobs with their events and artifacts,
idempotency keys, and deletions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    _create_projects()
    _create_files()
    _create_jobs()
    _create_events()
    _create_artifacts()
    _create_idempotency_keys()
    _create_deletions()


def downgrade() -> None:
    made = ("projects", "api_keys", "files", "jobs", "job_files", "events", "artifacts")
    for table in ("deletions", "idempotency_keys", *reversed(made)):
        op.drop_table(table)


def _text(name: str, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(), nullable=nullable)


def _number(name: str, *, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.Integer(), nullable=nullable)


def _json(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.JSON(), nullable=nullable)


def _time(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _belongs_to(table: str, parent: str, column: str) -> sa.ForeignKeyConstraint:
    name = f"fk_{table}_{column}"
    return sa.ForeignKeyConstraint([column], [f"{parent}.id"], name=name, ondelete="CASCADE")


def _create_projects() -> None:
    op.create_table(
        "projects",
        _text("id"),
        _text("name"),
        _time("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_projects"),
        sa.UniqueConstraint("name", name="uq_projects_name"),
    )
    op.create_table(
        "api_keys",
        _text("id"),
        _text("project_id"),
        _text("name"),
        _text("prefix"),
        _text("digest"),
        _time("created_at"),
        _time("last_used_at", nullable=True),
        _time("revoked_at", nullable=True),
        _belongs_to("api_keys", "projects", "project_id"),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("digest", name="uq_api_keys_digest"),
    )
    op.create_index("ix_api_keys_project_id", "api_keys", ["project_id"])


def _create_files() -> None:
    op.create_table(
        "files",
        _text("id"),
        _text("project_id"),
        _text("filename"),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        _text("sha256"),
        _number("rows"),
        _json("columns"),
        _text("format"),
        _text("storage_key"),
        _time("created_at"),
        _belongs_to("files", "projects", "project_id"),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
    )
    op.create_index("ix_files_project_id_id", "files", ["project_id", "id"])


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        _text("id"),
        _text("project_id"),
        _text("name", nullable=True),
        _json("metadata"),
        _json("spec"),
        _number("spec_version"),
        _json("plan", nullable=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("wanted", sa.String(16), nullable=False),
        _text("queue"),
        _number("priority"),
        _number("attempt"),
        _number("stalled_attempts"),
        _text("worker", nullable=True),
        _time("lease_until", nullable=True),
        _number("update"),
        _number("furthest_update"),
        _number("total_updates", nullable=True),
        _number("next_seq"),
        _text("error_code", nullable=True),
        _text("error_message", nullable=True),
        _text("error_log_tail", nullable=True),
        _json("error_issues", nullable=True),
        _time("created_at"),
        _time("queued_at", nullable=True),
        _time("started_at", nullable=True),
        _time("finished_at", nullable=True),
        _belongs_to("jobs", "projects", "project_id"),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
    )
    for columns in (
        ["project_id", "id"],
        ["project_id", "state", "id"],
        ["state", "queue", "priority", "created_at"],
        ["state", "lease_until"],
    ):
        op.create_index(f"ix_jobs_{'_'.join(columns)}", "jobs", columns)
    op.create_table(
        "job_files",
        _text("job_id"),
        _text("file_id"),
        _belongs_to("job_files", "jobs", "job_id"),
        _belongs_to("job_files", "files", "file_id"),
        sa.PrimaryKeyConstraint("job_id", "file_id", name="pk_job_files"),
    )
    op.create_index("ix_job_files_file_id", "job_files", ["file_id"])


def _create_events() -> None:
    op.create_table(
        "events",
        _text("job_id"),
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False),
        _text("key"),
        _text("type"),
        _number("attempt"),
        _number("update"),
        _time("created_at"),
        _json("data"),
        _belongs_to("events", "jobs", "job_id"),
        sa.PrimaryKeyConstraint("job_id", "seq", name="pk_events"),
        sa.UniqueConstraint("job_id", "key", name="uq_events_job_id_key"),
    )
    op.create_index("ix_events_job_id_type_update_seq", "events", ["job_id", "type", "update", "seq"])


def _create_artifacts() -> None:
    op.create_table(
        "artifacts",
        _text("id"),
        _text("job_id"),
        sa.Column("kind", sa.String(16), nullable=False),
        _number("update"),
        _number("attempt"),
        _text("key_prefix"),
        _json("files"),
        _json("metrics"),
        _time("created_at"),
        _belongs_to("artifacts", "jobs", "job_id"),
        sa.PrimaryKeyConstraint("id", name="pk_artifacts"),
        sa.UniqueConstraint(
            "job_id", "kind", "update", "attempt", name="uq_artifacts_job_id_kind_update_attempt"
        ),
    )


def _create_idempotency_keys() -> None:
    op.create_table(
        "idempotency_keys",
        _text("project_id"),
        _text("route"),
        _text("key"),
        _text("fingerprint"),
        _number("status"),
        _json("headers"),
        _json("body"),
        _time("created_at"),
        _belongs_to("idempotency_keys", "projects", "project_id"),
        sa.PrimaryKeyConstraint("project_id", "route", "key", name="pk_idempotency_keys"),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])


def _create_deletions() -> None:
    op.create_table(
        "deletions",
        _text("id"),
        _text("prefix"),
        _time("due"),
        sa.PrimaryKeyConstraint("id", name="pk_deletions"),
    )
    op.create_index("ix_deletions_due", "deletions", ["due"])
