"""The task's beat: what the engine said goes to the store, and what the user wants comes back.

One round trip does three things under the fence: it appends events, renews the lease, and reads what is
wanted. The answer goes to the engine's `control.json`. Nothing here waits for an upload.

While the database cannot be reached, rounds are tried again until the lease is near its end: then the engine
is asked to stop, early enough to save. FenceLost ends the relay: the attempt belongs to somebody else,
and whoever runs the relay ends the engine at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from sqlalchemy.ext.asyncio import AsyncSession

from ppo_engine.events import Event, read_complete
from ppo_engine.run_dir import Control, RunDir, Wanted
from service.store import transitions
from service.store.session import Store
from service.store.transitions import Fence
from worker.outage import Outage, Patience, outages, persist
from worker.verdict import Wish

log = logging.getLogger(__name__)

LEASE_RESERVE = 1 / 3
"""Part of the lease that is left when an engine is asked to stop because it could not be renewed."""

RETRY_AFTER = 1 / 5
"""Part of the time between heartbeats after which a beat that failed is tried again."""
SHORTEST_TIMEOUT = 5.0
"""Seconds."""

Move = Callable[[AsyncSession], Awaitable[None]]


@dataclass(frozen=True)
class Pace:
    """Seconds: between looks at the run directory; between beats without news; that a lease holds."""

    poll: float
    heartbeat: float
    lease: float


class Relay:
    """The beat of one attempt.

    wish:
        Why the engine is to stop; None: it is to run. A stop is never taken back, but a cancel overrules.
    stopping:
        Set once there is a wish.
    """

    def __init__(
        self, store: Store, fence: Fence, run_dir: RunDir, pace: Pace, leaving: Callable[[], bool]
    ) -> None:
        self.wish: Wish | None = None
        self.stopping = asyncio.Event()
        self._store = store
        self._fence = fence
        self._run_dir = run_dir
        self._pace = pace
        self._leaving = leaving
        self._offset = 0
        self._lease_end = time.monotonic() + pace.lease
        self._next_beat = 0.0
        self._not_before = 0.0
        self._told: tuple[Wanted, float] | None = None
        self._lock = asyncio.Lock()
        self._settled = asyncio.Event()

    def lease_left(self) -> float:
        """Seconds until the lease ends, by this machine's steady clock."""
        return self._lease_end - time.monotonic()

    def _spare(self) -> float:
        """Seconds until the engine must be asked to stop, if no beat succeeds."""
        return self.lease_left() - self._pace.lease * LEASE_RESERVE

    def _timeout(self) -> float:
        """Of a beat: long enough for a busy database, and over when the engine is to be asked to stop."""
        patient, spare = max(self._pace.heartbeat, SHORTEST_TIMEOUT), self._spare()
        return min(patient, spare) if spare > 0 else patient

    async def run(self) -> None:
        """Beat until settled.

        Raises:
            FenceLost: the attempt is somebody else's.
        """
        while not self._settled.is_set():
            async with self._lock:
                if not self._settled.is_set():
                    await self._round()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), self._pace.poll)

    async def catch_up(self) -> None:
        """Store all that the engine has said so far.

        Raises:
            FenceLost: the attempt is somebody else's. What `outages` knows: the database is away.
        """
        async with self._lock:
            events, offset = read_complete(self._run_dir.events, self._offset)
            if events:
                await self._beat(events, offset)

    async def begin_anew(self, patience: Patience) -> None:
        """Store the last lines of an engine that has ended, before another one is started in its place.

        That one finds no events, as in a new attempt, and says again what follows its checkpoint; of events
        whose keys are known, none is kept twice.

        Raises:
            FenceLost: the attempt is somebody else's.
            Outage: the database stayed away for longer than patience lasts.
        """
        async with self._lock:
            events, offset = read_complete(self._run_dir.events, self._offset)
            if events:
                await persist(partial(self._beat, events, offset), patience)
            self._run_dir.events.unlink(missing_ok=True)
            self._offset = 0

    async def settle(self, move: Move, patience: Patience) -> None:
        """Store the last lines and make the last move, in one transaction; then the beat ends.

        Raises:
            FenceLost: the attempt is somebody else's.
            Outage: the database stayed away for longer than patience lasts.
        """
        async with self._lock:
            events, _ = read_complete(self._run_dir.events, self._offset)
            await persist(partial(self._settle, events, move), patience)
            self._settled.set()

    async def _settle(self, events: Sequence[Event], move: Move) -> None:
        async with asyncio.timeout(self._timeout()), self._store.write() as session:
            if events:
                await transitions.beat(session, self._fence, events, lease_seconds=self._pace.lease)
            await move(session)

    async def _round(self) -> None:
        events, offset = read_complete(self._run_dir.events, self._offset)
        now = time.monotonic()
        if now >= self._not_before and (events or now >= self._next_beat):
            await self._try_beat(events, offset)
        if self._leaving():
            self._take("leave")
        if self._spare() <= 0:
            self._take("lease")
        await self._tell()

    async def _try_beat(self, events: Sequence[Event], offset: int) -> None:
        try:
            with outages():
                await self._beat(events, offset)
        except Outage as outage:
            left = self.lease_left()
            log.warning("%s: no beat, %.0f s of lease left: %s", self._fence.job_id, left, outage)
            self._not_before = time.monotonic() + self._pace.heartbeat * RETRY_AFTER

    async def _beat(self, events: Sequence[Event], offset: int) -> None:
        sent = time.monotonic()
        async with asyncio.timeout(self._timeout()), self._store.write() as session:
            beat = await transitions.beat(session, self._fence, events, lease_seconds=self._pace.lease)
        self._offset = offset
        self._lease_end = sent + self._pace.lease
        self._next_beat = sent + self._pace.heartbeat
        if beat.wanted != "run":
            self._take(beat.wanted)

    def _take(self, wish: Wish) -> None:
        if self.wish is None or wish == "cancel":
            self.wish = wish
            self.stopping.set()

    async def _tell(self) -> None:
        """Let the engine know, when there is something new."""
        wanted: Wanted = "run" if self.wish is None else "cancel" if self.wish == "cancel" else "pause"
        if (wanted, self._lease_end) == self._told:
            return
        control = Control(wanted=wanted, lease_until=time.time() + self.lease_left())
        try:
            with outages():
                await asyncio.to_thread(self._run_dir.write_control, control)
        except Outage as outage:
            # The next round tries again; an engine that hears nothing for long stops when its lease is over.
            log.warning("%s: the engine cannot be told: %s", self._fence.job_id, outage)
            return
        self._told = (wanted, self._lease_end)
