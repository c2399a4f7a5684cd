"""What happened to a job: numbered without gaps while the job's row is locked, each key once.

Everything that reads is scoped by project, but `news`, which answers listeners that were let in before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from pydantic import JsonValue
from sqlalchemy import Select, and_, bindparam, func, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from ppo_engine import events as engine
from service.store.models import FINAL, Event, Job
from service.store.paging import Page, cut
from service.store.types import UtcDateTime, moment

CHUNK = 500
"""Rows per statement, well under the number of parameters that a statement may have."""

T = TypeVar("T")


@dataclass(frozen=True)
class Draft:
    """An event without its number.

    key: unique in the job; None: the event stands by itself, and gets a key from its number.
    time: unix seconds when it was said; None: now, by the database's clock.
    """

    type: str
    update: int
    data: Mapping[str, JsonValue]
    key: str | None = None
    time: float | None = None

    @classmethod
    def of(cls, event: engine.Event) -> Draft:
        return cls(event.type, event.update, event.data, event.key, event.time)


async def append(session: AsyncSession, job: Job, drafts: Sequence[Draft]) -> int:
    """Number and keep those drafts whose key the job does not have yet; the number of those kept.

    The caller holds the lock of the job's row (it has updated it, or selected it for update) and has read
    `job.next_seq` since.
    """
    first = job.next_seq
    for chunk in _chunks(drafts):
        fresh = await _unknown(session, job.id, chunk)
        if fresh:
            rows = [_row(job, seq, draft) for seq, draft in enumerate(fresh, job.next_seq)]
            await session.execute(_INSERT, rows)
            job.next_seq += len(fresh)
    return job.next_seq - first


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[start : start + CHUNK] for start in range(0, len(items), CHUNK))


async def _unknown(session: AsyncSession, job_id: str, drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts whose keys are new, each key once."""
    keys = {draft.key for draft in drafts if draft.key is not None}
    query = select(Event.key).where(Event.job_id == job_id, Event.key.in_(keys))
    known = set((await session.scalars(query)).all()) if keys else set()
    fresh: list[Draft] = []
    for draft in drafts:
        if draft.key is None or draft.key not in known:
            fresh.append(draft)
            known.add(draft.key or "")
    return fresh


# The time is the draft's, or the database's: one statement for both.
_INSERT = insert(Event.__table__).values(  # type: ignore[arg-type]  # a Table, typed as FromClause
    created_at=func.coalesce(bindparam("said_at", type_=UtcDateTime()), moment())
)


def _row(job: Job, seq: int, draft: Draft) -> dict[str, object]:
    return {
        "job_id": job.id,
        "seq": seq,
        "key": draft.key or f"{draft.type}:{seq}",
        "type": draft.type,
        "attempt": job.attempt,
        "update": draft.update,
        "said_at": None if draft.time is None else datetime.fromtimestamp(draft.time, UTC),
        "data": draft.data,
    }


def _of(project_id: str, job_id: str) -> Select[Event]:
    return select(Event).join(Job).where(Job.project_id == project_id, Event.job_id == job_id)


async def page(
    session: AsyncSession,
    project_id: str,
    job_id: str,
    after: int = 0,
    limit: int = 100,
    types: Collection[str] = (),
) -> Page[Event]:
    """The events of a job after number `after`, oldest first; of some types, or all."""
    query = _of(project_id, job_id).where(Event.seq > after)
    if types:
        query = query.where(Event.type.in_(types))
    return cut((await session.scalars(query.order_by(Event.seq).limit(limit + 1))).all(), limit)


async def by_update(
    session: AsyncSession, project_id: str, job_id: str, type: str, after: int = -1, limit: int = 100
) -> Page[Event]:
    """The newest event of a type for each update after `after`, in order of updates: what stands of a series
    after all resumes."""
    newest = (
        select(func.max(Event.seq))
        .where(Event.job_id == job_id, Event.type == type, Event.update > after)
        .group_by(Event.update)
        .order_by(Event.update)
        .limit(limit + 1)
    )
    query = _of(project_id, job_id).where(Event.seq.in_(newest)).order_by(Event.update)
    return cut((await session.scalars(query)).all(), limit)


async def newest_keyed(session: AsyncSession, job_id: str, prefix: str) -> Event | None:
    """The last event of a job whose key begins so, if any. Not scoped: the caller has the job."""
    query = select(Event).where(Event.job_id == job_id, Event.key.startswith(prefix, autoescape=True))
    return await session.scalar(query.order_by(Event.seq.desc()).limit(1))


async def newest_seq(session: AsyncSession, project_id: str, job_id: str) -> int:
    """The number of the job's last event; 0 for none."""
    query = select(Job.next_seq).where(Job.project_id == project_id, Job.id == job_id)
    return (await session.scalar(query) or 1) - 1


@dataclass(frozen=True)
class News:
    """What there is behind a set of cursors.

    newest: the number of the last event of every job that exists. ended: the jobs that will say no more.
    events: of each job, ascending, those behind its cursors.
    """

    newest: Mapping[str, int]
    ended: Collection[str]
    events: Mapping[str, Sequence[Event]]


async def news(session: AsyncSession, cursors: Collection[tuple[str, int]], limit: int) -> News:
    """For each cursor `(job id, seq)`, the events in `(seq, seq + limit]`: two queries for all of them.

    Not scoped: the caller has checked whose jobs these are.
    """
    asked = {job_id for job_id, _ in cursors}
    states = select(Job.id, Job.next_seq, Job.state).where(Job.id.in_(asked))
    jobs = (await session.execute(states)).all()
    newest = {job_id: next_seq - 1 for job_id, next_seq, _ in jobs}
    behind = [
        and_(Event.job_id == job_id, Event.seq > seq, Event.seq <= seq + limit)
        for job_id, seq in cursors
        if newest.get(job_id, 0) > seq
    ]
    events: dict[str, list[Event]] = {}
    if behind:
        found = await session.scalars(select(Event).where(or_(*behind)).order_by(Event.job_id, Event.seq))
        for event in found:
            events.setdefault(event.job_id, []).append(event)
    return News(newest, {job_id for job_id, _, state in jobs if state in FINAL}, events)
