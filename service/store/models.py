"""The tables. What a column may hold and who may write it is said here; how, in the modules beside.

JSON columns keep text (`JSON`, not `JSONB`, on Postgres): it refuses no value, such as `\\u0000`, and nothing
is searched inside it.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, MetaData, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from service.store.types import PlainText, UtcDateTime, moment

State = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
Wanted = Literal["run", "pause", "cancel"]
ArtifactKind = Literal["checkpoint", "export", "log", "archive"]

FINAL: frozenset[State] = frozenset({"succeeded", "failed", "cancelled"})


Now = Annotated[datetime, mapped_column(insert_default=moment())]
"""When the row was made; the database fills it in, and an insert brings it back."""


class Base(DeclarativeBase):
    """Base of all tables; constraints have names, so that migrations can speak of them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_N_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012
        str: PlainText(),
        datetime: UtcDateTime(),
        dict[str, Any]: JSON(none_as_null=True),
        list[dict[str, Any]]: JSON(none_as_null=True),
        list[str]: JSON(none_as_null=True),
        State: String(16),
        Wanted: String(16),
        ArtifactKind: String(16),
    }


class Project(Base):
    """Whom everything else belongs to."""

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[Now]


class ApiKey(Base):
    """A key that opens a project. prefix: its beginning, to know it by. digest: all else that is kept."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    prefix: Mapped[str]
    digest: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[Now]
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class Job(Base):
    """A run that somebody asked for. `transitions.py` alone writes `state`, and what a move changes with it.

    spec, spec_version: the resolved spec, and the version it was written in.
    wanted: what its owner wants of it; never a state.
    attempt: the number of times it was claimed; with `worker`, the fence of everything an attempt writes.
    lease_until: until when a silent worker keeps it, on the database's clock.
    stalled_attempts: attempts begun since the last one that got further than any before it.
    update: updates completed by the current attempt. furthest_update: by any attempt.
    next_seq: the number of its next event.
    queued_at: since when it waits, if it does.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_project_id_id", "project_id", "id"),
        Index("ix_jobs_project_id_state_id", "project_id", "state", "id"),
        Index("ix_jobs_state_queue_priority_created_at", "state", "queue", "priority", "created_at"),
        Index("ix_jobs_state_lease_until", "state", "lease_until"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"))
    name: Mapped[str | None]
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata")
    spec: Mapped[dict[str, Any]]
    spec_version: Mapped[int]
    plan: Mapped[dict[str, Any] | None]

    state: Mapped[State]
    wanted: Mapped[Wanted]
    queue: Mapped[str]
    priority: Mapped[int]
    attempt: Mapped[int]
    stalled_attempts: Mapped[int]
    worker: Mapped[str | None]
    lease_until: Mapped[datetime | None]

    update: Mapped[int]
    furthest_update: Mapped[int]
    total_updates: Mapped[int | None]
    next_seq: Mapped[int]

    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    error_log_tail: Mapped[str | None]
    error_issues: Mapped[list[dict[str, Any]] | None]

    created_at: Mapped[Now]
    queued_at: Mapped[Now | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    @property
    def is_final(self) -> bool:
        return self.state in FINAL


class Event(Base):
    """One thing that happened to a job. seq: from 1, without gaps. created_at: when it was said."""

    __tablename__ = "events"
    __table_args__ = (
        UniqueConstraint("job_id", "key"),
        Index("ix_events_job_id_type_update_seq", "job_id", "type", "update", "seq"),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    key: Mapped[str]
    type: Mapped[str]
    attempt: Mapped[int]
    update: Mapped[int]
    created_at: Mapped[Now]
    data: Mapped[dict[str, Any]]


class Artifact(Base):
    """A set of files in storage: there is a row only once every byte of them is safe there.

    files: `{"name", "size", "sha256"}` of each; it lies in storage under `key_prefix` + name.
    """

    __tablename__ = "artifacts"
    __table_args__ = (UniqueConstraint("job_id", "kind", "update", "attempt"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    kind: Mapped[ArtifactKind]
    update: Mapped[int]
    attempt: Mapped[int]
    key_prefix: Mapped[str]
    files: Mapped[list[dict[str, Any]]]
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[Now]


class File(Base):
    """An uploaded file of prompts, kept as canonical JSONL. bytes, sha256: of what is kept."""

    __tablename__ = "files"
    __table_args__ = (Index("ix_files_project_id_id", "project_id", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"))
    filename: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    rows: Mapped[int]
    columns: Mapped[list[str]]
    format: Mapped[str]
    storage_key: Mapped[str]
    created_at: Mapped[Now]


class JobFile(Base):
    """Which files a job reads."""

    __tablename__ = "job_files"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    file_id: Mapped[str] = mapped_column(
        ForeignKey("files.id", ondelete="CASCADE"), primary_key=True, index=True
    )


class Deletion(Base):
    """Bytes in storage that nobody knows any more. prefix: where they lie. due: from when to delete them."""

    __tablename__ = "deletions"

    id: Mapped[str] = mapped_column(primary_key=True)
    prefix: Mapped[str]
    due: Mapped[datetime] = mapped_column(index=True)


class IdempotencyKey(Base):
    """The answer that a request with an `Idempotency-Key` got. fingerprint: digest of the request's body."""

    __tablename__ = "idempotency_keys"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"), primary_key=True)
    route: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]
    status: Mapped[int]
    headers: Mapped[dict[str, Any]]
    body: Mapped[dict[str, Any]]
    created_at: Mapped[Now] = mapped_column(index=True)
