"""What nobody else does: settles the jobs of dead workers, rings for forgotten ones, clears leftovers.

Every worker runs one, in a thread with a loop and a store of its own, also while its engine runs. That
several act at once does no harm: every move is guarded, and a bell rung twice is a bell.

Only an idle worker rings: the bells of busy ones would pile up in the broker with nobody to hear them.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from service.background import Background
from service.queue import ring
from service.storage import Storage
from service.store import idempotency, transitions
from service.store.session import Store
from service.sweep import sweep
from worker.outage import Outage, outages
from worker.prepare import discard
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

STOP_SECONDS = 5.0


class Reaper:
    """A thread that does its round at once, and then at every heartbeat. idle: whether this worker is."""

    def __init__(self, settings: WorkerSettings, idle: Callable[[], bool]) -> None:
        self._settings = settings
        self._idle = idle
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Have it end, and wait for that a little."""
        self._stop.set()
        self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        asyncio.run(self._rounds())

    async def _rounds(self) -> None:
        store = Store.open(self._settings.database_url)
        try:
            async with Background().running() as background:
                while not self._stop.is_set():
                    await self._round(store)
                    # Beside the rounds: storage that hangs must not keep lost jobs from being settled.
                    background.start("deleting bytes", partial(self._delete, store))
                    await asyncio.to_thread(self._stop.wait, self._settings.heartbeat_seconds)
        finally:
            await store.close()

    async def _round(self, store: Store) -> None:
        try:
            with outages():
                await self._settle(store)
                await self._ring(store)
                await self._sweep(store)
        except Outage as outage:
            log.warning("the reaper waits: %s", outage)
        except Exception:
            # Whatever is wrong with one round, the next one is still needed: this thread must not end.
            log.exception("the reaper's round failed")

    async def _settle(self, store: Store) -> None:
        async with store.write() as session:
            lost = await transitions.expire_leases(session)
            await idempotency.purge(session)
        for job_id in lost:
            log.warning("%s was lost by its worker", job_id)

    async def _delete(self, store: Store) -> None:
        """Delete from storage what nobody knows any more."""
        await sweep(store, Storage.open(self._settings.storage_url, self._settings.storage_options))

    async def _ring(self, store: Store) -> None:
        if not self._idle():
            return
        async with store.read() as session:
            waiting = await transitions.queued_without_bell(session, older_than=0)
        if self._settings.queue in waiting:
            ring(self._settings, self._settings.queue)

    async def _sweep(self, store: Store) -> None:
        """Remove run directories whose attempt is over: their worker died, or it would have done so."""
        found = {path: (path.parent.name, int(path.name[1:])) for path in _run_dirs(self._settings.runs_dir)}
        if not found:
            return
        async with store.read() as session:
            running = await transitions.running_attempts(session, {job_id for job_id, _ in found.values()})
        for path, attempt in found.items():
            if attempt not in running:
                log.info("removing %s", path)
                await asyncio.to_thread(discard, path)


def _run_dirs(runs_dir: Path | None) -> list[Path]:
    assert runs_dir is not None, "settings derive it"
    return [path for path in runs_dir.glob("job_*/a*") if path.name[1:].isdigit()]
