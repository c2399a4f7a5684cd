"""The states of a job and all moves between them. Nothing else writes `jobs.state`.

    (new)     -> queued       NEW, by jobs.insert_job
    queued    -> running      claim; the attempt number rises
    queued    -> paused       wish("pause")
    queued    -> cancelled    wish("cancel")
    queued    -> failed       reject: it can never run
    running   -> succeeded    succeed
    running   -> failed       fail; or on the way back to the queue, after the last attempt without progress
    running   -> cancelled    cancelled; or on the way back to the queue, when that is wanted
    running   -> paused       paused; or on the way back to the queue, when that is wanted
    running   -> queued       requeue, expire_leases; or paused, when it is wanted to run again
    paused    -> queued       wish("run")
    paused    -> cancelled    wish("cancel")

What the owner wants is a column, never a state. Each move is one UPDATE guarded by the state and the attempt
it starts from, and appends its event in the same unit of work. A worker moves a job only under its fence: one
that has lost the job changes nothing, and learns it by `FenceLost`. All times are the database's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, case, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from ppo_engine.events import Event
from ppo_engine.issues import Issue
from service.errors import WrongState
from service.store import artifacts, events
from service.store.events import Draft
from service.store.fence import Fence as Fence
from service.store.fence import FenceLost as FenceLost
from service.store.fence import lock
from service.store.models import Artifact, Job, State, Wanted
from service.store.types import moment

MAX_STALLED_ATTEMPTS = 3
"""So many attempts without a step of progress fail a job."""

EXPIRE_BATCH = 100
_CLAIM_LOCK = 0x7072_6F78_6D61  # any number, of Postgres' advisory locks

_AT_REST: dict[str, Any] = {"worker": None, "lease_until": None, "queued_at": None}
_LANDING: dict[State, dict[str, Any]] = {
    "queued": _AT_REST | {"wanted": "run", "queued_at": moment()},
    "running": {"queued_at": None},
    "paused": _AT_REST | {"wanted": "pause"},
    "succeeded": _AT_REST | {"finished_at": moment()},
    "failed": _AT_REST | {"finished_at": moment()},
    "cancelled": _AT_REST | {"wanted": "cancel", "finished_at": moment()},
}
"""What a state says about the other columns."""

NEW: dict[str, Any] = {
    "state": "queued",
    "wanted": "run",
    "attempt": 0,
    "stalled_attempts": 0,
    "update": 0,
    "furthest_update": 0,
    "next_seq": 1,
}
"""How a job begins."""

_WISHES: dict[tuple[State, Wanted], State] = {
    ("queued", "pause"): "paused",
    ("queued", "cancel"): "cancelled",
    ("paused", "run"): "queued",
    ("paused", "cancel"): "cancelled",
}
"""Wishes that come true at once, since no worker has the job."""


@dataclass(frozen=True)
class Claim:
    """An attempt that begins. checkpoints: the complete ones, newest first. lease_until: unix seconds."""

    fence: Fence
    project_id: str
    spec: dict[str, Any]
    spec_version: int
    checkpoints: tuple[Artifact, ...]
    lease_until: float


@dataclass(frozen=True)
class Beat:
    """The answer to a beat. lease_until: unix seconds, on the database's clock."""

    wanted: Wanted
    lease_until: float


def said(job: Job, reason: str | None = None) -> Draft:
    """The event of the state a job is in now."""
    data = {"state": job.state, "attempt": job.attempt}
    return Draft("state", job.update, data | ({"reason": reason} if reason else {}))


async def _change(session: AsyncSession, guard: ColumnElement[bool], values: dict[str, Any]) -> Job | None:
    """One guarded UPDATE, which also locks the row; the row as it is then, or None where the guard fails."""
    statement = update(Job).where(guard).values(values).returning(Job)
    options = {"populate_existing": True, "synchronize_session": False}
    return (await session.scalars(statement, execution_options=options)).one_or_none()


async def _move(
    session: AsyncSession, job: Job, to: State, reason: str | None = None, **values: Any
) -> Job | None:
    """Move a job from where it stands in `job`, with the event; None when it is not there any more."""
    guard = (Job.id == job.id) & (Job.state == job.state) & (Job.attempt == job.attempt)
    moved = await _change(session, guard, {"state": to} | _LANDING[to] | values)
    if moved is not None:
        await events.append(session, moved, [said(moved, reason)])
    return moved


# Of owners -----------------------------------------------------------------------------------------------


