"""What a job has made: sets of files that lie in storage, each recorded once all its bytes are safe there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from pydantic import JsonValue
from sqlalchemy import Select, delete, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from ppo_engine.run_dir import ManifestFile
from service.store import events
from service.store.events import Draft
from service.store.fence import Fence, lock
from service.store.ids import new_id
from service.store.models import Artifact, ArtifactKind, Job
from service.store.paging import Page, cut


async def record(
    session: AsyncSession,
    fence: Fence,
    kind: ArtifactKind,
    update: int,
    files: Sequence[ManifestFile],
    key_prefix: str,
    metrics: Mapping[str, JsonValue] | None = None,
) -> Artifact:
    """Make a set of files known, with its event. The same set recorded again replaces the row, silently.

    Raises:
        FenceLost: the attempt is over; nothing was written.
    """
    job = await lock(session, fence)
    artifact = Artifact(
        id=new_id("artifact"),
        job_id=job.id,
        kind=kind,
        update=update,
        attempt=job.attempt,
        key_prefix=key_prefix,
        files=[file.model_dump() for file in files],
        metrics=dict(metrics or {}),
    )
    await session.execute(delete(Artifact).where(*_same(artifact)))
    session.add(artifact)
    await session.flush()
    await events.append(session, job, [_event(artifact)])
    return artifact


def _same(artifact: Artifact) -> tuple[Any, ...]:
    return (
        Artifact.job_id == artifact.job_id,
        Artifact.kind == artifact.kind,
        Artifact.update == artifact.update,
        Artifact.attempt == artifact.attempt,
    )


def _event(artifact: Artifact) -> Draft:
    data: dict[str, JsonValue] = {
        "kind": artifact.kind,
        "update": artifact.update,
        "bytes": sum(file["size"] for file in artifact.files),
    }
    key = f"artifact:{artifact.kind}:a{artifact.attempt}:{artifact.update}"
    return Draft("artifact", artifact.update, data, key)


def _of(project_id: str, job_id: str, kind: ArtifactKind) -> Select[Artifact]:
    """The artifacts of a kind, newest first."""
    return (
        select(Artifact)
        .join(Job)
        .where(Job.project_id == project_id, Artifact.job_id == job_id, Artifact.kind == kind)
        .order_by(Artifact.update.desc(), Artifact.attempt.desc())
    )


async def page(
    session: AsyncSession,
    project_id: str,
    job_id: str,
    kind: ArtifactKind,
    after: int = -1,
    limit: int = 100,
) -> Page[Artifact]:
    """The artifacts of a kind after update `after`, by update; of each update, the newest attempt's."""
    newest = (
        select(Artifact.update, func.max(Artifact.attempt))
        .where(Artifact.job_id == job_id, Artifact.kind == kind, Artifact.update > after)
        .group_by(Artifact.update)
        .order_by(Artifact.update)
        .limit(limit + 1)
    )
    query = (
        _of(project_id, job_id, kind)
        .where(tuple_(Artifact.update, Artifact.attempt).in_(newest))
        .order_by(None)
        .order_by(Artifact.update)
    )
    return cut((await session.scalars(query)).all(), limit)


async def get(
    session: AsyncSession, project_id: str, job_id: str, kind: ArtifactKind, update: int
) -> Artifact | None:
    """The artifact of a kind after an update, of the newest attempt that made it."""
    return await session.scalar(_of(project_id, job_id, kind).where(Artifact.update == update).limit(1))


async def latest(session: AsyncSession, project_id: str, job_id: str, kind: ArtifactKind) -> Artifact | None:
    """The artifact of a kind that is furthest."""
    return await session.scalar(_of(project_id, job_id, kind).limit(1))


async def newest_first(
    session: AsyncSession, project_id: str, job_id: str, kind: ArtifactKind
) -> tuple[Artifact, ...]:
    """All artifacts of a kind, the furthest first; of the same update, the newest attempt's first."""
    return tuple(await session.scalars(_of(project_id, job_id, kind)))


async def forget(session: AsyncSession, fence: Fence, artifacts: Sequence[Artifact]) -> None:
    """Forget artifacts of a job. Their bytes are the caller's.

    Raises:
        FenceLost: the attempt is over; nothing was forgotten.
    """
    job = await lock(session, fence)
    ids = [artifact.id for artifact in artifacts]
    await session.execute(delete(Artifact).where(Artifact.job_id == job.id, Artifact.id.in_(ids)))


async def forget_others(
    session: AsyncSession,
    fence: Fence,
    kind: ArtifactKind,
    kept: Callable[[Mapping[int, Mapping[str, Any]]], Collection[int]],
) -> list[Artifact]:
    """Forget a job's artifacts of a kind but those that are kept; of an update only the newest attempt's is.

    kept: of the metrics by update, the updates that stay. The bytes of those returned are the caller's to
    delete, after the commit.

    Raises:
        FenceLost: the attempt is over; nothing was forgotten.
    """
    job = await lock(session, fence)
    rows = list(await session.scalars(_of(job.project_id, job.id, kind)))
    newest = {row.update: row for row in reversed(rows)}
    staying = kept({update: row.metrics for update, row in newest.items()})
    others = [row for row in rows if row.update not in staying or row is not newest[row.update]]
    await forget(session, fence, others)
    return others
