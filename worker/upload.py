"""Checkpoints, exports, and the log of a run, from its directory to storage.

Bytes first, then the row that makes them known, then the ack that lets the engine delete its copy. What was
interrupted is simply done again. Whatever is slow happens in threads or on the network: the beat goes on.
"""

from __future__ import annotations

import asyncio
import hashlib
import tarfile
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ppo_engine.retention import kept, number
from ppo_engine.run_dir import Acks, Manifest, ManifestFile, RunDir, damage, read_manifest
from service.storage import Storage
from service.store import artifacts
from service.store.session import Store
from service.store.transitions import Fence
from worker.outage import Patience, persist

LOG_SECONDS = 15.0
LOG_BYTES = 8 * 1024 * 1024
ARCHIVE = "export.tar"
LOG = "engine.log"


class Damaged(Exception):
    """A file on the worker's disk is not what its manifest says; the attempt cannot be trusted."""


class Uploads:
    """Everything of one attempt that goes to storage.

    catch_up: stores all that the engine has said so far. safe: the updates whose checkpoints of earlier
    attempts are there already.
    """

    def __init__(
        self,
        store: Store,
        storage: Storage,
        fence: Fence,
        run_dir: RunDir,
        catch_up: Callable[[], Awaitable[None]],
        safe: Collection[int] = (),
    ) -> None:
        self._store = store
        self._storage = storage
        self._fence = fence
        self._run_dir = run_dir
        self._catch_up = catch_up
        self._prefix = f"jobs/{fence.job_id}/a{fence.attempt}/"
        self._safe = set(safe)
        self._acked: set[int] = set()
        self._forgotten: list[str] = []
        self._exported: set[int] = set()
        self._log_size = 0
        self._log_due = time.monotonic() + LOG_SECONDS
        self._lock = asyncio.Lock()
        self._finished = False

    def lost(self, update: int) -> None:
        """Say that the checkpoint of an update is not safe after all: made again, it is uploaded again."""
        self._safe.discard(update)

    async def run(self, poll: float) -> None:
        """Take up whatever is complete, for as long as this is awaited; outages are waited for.

        Raises:
            FenceLost: the attempt is somebody else's.
            Damaged: a file is not what its manifest says.
        """
        while True:
            with_log = time.monotonic() >= self._log_due
            await persist(partial(self._round, with_log), Patience(float("inf")))
            await asyncio.sleep(poll)

    async def finish(self) -> None:
        """Take up all that is left, the log included; nothing is uploaded afterwards.

        Raises:
            Outage, or what `outages` makes one: not all of it is safe; it may be tried again.
            FenceLost, Damaged: as `run`.
        """
        await self._round(with_log=True)
        self._finished = True

    async def _round(self, with_log: bool) -> None:
        """One at a time: uploads of the same thing would get into each other's way."""
        async with self._lock:
            if self._finished:
                return
            await self._acknowledge()
            await self._delete_forgotten()
            await self._checkpoints()
            await self._exports()
            if with_log:
                await self._log()

    async def _checkpoints(self) -> None:
        for update in self._run_dir.complete_checkpoints():
            if update not in self._safe:
                prefix = f"{self._prefix}update-{update}/checkpoint/"
                manifest = await self._put_all(self._run_dir.checkpoint(update), prefix)
                # Whoever resumes from it does not say again what was said before it.
                await self._catch_up()
                await self._record_checkpoint(update, manifest, prefix)
                await self._acknowledge()
                await self._delete_forgotten()

    async def _record_checkpoint(self, update: int, manifest: Manifest, prefix: str) -> None:
        """Make it known and forget the oldest."""
        async with self._store.write() as session:
            await artifacts.record(
                session, self._fence, "checkpoint", update, manifest.files, prefix, manifest.metrics
            )
            old = await artifacts.forget_others(session, self._fence, "checkpoint", self._kept)
        self._safe.add(update)
        self._forgotten += [artifact.key_prefix for artifact in old]

    def _kept(self, metrics: Mapping[int, Mapping[str, Any]]) -> set[int]:
        """As the engine keeps them on its disk."""
        ppo = self._run_dir.read_spec().ppo
        values = {update: number(told, ppo.metric_for_best_model) for update, told in metrics.items()}
        return kept(values, ppo.save_total_limit, greater_is_better=ppo.best_is_greatest)

    async def _acknowledge(self) -> None:
        """Let the engine know what is safe; it waits for that."""
        if self._acked != self._safe:
            acks = Acks(checkpoints=tuple(sorted(self._safe)))
            await asyncio.to_thread(self._run_dir.write_acks, acks)
            self._acked = set(self._safe)

    async def _delete_forgotten(self) -> None:
        """The bytes of checkpoints go once it is committed that nobody knows them any more."""
        while self._forgotten:
            await self._storage.delete_prefix(self._forgotten[0])
            self._forgotten.pop(0)

    async def _exports(self) -> None:
        for update in self._run_dir.complete_exports():
            if update not in self._exported:
                await self._export(update)
                self._exported.add(update)

    async def _export(self, update: int) -> None:
        """The files one by one, and all of them as one archive."""
        directory = self._run_dir.export(update)
        prefix = f"{self._prefix}update-{update}/"
        manifest = await self._put_all(directory, f"{prefix}export/")
        archive = self._run_dir.path / f".{ARCHIVE}"
        described = await asyncio.to_thread(pack, directory, manifest, archive)
        await self._storage.put_file(prefix + ARCHIVE, archive)
        archive.unlink()
        async with self._store.write() as session:
            await artifacts.record(
                session, self._fence, "export", update, manifest.files, f"{prefix}export/", manifest.metrics
            )
            await artifacts.record(
                session, self._fence, "archive", update, [described], prefix, manifest.metrics
            )

    async def _put_all(self, directory: Path, prefix: str) -> Manifest:
        """Upload what the manifest lists, once it was found to be what it says."""
        manifest = read_manifest(directory)
        wrong = (
            "the manifest is gone"
            if manifest is None
            else await asyncio.to_thread(damage, directory, manifest)
        )
        if manifest is None or wrong is not None:
            raise Damaged(f"{directory}: {wrong}")
        for file in manifest.files:
            await self._storage.put_file(prefix + file.name, directory / file.name)
        return manifest

    async def _log(self) -> None:
        """The log as it is now, or the end of a very long one."""
        self._log_due = time.monotonic() + LOG_SECONDS
        try:
            size = self._run_dir.log.stat().st_size
        except FileNotFoundError:
            return
        if size == self._log_size:
            return
        snapshot = self._run_dir.path / f".{LOG}"
        described = await asyncio.to_thread(_snapshot, self._run_dir.log, snapshot)
        await self._storage.put_file(self._prefix + LOG, snapshot)
        snapshot.unlink()
        async with self._store.write() as session:
            await artifacts.record(session, self._fence, "log", 0, [described], self._prefix)
        self._log_size = size


def pack(directory: Path, manifest: Manifest, archive: Path) -> ManifestFile:
    """Make one archive of the files of an export: the same files give the same bytes."""
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for file in sorted(manifest.files, key=lambda file: file.name):
            member = tarfile.TarInfo(file.name)
            member.size = file.size
            member.mode = 0o644
            with (directory / file.name).open("rb") as content:
                tar.addfile(member, content)
    return _describe(archive, ARCHIVE)


def _snapshot(source: Path, target: Path) -> ManifestFile:
    """Copy the end of a file that is being written, so that its digest is that of what is uploaded."""
    with source.open("rb") as file:
        file.seek(max(0, source.stat().st_size - LOG_BYTES))
        target.write_bytes(file.read(LOG_BYTES))
    return _describe(target, LOG)


def _describe(path: Path, name: str) -> ManifestFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ManifestFile(name=name, size=path.stat().st_size, sha256=digest)
