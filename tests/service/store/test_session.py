"""Units of work on both databases: what is kept, what is not, and what may stand in a column."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError

from service.store import keys
from service.store.models import Job, Project
from service.store.session import Store
from service.store.types import moment
from tests.service.store.making import look, make_job

pytestmark = pytest.mark.anyio


async def names(store: Store) -> set[str]:
    async with store.read() as session:
        return set((await session.scalars(select(Project.name))).all())


async def test_a_unit_that_writes_is_kept_as_a_whole(store: Store):
    async with store.write() as session:
        await keys.ensure_project(session, "a")
        await keys.ensure_project(session, "b")
    assert await names(store) == {"a", "b"}


async def test_a_unit_that_fails_leaves_nothing(store: Store):
    async def fail() -> None:
        async with store.write() as session:
            await keys.ensure_project(session, "a")
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    assert await names(store) == set()


async def test_a_unit_that_is_cancelled_leaves_nothing_and_harms_nobody(store: Store):
    begun = asyncio.Event()

    async def hang() -> None:
        async with store.write() as session:
            await keys.ensure_project(session, "a")
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hang())
    await begun.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    async with store.write() as session:
        await keys.ensure_project(session, "b")
    assert await names(store) == {"b"}


async def test_a_unit_that_reads_cannot_write(store: Store):
    with pytest.raises(DBAPIError, match=r"read.?only"):
        async with store.read() as session:
            await keys.ensure_project(session, "a")
    assert await names(store) == set()


async def test_many_writers_of_one_process_all_get_their_turn(store: Store, project: str):
    async def count_up() -> None:
        async with store.write() as session:
            job = (await session.scalars(select(Job).with_for_update())).one()
            await asyncio.sleep(0)
            job.priority += 1

    job_id = await make_job(store, project)
    await asyncio.gather(*(count_up() for _ in range(40)))
    assert (await look(store, job_id)).priority == 40


async def test_the_databases_clock_is_utc_and_counts_in_seconds(store: Store):
    async with store.read() as session:
        now, later, ago = (await session.execute(select(moment(), moment(90.5), moment(-90.5)))).one()
    assert abs(now - datetime.now(UTC)) < timedelta(minutes=5)
    assert now.tzinfo is UTC
    assert abs(later - now - timedelta(seconds=90.5)) < timedelta(seconds=1)
    assert abs(now - ago - timedelta(seconds=90.5)) < timedelta(seconds=1)


async def test_times_are_compared_as_times(store: Store, project: str):
    """A time that the database wrote, one that Python wrote, and the clock itself, in one order."""
    job_id = await make_job(store, project)
    async with store.write() as session:
        job = (await session.scalars(select(Job).where(Job.id == job_id))).one()
        job.lease_until = job.created_at + timedelta(microseconds=1)
    async with store.read() as session:
        counted = select(func.count()).select_from(Job)
        assert await session.scalar(counted.where(Job.created_at == job.created_at)) == 1
        assert await session.scalar(counted.where(Job.created_at < Job.lease_until)) == 1
        assert await session.scalar(counted.where(Job.lease_until < moment(1))) == 1
        assert await session.scalar(counted.where(Job.lease_until < moment(-60))) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
async def test_numbers_that_json_lacks_become_text(store: Store, project: str, value: float):
    job_id = await make_job(store, project, spec={"deep": [{"number": value}]})
    shown = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
    assert (await look(store, job_id)).spec == {"deep": [{"number": shown}]}


@pytest.mark.parametrize("value", ["nul \0 inside", "half \ud800 of a pair", "ünïcödé 🦩", ""])
async def test_any_text_is_kept_in_json(store: Store, project: str, value: str):
    job_id = await make_job(store, project, spec={value: value})
    assert (await look(store, job_id)).spec == {value: value}


async def test_text_columns_replace_what_a_database_refuses(store: Store, project: str):
    job_id = await make_job(store, project, name="a\0b")
    assert (await look(store, job_id)).name == "a\ufffdb"
    async with store.read() as session:
        assert await session.scalar(select(Job).where(Job.id == f"{job_id}\0")) is None


async def test_sqlite_is_set_up_to_be_durable_and_to_check_references(new_sqlite: Callable[[], str]):
    wanted = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 15_000}
    store = Store.open(new_sqlite())
    for unit in (store.read(), store.write()):
        async with unit as session:
            assert {name: await session.scalar(text(f"PRAGMA {name}")) for name in wanted} == wanted
    await store.close()


async def test_a_url_of_another_database_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match="sqlite:///path or postgresql://"):
        Store.open("mysql://somewhere/else")
