"""What a worker shows with everything it writes: the attempt it was given. A stale one opens nothing."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, select
from sqlalchemy.ext.asyncio import AsyncSession

from service.store.models import Job


@dataclass(frozen=True)
class Fence:
    """One attempt of one worker at a job."""

    job_id: str
    attempt: int
    worker: str

    def holds(self) -> ColumnElement[bool]:
        """The condition under which the attempt is still the worker's."""
        return and_(
            Job.id == self.job_id,
            Job.state == "running",
            Job.attempt == self.attempt,
            Job.worker == self.worker,
        )


class FenceLost(Exception):
    """The attempt is over, or somebody else's: the job was requeued, taken up, ended, or deleted."""

    def __init__(self, fence: Fence) -> None:
        super().__init__(f"attempt {fence.attempt} of {fence.worker} at {fence.job_id} no longer holds")
        self.fence = fence


async def lock(session: AsyncSession, fence: Fence) -> Job:
    """The job, held by this unit of work until its end.

    Raises:
        FenceLost: the attempt is not the worker's any more.
    """
    query = select(Job).where(fence.holds()).with_for_update().execution_options(populate_existing=True)
    job = await session.scalar(query)
    if job is None:
        raise FenceLost(fence)
    return job