async def wish(session: AsyncSession, job: Job, wanted: Wanted) -> Job:
    """Take down what the owner wants of a job that the caller has locked.

    Raises:
        WrongState: the job is over, or a cancel was asked for, which is not taken back.
    """
    if wanted == job.wanted and (not job.is_final or job.state == "cancelled"):
        return job
    action = {"run": "resumed", "pause": "paused", "cancel": "cancelled"}[wanted]
    if job.is_final:
        raise WrongState(job.id, job.state, action, "it is over")
    if job.wanted == "cancel":
        raise WrongState(job.id, job.state, action, "a cancel was asked for, which is not taken back")
    if job.state == "running":
        changed = await _change(session, (Job.id == job.id) & (Job.state == "running"), {"wanted": wanted})
    else:
        changed = await _move(session, job, _WISHES[job.state, wanted])
    assert changed is not None, "the caller holds the job's row"
    return changed


async def reject(
    session: AsyncSession, job: Job, code: str, message: str, issues: Sequence[Issue] = ()
) -> Job | None:
    """Fail a queued job that can never run; None when it is not queued any more."""
    assert job.state == "queued", "a running job is failed by its worker"
    return await _move(session, job, "failed", code, **_error(code, message, None, issues))


# Of workers ----------------------------------------------------------------------------------------------


async def claim(
    session: AsyncSession, *, worker: str, queue: str = "default", lease_seconds: float = 60.0
) -> Claim | None:
    """Take up the next job of a queue: by priority, then fair share among projects, then age.

    One claim at a time decides, so that each sees what the others have taken. None: there is nothing to do.
    """
    if session.get_bind().dialect.name == "postgresql":
        await session.execute(select(func.pg_advisory_xact_lock(_CLAIM_LOCK)))
    job = await session.scalar(_next_in(queue).execution_options(populate_existing=True))
    if job is None:
        return None
    taken = await _move(
        session,
        job,
        "running",
        attempt=Job.attempt + 1,
        stalled_attempts=Job.stalled_attempts + 1,
        worker=worker,
        lease_until=moment(lease_seconds),
        started_at=func.coalesce(Job.started_at, moment()),
    )
    assert taken is not None, "the row was selected for update"
    return Claim(
        fence=Fence(taken.id, taken.attempt, worker),
        project_id=taken.project_id,
        spec=taken.spec,
        spec_version=taken.spec_version,
        checkpoints=await artifacts.newest_first(session, taken.project_id, taken.id, "checkpoint"),
        lease_until=_lease_end(taken),
    )


def _next_in(queue: str) -> Select[Job]:
    running = (
        select(Job.project_id, func.count().label("jobs"))
        .where(Job.state == "running")
        .group_by(Job.project_id)
        .subquery()
    )
    return (
        select(Job)
        .outerjoin(running, running.c.project_id == Job.project_id)
        .where(Job.state == "queued", Job.queue == queue)
        .order_by(Job.priority.desc(), func.coalesce(running.c.jobs, 0), Job.created_at, Job.id)
        .limit(1)
        .with_for_update(skip_locked=True, of=Job)
    )


def _lease_end(job: Job) -> float:
    assert job.lease_until is not None, "a running job has a lease"
    return job.lease_until.timestamp()


async def beat(
    session: AsyncSession, fence: Fence, said: Sequence[Event] = (), lease_seconds: float = 60.0
) -> Beat:
    """Keep what the engine said, note how far it is, renew the lease, and read what is wanted.

    Raises:
        FenceLost: nothing was written.
    """
    values: dict[str, Any] = {"lease_until": moment(lease_seconds)}
    if said:
        furthest = max(event.update for event in said)
        ahead = Job.furthest_update < furthest
        values |= {
            "update": said[-1].update,
            "furthest_update": case((ahead, furthest), else_=Job.furthest_update),
            "stalled_attempts": case((ahead, 0), else_=Job.stalled_attempts),
        }
    job = await _change(session, fence.holds(), values)
    if job is None:
        raise FenceLost(fence)
    await events.append(session, job, [Draft.of(event) for event in said])
    return Beat(job.wanted, _lease_end(job))


async def set_plan(session: AsyncSession, fence: Fence, plan: dict[str, Any], total_updates: int) -> None:
    """Keep the plan that a worker made where the API could not see the model.

    Raises:
        FenceLost: nothing was written.
    """
    if await _change(session, fence.holds(), {"plan": plan, "total_updates": total_updates}) is None:
        raise FenceLost(fence)


async def pin(session: AsyncSession, fence: Fence, spec: dict[str, Any], spec_version: int) -> None:
    """Keep the spec with what a worker found where it names what may move: later attempts go on with that.

    Raises:
        FenceLost: nothing was written.
    """
    if await _change(session, fence.holds(), {"spec": spec, "spec_version": spec_version}) is None:
        raise FenceLost(fence)


