"""New events of many jobs to many listeners, with one question to the database per tick.

However many listeners there are, each tick asks once for all of them, and without listeners nothing is asked.
A listener holds no database session, and one that reads slowly holds one page and slows nobody. Event
numbers have no gaps, so that "the next page after N" is a range of numbers.
This module knows neither SQL nor HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import NamedTuple, Protocol

logger = logging.getLogger(__name__)

PAGE = 500
"""Most events that a listener is given at a time."""
MAX_CURSORS = 400
"""Most listeners one question is about: a statement of any size no database takes."""


class SeqEvent(Protocol):
    """All that a feed must know of an event."""

    @property
    def seq(self) -> int: ...


class Cursor(NamedTuple):
    """The last event of a job that a listener has."""

    job_id: str
    seq: int


class News(Protocol):
    """The answer to a set of cursors.

    newest: the highest seq of every job that exists. ended: the jobs to whose events none will be added.
    events: of each job, ascending, all those in any `(cursor, cursor + PAGE]`.
    """

    @property
    def newest(self) -> Mapping[str, int]: ...
    @property
    def ended(self) -> Collection[str]: ...
    @property
    def events(self) -> Mapping[str, Sequence[SeqEvent]]: ...


Fetch = Callable[[Collection[Cursor]], Awaitable[News]]


class Subscription:
    """One listener's place in the events of one job."""

    def __init__(self, job_id: str, after: int, on_full_page: Callable[[], None]) -> None:
        self.cursor = Cursor(job_id, after)
        self._on_full_page = on_full_page
        # One page, or None for the end of all pages.
        self._pages: asyncio.Queue[Sequence[SeqEvent] | None] = asyncio.Queue(maxsize=1)
        self._ended = False

    @property
    def is_hungry(self) -> bool:
        return self._pages.empty() and not self._ended

    def take(self, news: News) -> None:
        """Pick what is new to this listener."""
        newest = news.newest.get(self.cursor.job_id)
        first, last = self.cursor.seq + 1, self.cursor.seq + PAGE
        page = [event for event in news.events.get(self.cursor.job_id, ()) if first <= event.seq <= last]
        if page:
            self.cursor = Cursor(self.cursor.job_id, page[-1].seq)
            self._pages.put_nowait(page)
        elif newest is None or (self.cursor.job_id in news.ended and self.cursor.seq >= newest):
            self._ended = True
            self._pages.put_nowait(None)

    async def next_page(self) -> Sequence[SeqEvent] | None:
        """The next events, waited for; None after the last one of a job that is over, or deleted."""
        page = await self._pages.get()
        if page is not None and len(page) == PAGE:
            self._on_full_page()
        return page


class Feed:
    """Asks for news while anybody listens.

    fetch: answers cursors in one short unit of work. interval: seconds between two questions.
    """

    def __init__(self, fetch: Fetch, interval: float) -> None:
        self._fetch = fetch
        self._interval = interval
        self._subscriptions: set[Subscription] = set()
        self._woken = asyncio.Event()

    @property
    def listeners(self) -> int:
        """How many listen now."""
        return len(self._subscriptions)

    @contextmanager
    def subscribe(self, job_id: str, after: int) -> Iterator[Subscription]:
        """Listen to a job's events after number `after`."""
        subscription = Subscription(job_id, after, on_full_page=self._woken.set)
        self._subscriptions.add(subscription)
        self._woken.set()
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve listeners while the body runs."""
        task = asyncio.create_task(self._run(), name="feed")
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            try:
                await self._tick()
            except Exception:
                # Whatever fails here (a database that restarts, above all) must not end every open stream:
                # the same cursors are asked again at the next tick.
                logger.exception("The feed could not read new events; it asks again.")
                await asyncio.sleep(self._interval)
            await self._rest()

    async def _tick(self) -> None:
        hungry = [subscription for subscription in self._subscriptions if subscription.is_hungry]
        for start in range(0, len(hungry), MAX_CURSORS):
            some = hungry[start : start + MAX_CURSORS]
            news = await self._fetch({subscription.cursor for subscription in some})
            for subscription in some:
                subscription.take(news)

    async def _rest(self) -> None:
        """Wait for a reason to ask: somebody is there, and new to it or due for the next tick."""
        if not self._subscriptions:
            await self._woken.wait()
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(self._interval):
                await self._woken.wait()
