"""Files of prompts: rows, pages, and the jobs that keep them."""

from __future__ import annotations

import asyncio

import pytest

from service.errors import FileInUse, NotFound, UnknownCursor
from service.store import files, jobs, transitions
from service.store.session import Store
from tests.service.store.making import SPEC, claim, make_job

pytestmark = pytest.mark.anyio


async def make_file(store: Store, project: str) -> str:
    file_id = files.new_file_id()
    async with store.write() as session:
        await files.insert_file(
            session,
            project,
            id=file_id,
            filename="walks.csv",
            bytes=2**40,
            sha256="ab" * 32,
            rows=3,
            columns=["prompt", "goal"],
            format="csv",
            storage_key=f"files/{file_id}/content.jsonl",
        )
    return file_id


async def delete(store: Store, project: str, file_id: str) -> None:
    async with store.write() as session:
        await files.delete_file(session, project, file_id)


async def test_a_file_is_kept_as_it_was_given(store: Store, project: str, stranger: str):
    file_id = await make_file(store, project)
    async with store.read() as session:
        file = await files.get_file(session, project, file_id)
        with pytest.raises(NotFound):
            await files.get_file(session, stranger, file_id)
    assert (file.filename, file.bytes, file.rows, file.columns) == ("walks.csv", 2**40, 3, ["prompt", "goal"])
    assert (file.format, file.storage_key) == ("csv", f"files/{file_id}/content.jsonl")
    assert file.created_at is not None


async def test_pages_of_files_know_their_own_cursors(store: Store, project: str):
    made = sorted([await make_file(store, project) for _ in range(3)], reverse=True)
    job_id = await make_job(store, project)
    async with store.read() as session:
        first = await files.list_files(session, project, limit=2)
        rest = await files.list_files(session, project, after=made[1], limit=2)
        with pytest.raises(UnknownCursor, match=job_id):
            await files.list_files(session, project, after=job_id)
    assert ([file.id for file in first.data], first.has_more) == (made[:2], True)
    assert ([file.id for file in rest.data], rest.has_more) == (made[2:], False)


async def test_a_file_stays_while_a_job_will_read_it(store: Store, project: str):
    file_id = await make_file(store, project)
    job_id = await make_job(store, project, files=[file_id])
    for state in ("queued", "running", "paused"):
        if state == "running":
            fence = (await claim(store)).fence
        if state == "paused":
            async with store.write() as session:
                await jobs.set_wanted(session, project, job_id, "pause")
                await transitions.paused(session, fence)
        with pytest.raises(FileInUse, match=f"{file_id} is used by {job_id}"):
            await delete(store, project, file_id)
    async with store.write() as session:
        await jobs.set_wanted(session, project, job_id, "cancel")
    await delete(store, project, file_id)
    async with store.read() as session:
        assert (await jobs.get_job(session, project, job_id)).state == "cancelled"
        assert await files.files_of(session, project, job_id) == []


async def test_a_job_knows_its_files(store: Store, project: str, stranger: str):
    made = sorted([await make_file(store, project), await make_file(store, project)])
    await make_file(store, project)
    job_id = await make_job(store, project, files=[*made, made[0]])
    async with store.read() as session:
        assert [file.id for file in await files.files_of(session, project, job_id)] == made
        assert await files.files_of(session, stranger, job_id) == []


async def test_a_job_needs_files_of_its_project(store: Store, project: str, stranger: str):
    theirs = await make_file(store, stranger)
    with pytest.raises(NotFound, match=theirs):
        await make_job(store, project, files=[theirs])
    async with store.read() as session:
        assert (await jobs.list_jobs(session, project)).data == []


async def test_a_stranger_deletes_nothing(store: Store, project: str, stranger: str):
    file_id = await make_file(store, project)
    with pytest.raises(NotFound):
        await delete(store, stranger, file_id)
    await delete(store, project, file_id)


async def test_a_file_cannot_go_while_a_job_is_being_made_of_it(store: Store, project: str):
    """The job's unit of work is open; the deletion waits for its end, and is refused then."""
    file_id = await make_file(store, project)
    async with store.write() as session:
        await files.hold(session, project, [file_id])
        deletion = asyncio.create_task(delete(store, project, file_id))
        await asyncio.sleep(0.2)  # time to go wrong; nothing to wait for, since nothing is to happen
        assert not deletion.done()
        await jobs.insert_job(session, project, jobs.NewJob(SPEC, 1, files=[file_id]))
    with pytest.raises(FileInUse):
        await deletion
