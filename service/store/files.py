"""Files of prompts: their rows here, their bytes in storage under `storage_key`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from service.errors import FileInUse, NotFound
from service.store.ids import new_id
from service.store.models import FINAL, File, Job, JobFile
from service.store.paging import Page, newest_first

NAMED_IN_REFUSAL = 3


def new_file_id() -> str:
    """The id of a file whose bytes go to storage before its row is written."""
    return new_id("file")


async def insert_file(
    session: AsyncSession,
    project_id: str,
    *,
    id: str,
    filename: str,
    bytes: int,
    sha256: str,
    rows: int,
    columns: Sequence[str],
    format: Literal["jsonl", "csv", "parquet"],
    storage_key: str,
) -> File:
    """Make a file known whose bytes are safe in storage. bytes, sha256: of what lies there."""
    file = File(
        id=id,
        project_id=project_id,
        filename=filename,
        bytes=bytes,
        sha256=sha256,
        rows=rows,
        columns=list(columns),
        format=format,
        storage_key=storage_key,
    )
    session.add(file)
    await session.flush()
    return file


async def get_file(session: AsyncSession, project_id: str, file_id: str) -> File:
    """A file of the project.

    Raises:
        NotFound: the project has no such file.
    """
    file = await session.scalar(select(File).where(File.id == file_id, File.project_id == project_id))
    if file is None:
        raise NotFound("file", file_id)
    return file


async def list_files(
    session: AsyncSession, project_id: str, *, after: str | None = None, limit: int = 20
) -> Page[File]:
    """The project's files, newest first, behind the file `after`.

    Raises:
        UnknownCursor: `after` cannot be a file of the project, now or before.
    """
    return await newest_first(session, File, project_id, after, limit)


async def delete_file(session: AsyncSession, project_id: str, file_id: str) -> File:
    """Delete a file's row; its bytes are the caller's, who notes their deletion in this unit of work.

    Raises:
        NotFound: the project has no such file.
        FileInUse: a job that is not over reads it.
    """
    mine = (File.id == file_id, File.project_id == project_id)
    # Locked before its jobs are looked for: a job that is being made holds the row (see `hold`), or waits.
    file = await session.scalar(select(File).where(*mine).with_for_update())
    if file is None:
        raise NotFound("file", file_id)
    users = (
        select(Job.id)
        .join(JobFile)
        .where(JobFile.file_id == file_id, Job.state.not_in(FINAL))
        .order_by(Job.id)
        .limit(NAMED_IN_REFUSAL)
    )
    if job_ids := (await session.scalars(users)).all():
        raise FileInUse(file_id, job_ids)
    await session.delete(file)
    return file


async def hold(session: AsyncSession, project_id: str, file_ids: Collection[str]) -> None:
    """Keep files from being deleted until this unit of work ends.

    Raises:
        NotFound: one of them is not in the project.
    """
    mine = select(File.id).where(File.project_id == project_id, File.id.in_(file_ids)).order_by(File.id)
    held = set((await session.scalars(mine.with_for_update(read=True, key_share=True))).all())
    for file_id in file_ids:
        if file_id not in held:
            raise NotFound("file", file_id)


async def files_of(session: AsyncSession, project_id: str, job_id: str) -> list[File]:
    """The files a job reads."""
    query = select(File).join(JobFile).where(JobFile.job_id == job_id, File.project_id == project_id)
    return list((await session.scalars(query.order_by(File.id))).all())
