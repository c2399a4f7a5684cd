"""`/v1/files`: bring in prompt files, list, look at, read, delete."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import fastapi
from fastapi import APIRouter, Depends, Form, Path, Request, Response, UploadFile
from pydantic import BaseModel, ConfigDict

from service.api.bodies import parts_once
from service.api.context import IdempotencyKey, ListQuery, Project, Shared
from service.api.downloads import DOWNLOADED, Content, download
from service.api.openapi import refusals
from service.files import Upload
from service.specs import Deleted, File, Page

router = APIRouter(prefix="/v1/files", tags=["files"], form_limits={"max_files": 8, "max_fields": 8})

FORM_OVERHEAD = 64 * 1024
"""Bytes a form may have around its file."""

FileId = Annotated[
    str,
    Path(description="The id of a file of the project.", examples=["file_0190f3a2b4c57d8e9f00112233445566"]),
]

_DOWNLOAD = {**DOWNLOADED, **refusals(404, 412, 416)}


class FileForm(BaseModel):
    """A prompt file: JSONL, CSV, or Parquet, told by its name.

    Each row has `prompt` (text), `messages` (chat, the last from the user), or `input_ids` (token ids);
    further columns are kept for rewards.
    """

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [
                {
                    "file": '{"prompt": "Say hello.", "label": "hello"}\n{"prompt": "Say bye."}\n',
                    "purpose": "prompts",
                }
            ]
        },
    )

    file: UploadFile
    """The file, with its name."""
    purpose: Literal["prompts"] = "prompts"
    """What it is for: prompts are all there is."""


@router.post("", status_code=201, responses=refusals(400, 409, 413, 422), dependencies=[Depends(parts_once)])
async def upload_file(
    form: Annotated[FileForm, Form(media_type="multipart/form-data")],
    shared: Shared,
    project: Project,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> File:
    """Bring in a prompt file. Every row is checked now: what a bad one lacks is said by its line."""
    upload = Upload(form.file.filename or "", form.file.file)
    kept = await shared.files.create(project, upload, idempotency_key)
    response.headers["Location"] = f"/v1/files/{kept.file.id}"
    if kept.is_replay:
        response.headers["Idempotent-Replayed"] = "true"
    return kept.file


@router.get("", responses=refusals(400, 422))
async def list_files(
    query: Annotated[ListQuery, fastapi.Query()], shared: Shared, project: Project
) -> Page[File]:
    """The project's files, newest first."""
    return await shared.files.list(project, query.after, query.limit)


@router.get("/{file_id}", responses=refusals(404))
async def get_file(file_id: FileId, shared: Shared, project: Project) -> File:
    """One file."""
    return await shared.files.get(project, file_id)


@router.delete("/{file_id}", responses=refusals(404, 409))
async def delete_file(file_id: FileId, shared: Shared, project: Project) -> Deleted:
    """Delete a file that no job will read any more."""
    await shared.files.delete(project, file_id)
    return Deleted(object="file", id=file_id)


@router.get("/{file_id}/content", response_class=Response, responses=_DOWNLOAD)
async def download_file(request: Request, file_id: FileId, shared: Shared, project: Project) -> Response:
    """A file's rows as canonical JSONL, whatever it was uploaded as: exactly what a run reads."""
    file = await shared.files.get(project, file_id)
    name = f"{file.filename.rpartition('.')[0]}.jsonl"
    opened = partial(shared.files.open, project, file_id)
    return await download(request, Content(name, file.bytes, file.sha256, opened, "application/jsonl"))
