"""What an owner does with jobs: plan, make, look up, cancel, delete.

Each call is one use case, and one unit of work at the store where it changes anything. No HTTP here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ppo_engine.issues import Issue, shown
from ppo_engine.plan import Plan
from ppo_engine.spec import SPEC_VERSION, RunSpec
from service.errors import NotFound
from service.planning import Planned, Planner, invalid
from service.specs import Job, JobCreate, JobError, Page, State, unstorable
from service.store import deletions, idempotency, jobs
from service.store import models as rows
from service.store.session import Store

ROUTE = "jobs"
CREATED = 201

LATE_SECONDS = 24 * 3600.0
"""So long after a job was deleted, its bytes are deleted once more: a worker that was stalled goes on with an
upload before it learns that it has lost the job. Longer than any lease."""

Ring = Callable[[str], object]


@dataclass(frozen=True)
class Made:
    """A job that was made, now or by an earlier request with the same key."""

    job: Job
    is_replay: bool = False


class Jobs:
    """The use cases of jobs.

    ring: tells a queue's workers that there is work. sweep: has the bytes of what was deleted removed. They
    neither fail nor wait.
    """

    def __init__(self, store: Store, planner: Planner, ring: Ring, sweep: Callable[[], object]) -> None:
        self._store = store
        self._planner = planner
        self._ring = ring
        self._sweep = sweep

    async def estimate(self, project_id: str, spec: Mapping[str, Any]) -> Plan:
        """The numbers that follow from a spec. Raises Invalid."""
        planned = (await self._planner.plan(project_id, spec)).plan
        if planned is None:
            msg = (
                "Not given, and the number of prompts is not known before a worker has read prompts.train on "
                "the hub; give it to have an estimate."
            )
            raise invalid([Issue(loc=("spec", "ppo", "total_episodes"), msg=msg)])
        return planned

    async def create(self, project_id: str, body: JobCreate, key: str | None) -> Made:
        """Make a job, and tell the workers.

        key: chosen by the client; a second request with it gets the first one's job.

        Raises:
            Invalid: the spec breaks a rule.
            RequestInFlight, KeyReused: the key was sent before.
        """
        if issues := list(unstorable({"name": body.name, "metadata": body.metadata})):
            raise invalid(issues)
        request = None if key is None else idempotency.Request(project_id, ROUTE, key, _fingerprint(body))
        # Looked up before the spec is judged: its files may be gone by now, and the answer still stands.
        if request is not None and (earlier := await self._answered(request)) is not None:
            return earlier
        planned = await self._planner.plan(project_id, body.spec)
        new = _new_job(body, planned)
        made = await self._insert(project_id, new, planned.spec, request)
        if not made.is_replay:
            self._ring(new.queue)
        return made

    async def _answered(self, request: idempotency.Request) -> Made | None:
        async with self._store.write() as session:
            answer = await idempotency.begin(session, request)
        return None if answer is None else Made(Job.model_validate(answer.body), is_replay=True)

    async def _insert(
        self, project_id: str, new: jobs.NewJob, spec: RunSpec, request: idempotency.Request | None
    ) -> Made:
        """The job and, where a key was given, the answer to it, in one unit of work."""
        async with self._store.write() as session:
            if request is not None and (answer := await idempotency.begin(session, request)) is not None:
                return Made(Job.model_validate(answer.body), is_replay=True)
            try:
                row = await jobs.insert_job(session, project_id, new)
            except NotFound as error:
                # Deleted since the spec was planned.
                raise invalid([_lost_file(spec, error.id)]) from None
            job = job_of(row)
            if request is not None:
                answer = idempotency.Answer(CREATED, job.model_dump(mode="json"))
                await idempotency.finish(session, request, answer)
            return Made(job)

    async def get(self, project_id: str, job_id: str) -> Job:
        """Raises NotFound."""
        async with self._store.read() as session:
            return job_of(await jobs.get_job(session, project_id, job_id))

    async def list(self, project_id: str, state: State | None, after: str | None, limit: int) -> Page[Job]:
        """The project's jobs, newest first. Raises UnknownCursor."""
        async with self._store.read() as session:
            page = await jobs.list_jobs(session, project_id, state=state, after=after, limit=limit)
            return Page(data=[job_of(row) for row in page.data], has_more=page.has_more)

    async def cancel(self, project_id: str, job_id: str) -> Job:
        """Ask for a job to stop: at once where it waits, at its next update where it runs.

        Raises:
            NotFound, WrongState.
        """
        async with self._store.write() as session:
            return job_of(await jobs.set_wanted(session, project_id, job_id, "cancel"))

    async def delete(self, project_id: str, job_id: str) -> None:
        """Delete a job that is over, and all it made.

        Raises:
            NotFound, WrongState.
        """
        async with self._store.write() as session:
            await jobs.delete_job(session, project_id, job_id)
            for seconds in (0.0, LATE_SECONDS):
                await deletions.note(session, f"jobs/{job_id}/", seconds)
        self._sweep()


def _fingerprint(body: JobCreate) -> str:
    return idempotency.fingerprint(json.dumps(body.model_dump(mode="python"), sort_keys=True).encode())


def _new_job(body: JobCreate, planned: Planned) -> jobs.NewJob:
    plan = planned.plan
    return jobs.NewJob(
        spec=planned.spec.model_dump(mode="json"),
        spec_version=SPEC_VERSION,
        name=body.name,
        plan=None if plan is None else plan.model_dump(mode="json"),
        total_updates=None if plan is None else plan.num_total_batches,
        metadata=body.metadata,
        files=planned.spec.prompts.files(),
    )


def _lost_file(spec: RunSpec, file_id: str) -> Issue:
    field = "train" if spec.prompts.train == file_id else "eval"
    return Issue(loc=("spec", "prompts", field), msg=f"{shown(file_id)} given, which was just deleted.")


def job_of(row: rows.Job) -> Job:
    """A job as its owner sees it."""
    error = None
    if row.error_code is not None:
        error = JobError(
            code=row.error_code,
            message=row.error_message or "",
            log_tail=row.error_log_tail,
            issues=[Issue.model_validate(issue) for issue in row.error_issues or ()],
        )
    return Job(
        id=row.id,
        name=row.name,
        state=row.state,
        wanted=row.wanted,
        attempt=row.attempt,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        update=row.update,
        total_updates=row.total_updates,
        error=error,
        spec=row.spec,
        plan=None if row.plan is None else Plan.model_validate(row.plan),
        metadata=row.metadata_,
    )
