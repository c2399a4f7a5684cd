"""`/v1/jobs/{id}/checkpoints` and `/adapter`: the policies a job exported, file by file or as one archive."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import fastapi
from fastapi import APIRouter, Path, Request, Response
from pydantic import Field

from service.api.context import MOST, Context, JobId, Project, Query, Shared
from service.api.downloads import DOWNLOADED, Content, download
from service.api.openapi import refusals
from service.blobs import Blob
from service.specs import Checkpoint, Page

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["checkpoints"])

Update = Annotated[int, Path(ge=0, le=MOST, description="Updates completed when it was exported.")]

FileName = Annotated[
    str,
    Path(description="The name of one of the checkpoint's files.", examples=["adapter_model.safetensors"]),
]

_DOWNLOAD = {**DOWNLOADED, **refusals(404, 412, 416, 422)}


class CheckpointsQuery(Query):
    """Which checkpoints."""

    after: int = Field(default=-1, ge=-1, le=MOST)
    """The update of the last checkpoint one has."""
    limit: int = Field(default=20, ge=1, le=100)
    """Most checkpoints of the answer."""


@router.get("/checkpoints", responses=refusals(404, 422))
async def list_checkpoints(
    job_id: JobId, query: Annotated[CheckpointsQuery, fastapi.Query()], shared: Shared, project: Project
) -> Page[Checkpoint]:
    """The policies exported so far, by update."""
    return await shared.results.checkpoints(project, job_id, query.after, query.limit)


@router.get("/checkpoints/{update}", responses=refusals(404, 422))
async def get_checkpoint(job_id: JobId, update: Update, shared: Shared, project: Project) -> Checkpoint:
    """One exported policy: its files, with sizes and digests."""
    return await shared.results.checkpoint(project, job_id, update)


@router.get("/checkpoints/{update}/files/{name:path}", response_class=Response, responses=_DOWNLOAD)
async def download_checkpoint_file(
    request: Request, job_id: JobId, update: Update, name: FileName, shared: Shared, project: Project
) -> Response:
    """One file of an exported policy."""
    blob = await shared.results.checkpoint_file(project, job_id, update, name)
    return await download(request, _content(shared, blob, blob.name.rpartition("/")[2]))


@router.get("/adapter", response_class=Response, responses=_DOWNLOAD)
async def download_adapter(request: Request, job_id: JobId, shared: Shared, project: Project) -> Response:
    """The newest exported policy as one archive, once the job is over the final one: an adapter, or a whole
    model, ready for `from_pretrained`."""
    blob = await shared.results.adapter(project, job_id)
    suffix = blob.name.partition(".")[2] or "tar"
    return await download(request, _content(shared, blob, f"{job_id}.{suffix}"))


def _content(shared: Context, blob: Blob, filename: str) -> Content:
    return Content(filename, blob.size, blob.sha256, partial(shared.results.open, blob))
