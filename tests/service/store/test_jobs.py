"""Jobs as their owners see them: pages, cursors, deletion, and the walls between projects."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from service.errors import NotFound, UnknownCursor, WrongState
from service.store import artifacts, jobs, transitions
from service.store.models import Artifact, Base, Event, Job, JobFile
from service.store.session import Store
from service.store.transitions import FenceLost
from tests.service.store.making import OVER, claim, make_job, running, said
from tests.service.store.test_artifacts import record

pytestmark = pytest.mark.anyio


async def test_a_job_is_kept_as_it_was_given(store: Store, project: str):
    job_id = await make_job(
        store,
        project,
        name="polite",
        spec={"version": 1, "learning_rate": 1e-5},
        plan={"num_total_batches": 12},
        total_updates=12,
        metadata={"team": "support"},
        queue="large",
        priority=3,
    )
    async with store.read() as session:
        job = await jobs.get_job(session, project, job_id)
    assert job_id.startswith("job_")
    assert (job.name, job.spec, job.spec_version) == ("polite", {"version": 1, "learning_rate": 1e-5}, 1)
    assert (job.plan, job.total_updates) == ({"num_total_batches": 12}, 12)
    assert (job.metadata_, job.queue, job.priority) == ({"team": "support"}, "large", 3)


async def test_pages_show_every_job_once_newest_first(store: Store, project: str, stranger: str):
    made = []
    for _ in range(7):
        made.append(await make_job(store, project))
        await make_job(store, stranger)
    seen: list[str] = []
    sizes: list[int] = []
    has_more = True
    async with store.read() as session:
        while has_more:
            after = seen[-1] if seen else None
            page = await jobs.list_jobs(session, project, after=after, limit=3)
            seen += [job.id for job in page.data]
            sizes.append(len(page.data))
            has_more = page.has_more
    assert sizes == [3, 3, 1]
    assert seen == sorted(made, reverse=True)


async def test_a_list_of_one_state_goes_on_behind_a_job_that_left_it(store: Store, project: str):
    made = sorted([await make_job(store, project) for _ in range(3)], reverse=True)
    async with store.write() as session:
        first = await jobs.list_jobs(session, project, state="queued", limit=1)
        await jobs.set_wanted(session, project, made[0], "cancel")
        rest = await jobs.list_jobs(session, project, state="queued", after=made[0])
    assert [job.id for job in first.data] == made[:1]
    assert ([job.id for job in rest.data], rest.has_more) == (made[1:], False)


async def test_a_list_goes_on_behind_a_job_that_is_gone(store: Store, project: str):
    made = [await make_job(store, project) for _ in range(3)]
    async with store.write() as session:
        await jobs.set_wanted(session, project, made[1], "cancel")
        await jobs.delete_job(session, project, made[1])
        rest = await jobs.list_jobs(session, project, after=made[1])
    assert [job.id for job in rest.data] == made[:1]


@pytest.mark.parametrize("cursor", ["theirs", "job_none", "", f"file_{'0' * 32}", f"job_{'0' * 31}é", "\0"])
async def test_a_cursor_of_another_list_is_refused_by_name(
    store: Store, project: str, stranger: str, cursor: str
):
    theirs = await make_job(store, stranger)
    cursor = theirs if cursor == "theirs" else cursor
    async with store.read() as session:
        with pytest.raises(UnknownCursor) as refusal:
            await jobs.list_jobs(session, project, after=cursor)
    assert repr(cursor) in refusal.value.detail
    assert refusal.value.issues[0].loc == ("after",)


async def test_a_stranger_finds_and_changes_nothing(store: Store, project: str, stranger: str):
    job_id = await make_job(store, project)
    async with store.write() as session:
        with pytest.raises(NotFound):
            await jobs.get_job(session, stranger, job_id)
        with pytest.raises(NotFound):
            await jobs.set_wanted(session, stranger, job_id, "cancel")
        with pytest.raises(NotFound):
            await jobs.delete_job(session, stranger, job_id)
        assert (await jobs.list_jobs(session, stranger)).data == []
        assert (await jobs.get_job(session, project, job_id)).state == "queued"


async def test_a_job_is_deleted_with_all_that_hangs_on_it(store: Store, project: str):
    fence = await running(store, project)
    await record(store, fence, "export", 1)
    async with store.write() as session:
        await transitions.beat(session, fence, [said(1)])
        await transitions.succeed(session, fence)
    async with store.write() as session:
        await jobs.delete_job(session, project, fence.job_id)
    async with store.read() as session:
        tables: list[type[Base]] = [Job, Event, Artifact, JobFile]
        for table in tables:
            assert await session.scalar(select(func.count()).select_from(table)) == 0


async def test_a_late_worker_of_a_deleted_job_writes_nothing(store: Store, project: str):
    late = await running(store, project, lease=OVER)
    async with store.write() as session:
        await transitions.expire_leases(session)
        await jobs.set_wanted(session, project, late.job_id, "cancel")
        await jobs.delete_job(session, project, late.job_id)
    attempts: list[Callable[[AsyncSession], Awaitable[object]]] = [
        lambda session: transitions.beat(session, late, [said(1)]),
        lambda session: transitions.set_plan(session, late, {}, 1),
        lambda session: transitions.warn(session, late, "code", "message"),
        lambda session: transitions.succeed(session, late),
        lambda session: transitions.fail(session, late, "crash", "It broke."),
        lambda session: transitions.requeue(session, late, "lost", True),
        lambda session: artifacts.record(session, late, "export", 1, [], "jobs/a/"),
        lambda session: artifacts.forget_others(session, late, "export", set),
    ]
    for attempt in attempts:
        async with store.write() as session:
            with pytest.raises(FenceLost):
                await attempt(session)
    async with store.read() as session:
        tables: list[type[Base]] = [Job, Event, Artifact, JobFile]
        for table in tables:
            assert await session.scalar(select(func.count()).select_from(table)) == 0


async def test_a_job_that_is_not_over_is_not_deleted(store: Store, project: str):
    job_id = await make_job(store, project)
    for state in ("queued", "running"):
        if state == "running":
            await claim(store)
        async with store.write() as session:
            with pytest.raises(
                WrongState, match=f"{job_id} is {state} and cannot be deleted: cancel it first"
            ):
                await jobs.delete_job(session, project, job_id)
