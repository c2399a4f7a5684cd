"""Events as they happen: a subscription to the feed, written as server-sent events (WHATWG HTML, 9.2)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.types import Receive, Scope, Send

from service.feed import Feed, SeqEvent, Subscription

KEEP_ALIVE_SECONDS = 15.0
RETRY_MILLISECONDS = 1000


class EventStream(EventSourceResponse):
    """Streams a job's events after a number, until the last one of its life.

    render: an event as a frame, or as nothing where it is to be left out.

    The subscription lives exactly as long as the answer is being sent: a client that leaves ends it. No
    database session is held.
    """

    def __init__(self, feed: Feed, job_id: str, after: int, render: Callable[[Any], bytes]) -> None:
        super().__init__((), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._feed = feed
        self._job_id = job_id
        self._after = after
        self._render = render

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._feed.subscribe(self._job_id, self._after) as subscription:
            self.body_iterator = _frames(subscription, self._render)
            await super().__call__(scope, receive, send)


async def _frames(subscription: Subscription, render: Callable[[SeqEvent], bytes]) -> AsyncIterator[bytes]:
    yield format_sse_event(retry=RETRY_MILLISECONDS)
    while True:
        try:
            async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                page = await subscription.next_page()
        except TimeoutError:
            yield KEEPALIVE_COMMENT
            continue
        if page is None:
            return
        for event in page:
            if frame := render(event):
                yield frame
