"""The feed: who hears what, how often it asks, and what a slow or lost listener costs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from service.feed import MAX_CURSORS, PAGE, Cursor, Feed, SeqEvent, Subscription

pytestmark = pytest.mark.anyio

LONG = 3600.0  # seconds: a tick that does not come by itself
SOON = 0.001


@dataclass(frozen=True)
class Numbered:
    seq: int


@dataclass(frozen=True)
class News:
    newest: dict[str, int]
    ended: set[str]
    events: dict[str, list[SeqEvent]]


@dataclass
class Log:
    """The events of some jobs, in memory, answering as the store does; counts the questions."""

    newest: dict[str, int]
    ended: set[str] = field(default_factory=set)
    asked: list[set[Cursor]] = field(default_factory=list)
    failures: int = 0

    async def fetch(self, cursors: Collection[Cursor]) -> News:
        self.asked.append(set(cursors))
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the database restarts")
        events: dict[str, set[int]] = {}
        for cursor in cursors:
            last = min(cursor.seq + PAGE, self.newest.get(cursor.job_id, 0))
            events.setdefault(cursor.job_id, set()).update(range(cursor.seq + 1, last + 1))
        found: dict[str, list[SeqEvent]] = {
            job: [Numbered(seq) for seq in sorted(seqs)] for job, seqs in events.items()
        }
        asked = {cursor.job_id for cursor in cursors}
        return News({job: seq for job, seq in self.newest.items() if job in asked}, self.ended, found)


async def heard(subscription: Subscription, count: int | None = None) -> list[int]:
    """The numbers of the next `count` events, or of all to the end."""
    seqs: list[int] = []
    while count is None or len(seqs) < count:
        page = await subscription.next_page()
        if page is None:
            return seqs
        seqs += [event.seq for event in page]
    return seqs


async def test_a_finished_job_is_replayed_page_by_page_without_waiting_for_ticks():
    log = Log({"a": 2 * PAGE + 7}, ended={"a"})
    feed = Feed(log.fetch, LONG)
    async with feed.running(), asyncio.timeout(10):
        with feed.subscribe("a", after=3) as subscription:
            # The last page is not full, so only the next tick would tell that it was the last.
            assert await heard(subscription, 2 * PAGE + 4) == list(range(4, 2 * PAGE + 8))


async def test_new_events_reach_every_listener_from_its_own_place_in_one_question():
    log = Log({"a": 3, "b": 1})
    feed = Feed(log.fetch, SOON)
    async with feed.running(), asyncio.timeout(10):
        with feed.subscribe("a", 0) as early, feed.subscribe("a", 3) as late, feed.subscribe("b", 0) as other:
            assert await heard(early, 3) == [1, 2, 3]
            assert await heard(other, 1) == [1]
            log.newest |= {"a": 5, "b": 2}
            assert await asyncio.gather(heard(early, 2), heard(late, 2), heard(other, 1)) == [
                [4, 5],
                [4, 5],
                [2],
            ]
    assert {Cursor("a", 3), Cursor("b", 1)} in log.asked


async def test_a_stream_ends_after_the_last_event_of_a_final_job():
    log = Log({"a": 1})
    feed = Feed(log.fetch, SOON)
    async with feed.running(), asyncio.timeout(10):
        with feed.subscribe("a", 0) as subscription:
            assert await heard(subscription, 1) == [1]
            log.newest["a"] = 2
            log.ended.add("a")
            assert await heard(subscription) == [2]
        with feed.subscribe("a", 2) as again, feed.subscribe("a", 99) as beyond:
            assert (await heard(again), await heard(beyond)) == ([], [])


async def test_a_stream_ends_when_its_job_is_deleted():
    log = Log({"a": 1})
    feed = Feed(log.fetch, SOON)
    async with feed.running(), asyncio.timeout(10):
        with feed.subscribe("a", 1) as subscription:
            del log.newest["a"]
            assert await heard(subscription) == []


async def test_without_listeners_nothing_is_asked():
    log = Log({"a": 1})
    feed = Feed(log.fetch, SOON)
    async with feed.running(), asyncio.timeout(10):
        with feed.subscribe("a", 0) as subscription:
            await heard(subscription, 1)
        before = len(log.asked)
        await asyncio.sleep(20 * SOON)
        assert len(log.asked) <= before + 1


async def test_a_listener_that_does_not_read_is_not_asked_for():
    log = Log({"a": 3 * PAGE, "b": 0})
    feed = Feed(log.fetch, SOON)
    async with feed.running(), asyncio.timeout(10):
        with feed.subscribe("a", 0), feed.subscribe("b", 0) as other:
            for newest in (1, 2, 3):
                log.newest["b"] = newest
                assert await heard(other, 1) == [newest]
    assert {cursor for asked in log.asked for cursor in asked if cursor.job_id == "a"} == {Cursor("a", 0)}


async def test_one_question_is_about_a_bounded_number_of_listeners():
    log = Log({"a": MAX_CURSORS + 5})
    feed = Feed(log.fetch, SOON)
    with ExitStack() as stack:
        many = [stack.enter_context(feed.subscribe("a", seq)) for seq in range(MAX_CURSORS + 5)]
        async with feed.running(), asyncio.timeout(10):
            assert [(await heard(one, 1))[0] for one in many] == list(range(1, MAX_CURSORS + 6))
    assert max(map(len, log.asked)) == MAX_CURSORS


async def test_listeners_outlive_a_database_that_fails(caplog: pytest.LogCaptureFixture):
    log = Log({"a": 1}, failures=3)
    feed = Feed(log.fetch, SOON)
    with caplog.at_level(logging.CRITICAL, logger="service.feed"):
        async with feed.running(), asyncio.timeout(10):
            with feed.subscribe("a", 0) as subscription:
                assert await heard(subscription, 1) == [1]
