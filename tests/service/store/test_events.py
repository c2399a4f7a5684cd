"""Events: their numbers, their keys, and the ways to read them."""

from __future__ import annotations

import math

import pytest

from service.store import events, jobs, transitions
from service.store.events import CHUNK
from service.store.session import Store
from service.store.transitions import Fence
from tests.service.store.making import history, look, running, said

pytestmark = pytest.mark.anyio


async def beat(store: Store, fence: Fence, *updates: int, type: str = "metrics", **data: object) -> None:
    async with store.write() as session:
        await transitions.beat(session, fence, [said(update, type, **data) for update in updates])


async def test_numbers_have_no_gaps_and_known_keys_are_dropped(store: Store, project: str):
    fence = await running(store, project)
    await beat(store, fence, 1, 2, loss=1.0)
    await beat(store, fence, 2, 3, 3, 1, 4, loss=2.0)
    found = await history(store, fence.job_id)
    assert [event.seq for event in found] == [1, 2, 3, 4, 5, 6]
    assert [event.key for event in found[2:]] == [f"metrics:{update}" for update in (1, 2, 3, 4)]
    assert [event.data["loss"] for event in found[2:]] == [1.0, 1.0, 2.0, 2.0]
    assert (await look(store, fence.job_id)).next_seq == 7


async def test_a_beat_of_any_size_is_numbered_through(store: Store, project: str):
    fence = await running(store, project)
    await beat(store, fence, *range(1, CHUNK))
    await beat(store, fence, *range(1, 2 * CHUNK + 1))
    found = await history(store, fence.job_id)
    assert [event.seq for event in found] == list(range(1, 2 * CHUNK + 3))
    assert {event.update for event in found} == set(range(2 * CHUNK + 1))


async def test_what_an_engine_says_comes_back_as_it_was(store: Store, project: str):
    fence = await running(store, project)
    await beat(store, fence, 1, type="samples", samples=[{"prompt": "nul \0", "score": math.nan}])
    [event] = (await history(store, fence.job_id))[2:]
    assert event.data == {"samples": [{"prompt": "nul \0", "score": "NaN"}]}


async def test_the_last_event_whose_key_begins_so(store: Store, project: str):
    fence = await running(store, project)
    await beat(store, fence, 1, 2, type="warning")
    await beat(store, fence, 3, type="metrics")
    async with store.read() as session:
        found = await events.newest_keyed(session, fence.job_id, "warning:")
        other = await events.newest_keyed(session, "job_other", "warning:")
    assert found is not None
    assert (found.key, other) == ("warning:2", None)


async def test_pages_go_forward_from_a_number(store: Store, project: str):
    fence = await running(store, project)
    await beat(store, fence, *range(1, 9))
    async with store.read() as session:
        first = await events.page(session, project, fence.job_id, limit=4)
        second = await events.page(session, project, fence.job_id, after=4, limit=4)
        last = await events.page(session, project, fence.job_id, after=8, limit=4)
        beyond = await events.page(session, project, fence.job_id, after=99)
    pages = (first, second, last, beyond)
    assert [[event.seq for event in page.data] for page in pages] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10], []]
    assert [page.has_more for page in pages] == [True, True, False, False]


async def test_pages_hold_the_types_that_were_asked_for(store: Store, project: str):
    fence = await running(store, project)
    await beat(store, fence, 1, 2)
    await beat(store, fence, 2, type="checkpoint")
    async with store.read() as session:
        page = await events.page(session, project, fence.job_id, types=["checkpoint", "state"], limit=2)
    assert ([event.type for event in page.data], page.has_more) == (["state", "state"], True)


async def test_of_each_update_the_newest_attempt_stands(store: Store, project: str):
    fence = await running(store, project)
    await beat(store, fence, 1, 2, 3, loss=1.0)
    async with store.write() as session:
        job = await jobs.get_job(session, project, fence.job_id, lock=True)
        replay = [events.Draft("metrics", update, {"loss": 2.0}, f"metrics:a2:{update}") for update in (2, 3)]
        await events.append(session, job, replay)
    await beat(store, fence, 4, 5, loss=3.0)
    async with store.read() as session:
        first = await events.by_update(session, project, fence.job_id, "metrics", limit=3)
        rest = await events.by_update(session, project, fence.job_id, "metrics", after=3, limit=3)
    assert [(event.update, event.data["loss"]) for event in first.data] == [(1, 1.0), (2, 2.0), (3, 2.0)]
    assert [event.update for event in rest.data] == [4, 5]
    assert (first.has_more, rest.has_more) == (True, False)


async def test_a_stranger_reads_nothing(store: Store, project: str, stranger: str):
    fence = await running(store, project)
    await beat(store, fence, 1)
    async with store.read() as session:
        assert (await events.page(session, stranger, fence.job_id)).data == []
        assert (await events.by_update(session, stranger, fence.job_id, "metrics")).data == []
        assert await events.newest_seq(session, stranger, fence.job_id) == 0
        assert await events.newest_seq(session, project, fence.job_id) == 3


async def test_news_answers_all_cursors_at_once(store: Store, project: str):
    one, two = await running(store, project), await running(store, project)
    await beat(store, one, *range(1, 11))
    async with store.write() as session:
        await transitions.succeed(session, two)
    cursors = {(one.job_id, 0), (one.job_id, 9), (two.job_id, 3), ("job_gone", 0)}
    async with store.read() as session:
        news = await events.news(session, cursors, limit=2)
    assert news.newest == {one.job_id: 12, two.job_id: 3}
    assert set(news.ended) == {two.job_id}
    assert {job: [event.seq for event in found] for job, found in news.events.items()} == {
        one.job_id: [1, 2, 10, 11]
    }


async def test_no_cursors_no_news(store: Store):
    async with store.read() as session:
        assert await events.news(session, [], limit=2) == events.News({}, set(), {})
