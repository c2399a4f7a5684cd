"""What a job has said and made: events, metrics, samples, its log, and the policies it exported.

Only exports are ever handed out: they hold the policy alone. Full checkpoints, with value head, optimizer,
and random states, are for workers. No HTTP here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass

from ppo_engine.issues import shown
from service.blobs import Blob, open_blob
from service.errors import NotFound
from service.specs import Checkpoint, Event, MetricsRow, Page, SamplesRow, StoredFile
from service.storage import Storage
from service.store import artifacts, events, jobs
from service.store import models as rows
from service.store.session import Store

_INSIDE_A_CHARACTER = bytes(range(0x80, 0xC0))
"""The bytes of UTF-8 that no character begins with."""


@dataclass(frozen=True)
class Prospect:
    """newest: the number of a job's last event. is_over: nothing more will come, of the types asked for."""

    newest: int
    is_over: bool


class Results:
    """The use cases of what jobs leave behind."""

    def __init__(self, store: Store, storage: Storage) -> None:
        self._store = store
        self._storage = storage

    async def prospect(self, project_id: str, job_id: str, after: int, types: Collection[str]) -> Prospect:
        """What somebody who has the events up to number `after` may wait for. Raises NotFound."""
        async with self._store.read() as session:
            job = await jobs.get_job(session, project_id, job_id)
            rest = await events.page(session, project_id, job_id, after, 1, types)
        return Prospect(job.next_seq - 1, job.is_final and not rest.data)

    async def events(
        self, project_id: str, job_id: str, after: int, limit: int, types: Collection[str]
    ) -> Page[Event]:
        """Events after number `after`, oldest first. Raises NotFound."""
        async with self._store.read() as session:
            await jobs.get_job(session, project_id, job_id)
            page = await events.page(session, project_id, job_id, after, limit, types)
        return Page(data=[event_of(row) for row in page.data], has_more=page.has_more)

    async def metrics(
        self, project_id: str, job_id: str, names: Sequence[str], after: int, limit: int
    ) -> Page[MetricsRow]:
        """What stands of the metrics of each update after `after`; of some names, or all. Raises NotFound."""
        async with self._store.read() as session:
            await jobs.get_job(session, project_id, job_id)
            page = await events.by_update(session, project_id, job_id, "metrics", after, limit)
        data = [MetricsRow(update=row.update, metrics=_chosen(row, names)) for row in page.data]
        return Page(data=data, has_more=page.has_more)

    async def first_metrics(self, project_id: str, job_id: str) -> list[str]:
        """The names of the metrics of the job's first update: they never change. Raises NotFound."""
        async with self._store.read() as session:
            await jobs.get_job(session, project_id, job_id)
            first = await events.page(session, project_id, job_id, limit=1, types=["metrics"])
        return [name for event in first.data for name in event.data]

    async def samples(self, project_id: str, job_id: str, after: int, limit: int) -> Page[SamplesRow]:
        """The completions sampled at each update after `after`. Raises NotFound."""
        async with self._store.read() as session:
            await jobs.get_job(session, project_id, job_id)
            page = await events.by_update(session, project_id, job_id, "samples", after, limit)
        data = [SamplesRow(update=row.update, samples=row.data.get("samples", [])) for row in page.data]
        return Page(data=data, has_more=page.has_more)

    async def log_tail(self, project_id: str, job_id: str, tail: int) -> bytes:
        """The last lines of the newest engine log, `tail` bytes at most; nothing where no engine has run.

        Raises:
            NotFound: the project has no such job.
        """
        async with self._store.read() as session:
            await jobs.get_job(session, project_id, job_id)
            log = await artifacts.latest(session, project_id, job_id, "log")
        if log is None:
            return b""
        [blob] = _blobs(log)
        start = max(blob.size - tail, 0)
        text = b"".join([chunk async for chunk in await self.open(blob, start, blob.size)])
        return text if start == 0 else _from_a_line(text)

    async def checkpoints(self, project_id: str, job_id: str, after: int, limit: int) -> Page[Checkpoint]:
        """The policies exported after update `after`, by update. Raises NotFound."""
        async with self._store.read() as session:
            await jobs.get_job(session, project_id, job_id)
            page = await artifacts.page(session, project_id, job_id, "export", after, limit)
        return Page(data=[checkpoint_of(row) for row in page.data], has_more=page.has_more)

    async def checkpoint(self, project_id: str, job_id: str, update: int) -> Checkpoint:
        """The policy exported after an update. Raises NotFound."""
        return checkpoint_of(await self._export(project_id, job_id, update))

    async def checkpoint_file(self, project_id: str, job_id: str, update: int, name: str) -> Blob:
        """One file of an exported policy. Raises NotFound."""
        found = {blob.name: blob for blob in _blobs(await self._export(project_id, job_id, update))}
        if name not in found:
            why = f"checkpoint {update} of {job_id} has {shown(sorted(found), 400)}"
            raise NotFound("checkpoint file", name, why)
        return found[name]

    async def adapter(self, project_id: str, job_id: str) -> Blob:
        """The archive of the newest policy, which is the final one once the job is over. Raises NotFound."""
        async with self._store.read() as session:
            job = await jobs.get_job(session, project_id, job_id)
            archive = await artifacts.latest(session, project_id, job_id, "archive")
        if archive is None:
            raise NotFound("adapter", job_id, _why_no_adapter(job))
        [blob] = _blobs(archive)
        return blob

    async def _export(self, project_id: str, job_id: str, update: int) -> rows.Artifact:
        async with self._store.read() as session:
            await jobs.get_job(session, project_id, job_id)
            export = await artifacts.get(session, project_id, job_id, "export", update)
            if export is None:
                made = await artifacts.page(session, project_id, job_id, "export")
                there = shown([artifact.update for artifact in made.data])
                raise NotFound("checkpoint", str(update), f"{job_id} has those of the updates {there}")
        return export

    async def open(self, blob: Blob, start: int, stop: int) -> AsyncIterator[bytes]:
        """Stream the bytes `start` (included) to `stop` (excluded) of a blob. Raises ContentLost."""
        return await open_blob(self._storage, blob, start, stop)


def _from_a_line(text: bytes) -> bytes:
    """Text that was cut at its beginning, without the rest of that line, unless it is all there is."""
    _, _, lines = text.partition(b"\n")
    return lines or text.lstrip(_INSIDE_A_CHARACTER)


def _chosen(row: rows.Event, names: Sequence[str]) -> dict[str, object]:
    return {name: row.data[name] for name in names if name in row.data} if names else row.data


def _why_no_adapter(job: rows.Job) -> str:
    if job.is_final:
        return f"the job {job.state} before its first export"
    return f"the job is {job.state}; follow its events until it is over"


def _blobs(artifact: rows.Artifact) -> list[Blob]:
    return [
        Blob(file["name"], artifact.key_prefix + file["name"], file["size"], file["sha256"])
        for file in artifact.files
    ]


def event_of(row: rows.Event) -> Event:
    return Event(
        seq=row.seq,
        key=row.key,
        type=row.type,
        attempt=row.attempt,
        update=row.update,
        created_at=row.created_at,
        data=row.data,
    )


def checkpoint_of(row: rows.Artifact) -> Checkpoint:
    return Checkpoint(
        update=row.update,
        attempt=row.attempt,
        created_at=row.created_at,
        files=[StoredFile.model_validate(file) for file in row.files],
        metrics=row.metrics,
    )
