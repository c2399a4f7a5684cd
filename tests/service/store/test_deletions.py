"""Bytes to delete: taken up by one at a time, and again after a while where they were not deleted."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

import pytest
from sqlalchemy import select

from service.store import deletions
from service.store.deletions import AGAIN_SECONDS
from service.store.models import Deletion
from service.store.session import Store

pytestmark = pytest.mark.anyio


async def note(store: Store, *prefixes: str, seconds: float = 0.0) -> None:
    async with store.write() as session:
        for prefix in prefixes:
            await deletions.note(session, prefix, seconds)


async def take(store: Store) -> Deletion | None:
    async with store.write() as session:
        return await deletions.take(session)


async def take_all(store: Store) -> list[str]:
    """The prefixes of all deletions that are due, in the order in which they are taken up."""
    found = []
    while (deletion := await take(store)) is not None:
        found.append(deletion.prefix)
    return found


async def test_what_is_due_is_taken_up_by_one(store: Store):
    await note(store, "files/a/")
    await note(store, "jobs/b/", seconds=3600)
    assert await take_all(store) == ["files/a/"]


async def test_what_was_taken_up_and_not_done_is_due_again(store: Store):
    await note(store, "files/a/")
    before = await now(store)
    taken = await take(store)
    assert taken is not None
    assert timedelta() < taken.due - before - timedelta(seconds=AGAIN_SECONDS - 1) < timedelta(seconds=60)
    async with store.write() as session:
        [found] = await session.scalars(select(Deletion))
        found.due = before
    assert await take_all(store) == ["files/a/"]


async def now(store: Store) -> datetime:
    await note(store, "clock/")
    async with store.write() as session:
        clock = (await session.scalars(select(Deletion).where(Deletion.prefix == "clock/"))).one()
        await session.delete(clock)
        return clock.due


async def test_what_is_done_is_forgotten(store: Store):
    await note(store, "jobs/a/")
    await note(store, "jobs/a/", seconds=3600)
    first = await take(store)
    assert first is not None
    async with store.write() as session:
        await deletions.done(session, first)
    async with store.read() as session:
        assert (await session.scalars(select(Deletion.id))).one() != first.id  # the later one stays


async def test_the_longest_due_come_first(store: Store):
    for prefix, seconds in (("files/b/", -2.0), ("files/a/", -3.0), ("files/c/", -1.0)):
        await note(store, prefix, seconds=seconds)
    assert await take_all(store) == ["files/a/", "files/b/", "files/c/"]


async def test_several_at_once_take_each_once(store: Store):
    await note(store, *(f"files/{number}/" for number in range(20)))
    taken = await asyncio.gather(*(take_all(store) for _ in range(5)))
    assert len([prefix for found in taken for prefix in found]) == 20
