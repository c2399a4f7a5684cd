"""`/v1/jobs`: make, estimate, list, get, cancel, delete."""

from __future__ import annotations

from typing import Annotated

import fastapi
from fastapi import APIRouter, Response

from ppo_engine.plan import Plan
from service.api.bodies import JsonRoute
from service.api.context import IdempotencyKey, JobId, ListQuery, Project, Shared
from service.api.openapi import refusals
from service.specs import Deleted, EstimateRequest, Job, JobCreate, Page, State

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=JsonRoute)


class JobsQuery(ListQuery):
    """Which jobs."""

    state: State | None = None
    """Only jobs in this state."""


@router.post("", status_code=201, responses=refusals(400, 409, 413, 422))
async def create_job(
    body: JobCreate,
    shared: Shared,
    project: Project,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Make a job. It waits until a worker takes it up."""
    made = await shared.jobs.create(project, body, idempotency_key)
    response.headers["Location"] = f"/v1/jobs/{made.job.id}"
    if made.is_replay:
        response.headers["Idempotent-Replayed"] = "true"
    return made.job


@router.post("/estimate", responses=refusals(400, 413, 422))
async def estimate_job(body: EstimateRequest, shared: Shared, project: Project) -> Plan:
    """Plan a run without making a job: batch sizes, updates, parameters trained, memory by role, warnings."""
    return await shared.jobs.estimate(project, body.spec)


@router.get("", responses=refusals(400, 422))
async def list_jobs(
    query: Annotated[JobsQuery, fastapi.Query()], shared: Shared, project: Project
) -> Page[Job]:
    """The project's jobs, newest first."""
    return await shared.jobs.list(project, query.state, query.after, query.limit)


@router.get("/{job_id}", responses=refusals(404))
async def get_job(job_id: JobId, shared: Shared, project: Project) -> Job:
    """One job."""
    return await shared.jobs.get(project, job_id)


@router.post("/{job_id}/cancel", responses=refusals(404, 409))
async def cancel_job(job_id: JobId, shared: Shared, project: Project) -> Job:
    """Stop a job: at once where it waits, at its next update where it runs. What it made stays."""
    return await shared.jobs.cancel(project, job_id)


@router.delete("/{job_id}", responses=refusals(404, 409))
async def delete_job(job_id: JobId, shared: Shared, project: Project) -> Deleted:
    """Delete a job that is over, with all it said and made."""
    await shared.jobs.delete(project, job_id)
    return Deleted(object="job", id=job_id)
