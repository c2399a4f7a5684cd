"""Jobs as their owners see them: made, looked up, listed, wished for, and deleted; always in one project."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from service.errors import NotFound, WrongState
from service.store import events, files, transitions
from service.store.ids import new_id
from service.store.models import Job, JobFile, State, Wanted
from service.store.paging import Page, newest_first


@dataclass(frozen=True)
class NewJob:
    """What is known of a job before it is stored. files: the ids of the files it reads."""

    spec: Mapping[str, Any]
    spec_version: int
    name: str | None = None
    plan: Mapping[str, Any] | None = None
    total_updates: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: Collection[str] = ()
    queue: str = "default"
    priority: int = 0


async def insert_job(session: AsyncSession, project_id: str, new: NewJob) -> Job:
    """A new job, queued, and its first event.

    Raises:
        NotFound: a file it reads is not (or no longer) in the project.
    """
    if new.files:
        await files.hold(session, project_id, new.files)
    job = Job(
        id=new_id("job"),
        project_id=project_id,
        name=new.name,
        metadata_=dict(new.metadata),
        spec=dict(new.spec),
        spec_version=new.spec_version,
        plan=None if new.plan is None else dict(new.plan),
        total_updates=new.total_updates,
        queue=new.queue,
        priority=new.priority,
        **transitions.NEW,
    )
    session.add(job)
    session.add_all(JobFile(job_id=job.id, file_id=file_id) for file_id in set(new.files))
    await session.flush()
    await events.append(session, job, [transitions.said(job)])
    return job


async def get_job(session: AsyncSession, project_id: str, job_id: str, *, lock: bool = False) -> Job:
    """A job of the project. lock: until the end of the unit of work, nobody else changes it.

    Raises:
        NotFound: the project has no such job.
    """
    query = select(Job).where(Job.id == job_id, Job.project_id == project_id)
    if lock:
        query = query.with_for_update().execution_options(populate_existing=True)
    job = await session.scalar(query)
    if job is None:
        raise NotFound("job", job_id)
    return job


async def list_jobs(
    session: AsyncSession,
    project_id: str,
    *,
    state: State | None = None,
    after: str | None = None,
    limit: int = 20,
) -> Page[Job]:
    """The project's jobs, newest first, behind the job `after`.

    Raises:
        UnknownCursor: `after` cannot be a job of the project, now or before.
    """
    where = [] if state is None else [Job.state == state]
    return await newest_first(session, Job, project_id, after, limit, *where)


async def set_wanted(session: AsyncSession, project_id: str, job_id: str, wanted: Wanted) -> Job:
    """Take down what the owner wants. Where no worker has the job, it is done at once; else at its next step.

    Asking again for what is wanted or done already changes nothing.

    Raises:
        NotFound: the project has no such job.
        WrongState: the job is over, or a cancel was asked for, which is not taken back.
    """
    job = await get_job(session, project_id, job_id, lock=True)
    return await transitions.wish(session, job, wanted)


async def delete_job(session: AsyncSession, project_id: str, job_id: str) -> None:
    """Delete a job that is over, with all that is kept of it here; what is in storage is the caller's, who
    notes its deletion in this unit of work.

    Raises:
        NotFound: the project has no such job.
        WrongState: the job is not over.
    """
    job = await get_job(session, project_id, job_id, lock=True)
    if not job.is_final:
        raise WrongState(job_id, job.state, "deleted", "cancel it first, and wait until it is over")
    await session.delete(job)
