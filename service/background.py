"""Small work beside the requests: none waits for it, and none fails with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

logger = logging.getLogger(__name__)

REST_SECONDS = 5.0
"""After a failure, the same work is not begun again for so long."""
LEAVE_SECONDS = 2.0


class Background:
    """Work that goes on while the process serves; at most one of a name at a time."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Begin to do something, unless it is being done."""
        if name not in self._tasks:
            self._tasks[name] = task = asyncio.create_task(self._run(name, work), name=name)
            task.add_done_callback(lambda _: self._tasks.pop(name))

    async def _run(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception as error:
            # Whatever it is: nobody waits to be told, and the request it was begun by is answered.
            logger.warning("%s failed: %s", name, error)
            await asyncio.sleep(REST_SECONDS)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Background]:
        """Be there while the body runs; what is under way at its end has a moment to come to its own."""
        try:
            yield self
        finally:
            if tasks := set(self._tasks.values()):
                _, late = await asyncio.wait(tasks, timeout=LEAVE_SECONDS)
                for task in late:
                    task.cancel()
                await asyncio.gather(*late, return_exceptions=True)
