"""Short ways to what most tests of the store begin with."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from ppo_engine.events import Event
from service.store import jobs, models, transitions
from service.store.session import Store
from service.store.transitions import Claim, Fence

SPEC: dict[str, Any] = {"version": 1}
FOREVER = 3600.0  # seconds: a lease that no test outlives
OVER = -1.0  # a lease that is over when it begins


async def make_job(store: Store, project: str, **given: Any) -> str:
    """The id of a new queued job."""
    async with store.write() as session:
        new = jobs.NewJob(**{"spec": SPEC, "spec_version": 1} | given)
        return (await jobs.insert_job(session, project, new)).id


async def claim(store: Store, worker: str = "w1", lease: float = FOREVER, queue: str = "default") -> Claim:
    """The claim of the next job, which there must be."""
    async with store.write() as session:
        claim = await transitions.claim(session, worker=worker, queue=queue, lease_seconds=lease)
    assert claim is not None
    return claim


async def running(store: Store, project: str, lease: float = FOREVER) -> Fence:
    """A new job, taken up by a worker."""
    job_id = await make_job(store, project)
    fence = (await claim(store, lease=lease)).fence
    assert fence.job_id == job_id
    return fence


async def look(store: Store, job_id: str) -> models.Job:
    """The row of a job as it is now."""
    async with store.read() as session:
        return (await session.scalars(select(models.Job).where(models.Job.id == job_id))).one()


async def history(store: Store, job_id: str) -> list[models.Event]:
    """All events of a job."""
    async with store.read() as session:
        query = select(models.Event).where(models.Event.job_id == job_id).order_by(models.Event.seq)
        return list((await session.scalars(query)).all())


async def states(store: Store, job_id: str) -> list[str]:
    """The states a job has gone through, as its events tell."""
    return [str(event.data["state"]) for event in await history(store, job_id) if event.type == "state"]


def said(update: int, type: str = "metrics", **data: Any) -> Event:
    """What an engine says at an update."""
    return Event(key=f"{type}:{update}", type=type, update=update, time=1_700_000_000.25 + update, data=data)
