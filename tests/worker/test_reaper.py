"""The reaper deletes from storage what nobody knows any more; storage never keeps it from its other work."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import func, select, update

from service.jobs import Jobs
from service.planning import Planner
from service.storage import Storage
from service.store import deletions, jobs, transitions
from service.store.models import Artifact, Deletion, Event, Job
from service.store.types import moment
from service.sweep import sweep
from tests.worker.fleet import Fleet
from tests.worker.waiting import eventually
from worker.reaper import Reaper

pytestmark = pytest.mark.anyio

ENDLESS = ("--updates", 1_000_000, "--seconds", 0.05)


@asynccontextmanager
async def reapers(fleet: Fleet, number: int = 1) -> AsyncIterator[None]:
    """So many reapers at once, while the body runs."""
    running = [Reaper(fleet.settings, idle=lambda: False) for _ in range(number)]
    for reaper in running:
        reaper.start()
    yield
    for reaper in running:
        reaper.stop()


async def put(fleet: Fleet, key: str) -> None:
    source = fleet.directory / "source"
    source.write_bytes(b"content")
    await fleet.storage.put_file(key, source)


async def note(fleet: Fleet, prefix: str) -> None:
    async with fleet.store.write() as session:
        await deletions.note(session, prefix)


async def count(fleet: Fleet, table: Any) -> int:
    async with fleet.store.read() as session:
        return await session.scalar(select(func.count()).select_from(table)) or 0


async def all_deleted(fleet: Fleet) -> None:
    async def look() -> bool:
        return await count(fleet, Deletion) == 0

    await eventually(look, "no deletion is left")


def stored(fleet: Fleet) -> set[str]:
    root = fleet.settings.data_dir / "storage"
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


async def test_several_reapers_delete_what_is_due(fleet: Fleet) -> None:
    for number in range(10):
        await put(fleet, f"files/{number}/prompts.jsonl")
        await note(fleet, f"files/{number}/")
    await put(fleet, "files/kept/prompts.jsonl")
    async with reapers(fleet, 3):
        await all_deleted(fleet)
    assert stored(fleet) == {"files/kept/prompts.jsonl"}


async def test_storage_that_hangs_keeps_no_job_from_being_settled(
    embedded: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, back = threading.Event(), threading.Event()
    delete = Storage._delete_prefix

    def slow(self: Storage, prefix: str) -> None:
        hanging.set()
        back.wait()
        delete(self, prefix)

    monkeypatch.setattr(Storage, "_delete_prefix", slow)
    await put(embedded, "files/a/prompts.jsonl")
    await note(embedded, "files/a/")
    async with reapers(embedded):

        async def look() -> bool:
            return hanging.is_set()

        await eventually(look, "storage hangs")
        job_id = await embedded.submit(bell=False)
        async with embedded.store.write() as session:
            await transitions.claim(session, worker="dead", queue=embedded.settings.queue, lease_seconds=-1.0)
        await embedded.reaches(job_id, "queued")
        back.set()
        await all_deleted(embedded)


async def test_a_late_worker_of_a_deleted_job_leaves_nothing(fleet: Fleet) -> None:
    job_id = await fleet.submit(bell=False)
    async with fleet.working(*ENDLESS):
        await fleet.has_checkpoint(job_id, 4)
        async with fleet.store.write() as session:
            await session.execute(update(Job).where(Job.id == job_id).values(lease_until=moment(-1.0)))
            await transitions.expire_leases(session)
            await jobs.set_wanted(session, fleet.project, job_id, "cancel")
        await Jobs(fleet.store, Planner(fleet.settings, fleet.store), lambda _: None, lambda: None).delete(
            fleet.project, job_id
        )
        assert await count(fleet, Deletion) == 2, "at once, and when no worker can have it any more"
        await sweep(fleet.store, fleet.storage)
        await put(fleet, f"jobs/{job_id}/a1/update-9/late")  # as it was on its way

    fleet.no_engine_left()
    for table in (Job, Event, Artifact):
        assert await count(fleet, table) == 0
    assert f"jobs/{job_id}/a1/update-9/late" in stored(fleet)
    async with fleet.store.write() as session:
        await session.execute(update(Deletion).values(due=moment()))  # a day goes by
    async with reapers(fleet):
        await all_deleted(fleet)
    assert [key for key in stored(fleet) if key.startswith("jobs/")] == []