async def warn(session: AsyncSession, fence: Fence, code: str, message: str) -> None:
    """Tell the owner what a worker came upon, as an engine's warnings are told.

    Raises:
        FenceLost: nothing was written.
    """
    job = await lock(session, fence)
    await events.append(session, job, [Draft("warning", job.update, {"code": code, "message": message})])


async def succeed(session: AsyncSession, fence: Fence) -> None:
    """The run came to its end. Raises FenceLost."""
    await _move(session, await lock(session, fence), "succeeded")


async def fail(
    session: AsyncSession,
    fence: Fence,
    code: str,
    message: str,
    log_tail: str | None = None,
    issues: Sequence[Issue] = (),
) -> None:
    """The run cannot come to its end: why, as a word and as a sentence. Raises FenceLost."""
    error = _error(code, message, log_tail, issues)
    await _move(session, await lock(session, fence), "failed", code, **error)


async def cancelled(session: AsyncSession, fence: Fence) -> None:
    """The run was stopped because its owner cancelled it. Raises FenceLost."""
    job = await lock(session, fence)
    assert job.wanted == "cancel", "a cancel is never taken back"
    await _move(session, job, "cancelled")


async def paused(session: AsyncSession, fence: Fence) -> None:
    """The run was stopped because its owner paused it; where that was taken back meanwhile, it waits again.

    Raises FenceLost.
    """
    await _leave(session, await lock(session, fence), "pause", spend_attempt=False)


async def requeue(
    session: AsyncSession,
    fence: Fence,
    reason: str,
    spend_attempt: bool,
    message: str = "",
    log_tail: str | None = None,
) -> None:
    """Let another attempt go on from the last checkpoint, or do what the owner wants instead.

    spend_attempt:
        Whether this attempt, if it made no progress, counts against the job: the last one of
        `MAX_STALLED_ATTEMPTS` fails it. No, when the worker was asked to leave.
    message, log_tail:
        What the job's error says of the attempt, should it be the last.

    Raises FenceLost.
    """
    await _leave(session, await lock(session, fence), reason, spend_attempt, message, log_tail)


async def _leave(
    session: AsyncSession,
    job: Job,
    reason: str,
    spend_attempt: bool,
    detail: str = "",
    log_tail: str | None = None,
) -> None:
    """The end of an attempt that is not the end of the run."""
    given_back = case((Job.stalled_attempts > 0, Job.stalled_attempts - 1), else_=0)
    values: dict[str, Any] = {} if spend_attempt else {"stalled_attempts": given_back}
    to: State = "queued"
    if job.wanted != "run":
        to = "cancelled" if job.wanted == "cancel" else "paused"
    elif spend_attempt and job.stalled_attempts >= MAX_STALLED_ATTEMPTS:
        to = "failed"
        message = f"{job.stalled_attempts} attempts in a row ended without a step of progress; the last: "
        values = _error(reason, message + (detail or f"{reason}."), log_tail, ())
    moved = await _move(session, job, to, reason, **values)
    assert moved is not None, "the caller holds the job's row"


def _error(code: str, message: str, log_tail: str | None, issues: Sequence[Issue]) -> dict[str, Any]:
    return {
        "error_code": code,
        "error_message": message,
        "error_log_tail": log_tail,
        "error_issues": [issue.model_dump(mode="json") for issue in issues],
    }


# Of the reaper -------------------------------------------------------------------------------------------


async def expire_leases(session: AsyncSession) -> list[str]:
    """Take the jobs of silent workers away from them: each goes where `requeue` would send it.

    The ids of the jobs that were moved; at most `EXPIRE_BATCH`, longest silent first.
    """
    query = (
        select(Job)
        .where(Job.state == "running", Job.lease_until < moment())
        .order_by(Job.lease_until)
        .limit(EXPIRE_BATCH)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
    silent = (await session.scalars(query)).all()
    for job in silent:
        await _leave(session, job, "lost", spend_attempt=True)
    return [job.id for job in silent]


async def queued_without_bell(session: AsyncSession, older_than: float) -> list[str]:
    """The queues in which a job has waited for more than so many seconds: their bells may have been lost."""
    waiting = select(Job.queue).where(Job.state == "queued", Job.queued_at < moment(-older_than))
    return list((await session.scalars(waiting.distinct())).all())


async def running_attempts(session: AsyncSession, job_ids: Collection[str]) -> set[tuple[str, int]]:
    """Which of these jobs run, and in which attempt."""
    query = select(Job.id, Job.attempt).where(Job.state == "running", Job.id.in_(job_ids))
    return {(job_id, attempt) for job_id, attempt in await session.execute(query)}
