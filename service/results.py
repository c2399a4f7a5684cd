"""What a job has said and made: events, metrics, samples, its log, and the policies it exported.

Only exports are ever handed out: they hold the policy alone. Full checkpoints, with value head, optimizer,
and random states, are for workers. No HTTP here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass

from ppo_engine.spec import shown
from service.errors import NotFound
from service.specs import Checkpoint, Event, MetricsRow, Page, SamplesRow, StoredFile
from service.storage import Storage
from service.store import artifacts, events, jobs
from service.store import models as rows
from service.store.session import Store


@dataclass(frozen=True)
class Blob:
    """A file in storage. sha256: hexadecimal, of all its `size` bytes."""

    name: str
    key: str
    size: int
    sha256: str


class Results:
    """The use cases of what jobs leave behind."""

    def __init__(self, store: Store, storage: Storage) -> None:
        self._store = store
        self._storage = storage

    async def check(self, project_id: str, job_id: str) -> None:
        """Raises NotFound where the project has no such job."""
        async with self._store.read() as session:
            await jobs.get_job(session, project_id, job_id)

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
        # Cut inside a line, the rest of that line means nothing.
        return text if start == 0 else text[text.find(b"\n") + 1 :]

    async def checkpoints(self, project_id: str, job_id: str, after: int, limit: int) -> Page[Checkpoint]:
        """The policies exported after update `after`, by update. Raises NotFound."""
        async with self._store.read() as session:
            await jobs.get_job(session, project_id, job_id)
            found = await artifacts.list_artifacts(session, project_id, job_id, "export")
        behind = [checkpoint_of(row) for row in found if row.update > after]
        return Page(data=behind[:limit], has_more=len(behind) > limit)

    async def checkpoint(self, project_id: str, job_id: str, update: int) -> Checkpoint:
        """The policy exported after an update. Raises NotFound."""
        return checkpoint_of(await self._export(project_id, job_id, update))

    async def checkpoint_file(self, project_id: str, job_id: str, update: int, name: str) -> Blob:
        """One file of an exported policy. Raises NotFound."""
        found = {blob.name: blob for blob in _blobs(await self._export(project_id, job_id, update))}
        if name not in found:
            raise NotFound("file", name, f"checkpoint {update} of {job_id} has {shown(sorted(found), 400)}")
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
                made = await artifacts.list_artifacts(session, project_id, job_id, "export")
                there = shown([artifact.update for artifact in made])
                raise NotFound("checkpoint", str(update), f"{job_id} has those of the updates {there}")
        return export

    async def open(self, blob: Blob, start: int, stop: int) -> AsyncIterator[bytes]:
        """Stream the bytes `start` (included) to `stop` (excluded) of a blob."""
        return await self._storage.read(blob.key, start, stop)


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
