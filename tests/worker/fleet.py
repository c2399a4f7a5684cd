"""Real workers, under Celery or in this process, on real brokers, databases, and storage; and jobs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import update

from ppo_engine.events import read_complete
from ppo_engine.spec import SPEC_VERSION, parse
from service.queue import ring
from service.storage import Storage
from service.store import artifacts, events, files, jobs, keys
from service.store.models import Artifact, ArtifactKind, Event, Job
from service.store.session import Store
from tests.worker.waiting import eventually, nothing_left, processes_with
from worker.settings import WorkerSettings
from worker.train import Worker, run_jobs

ROOT = Path(__file__).parents[2]
SHORT_LEASE = 8.0
"""Seconds, for tests that wait for a lease to run out; in all others it outlasts a stall of the machine."""
STAND_IN = Path(__file__).with_name("stand_in.py")
PROMPTS = b"".join(b'{"prompt": "%d"}\n' % number for number in range(64))

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "hidden_size": 8,
    "num_hidden_layers": 1,
}

SPEC: dict[str, Any] = {
    "model": {"type": "local", "path": "tiny"},
    "rewards": [{"type": "length", "name": "short", "target": 4}],
    "ppo": {"total_episodes": 64, "per_device_train_batch_size": 4, "response_length": 8},
}


@dataclass
class Fleet:
    """Some workers, and everything they stand on, in one directory."""

    directory: Path
    settings: WorkerSettings
    store: Store
    storage: Storage
    project: str = ""
    prompts: bytes = PROMPTS
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def runs_dir(self) -> Path:
        assert self.settings.runs_dir is not None, "settings derive it"
        return self.settings.runs_dir

    async def found(self) -> None:
        """The project, and a model that can be looked at."""
        async with self.store.write() as session:
            self.project = (await keys.ensure_project(session, "ours")).id
        model = self.settings.model_roots[0] / "tiny"
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(MODEL))

    # Jobs

    async def upload(self) -> str:
        """A file of prompts; its id."""
        content = self.prompts
        path, file_id = self.directory / "prompts.jsonl", files.new_file_id()
        path.write_bytes(content)
        key = f"files/{file_id}/prompts.jsonl"
        await self.storage.put_file(key, path)
        async with self.store.write() as session:
            await files.insert_file(
                session,
                self.project,
                id=file_id,
                filename="prompts.jsonl",
                bytes=len(content),
                sha256=sha256(content).hexdigest(),
                rows=content.count(b"\n"),
                columns=["prompt"],
                format="jsonl",
                storage_key=key,
            )
        return file_id

    async def submit(self, spec: Mapping[str, Any] = SPEC, *, bell: bool = True) -> str:
        """A queued job; its id. It has a file of its own where its spec names no prompts.

        bell: whether workers are told.
        """
        parsed = parse(spec if "prompts" in spec else {**spec, "prompts": {"train": await self.upload()}})
        new = jobs.NewJob(
            spec=parsed.model_dump(mode="json"),
            spec_version=SPEC_VERSION,
            files=parsed.prompts.files(),
            queue=self.settings.queue,
        )
        async with self.store.write() as session:
            job = await jobs.insert_job(session, self.project, new)
        if bell:
            ring(self.settings, self.settings.queue)
        return job.id

    async def wish(self, job_id: str, wanted: Any) -> None:
        async with self.store.write() as session:
            await jobs.set_wanted(session, self.project, job_id, wanted)

    async def take_away(self, job_id: str) -> None:
        """Give a running job to another worker, as after a lease that ran out."""
        async with self.store.write() as session:
            theirs = {"worker": "somebody else", "attempt": Job.attempt + 1}
            await session.execute(update(Job).where(Job.id == job_id).values(theirs))

    async def job(self, job_id: str) -> Job:
        async with self.store.read() as session:
            return await jobs.get_job(session, self.project, job_id)

    async def events(self, job_id: str, *types: str) -> list[Event]:
        async with self.store.read() as session:
            return list((await events.page(session, self.project, job_id, 0, 10_000, types)).data)

    async def artifacts(self, job_id: str, kind: ArtifactKind) -> list[Artifact]:
        async with self.store.read() as session:
            return list((await artifacts.page(session, self.project, job_id, kind, limit=10_000)).data)

    async def reaches(self, job_id: str, *states: str) -> Job:
        """Wait for a job to be in one of the states."""

        async def look() -> Job | None:
            job = await self.job(job_id)
            return job if job.state in states else None

        return await eventually(look, f"{job_id} is {' or '.join(states)}")

    async def gets_to(self, job_id: str, update: int, attempt: int = 1) -> None:
        """Wait for an attempt at a job to have said that it has done so many updates."""

        async def look() -> bool:
            said = await self.events(job_id, "metrics")
            return any(event.update >= update and event.attempt == attempt for event in said)

        await eventually(look, f"attempt {attempt} of {job_id} has done {update} updates")

    async def begins(self, job_id: str, attempt: int) -> None:
        """Wait for a worker to take a job up for the so manyth time."""

        async def look() -> bool:
            return (await self.job(job_id)).attempt >= attempt

        await eventually(look, f"attempt {attempt} at {job_id} begins")

    async def has_checkpoint(self, job_id: str, update: int) -> None:
        """Wait for a checkpoint of a job to be safe in storage."""

        async def look() -> bool:
            return any(made.update >= update for made in await self.artifacts(job_id, "checkpoint"))

        await eventually(look, f"checkpoint {update} of {job_id} is in storage")

    async def content(self, artifact: Artifact, name: str) -> bytes:
        chunks = await self.storage.read(artifact.key_prefix + name)
        return b"".join([chunk async for chunk in chunks])

    async def log(self, job_id: str, attempt: int = 1) -> str:
        """What the engine of an attempt printed."""
        chunks = await self.storage.read(f"jobs/{job_id}/a{attempt}/engine.log")
        return b"".join([chunk async for chunk in chunks]).decode()

    # Workers

    async def work(
        self,
        *engine: object,
        leaving: Callable[[], bool] = lambda: False,
        store: Store | None = None,
        **settings: object,
    ) -> None:
        """Be a worker, in this process, until there is nothing to do: what Celery's task does.

        store: the way to the database, where it is not the fleet's own.
        """
        given = self.settings.model_copy(update={"engine_command": stand_in(*engine)} | settings)
        await run_jobs(Worker(given, store or self.store, self.storage, "here", (), leaving))

    @asynccontextmanager
    async def working(self, *engine: object, **settings: Any) -> AsyncIterator[None]:
        """Be a worker while the body runs, and to the end of its work."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.work(*engine, **settings))
            yield

    def start(self, *engine: object, **settings: object) -> subprocess.Popen[bytes]:
        """A worker process under Celery, whose engine is the stand-in with these options."""
        return self.start_with(engine_command=stand_in(*engine), **settings)

    def start_with(self, **settings: object) -> subprocess.Popen[bytes]:
        """A worker with these settings beside those of the fleet."""
        given = {name: _text(value) for name, value in settings.items()}
        environment = {
            **os.environ,
            **_variables(self.settings),
            **{f"PROXIMA_{name.upper()}": value for name, value in given.items()},
            "OMP_NUM_THREADS": "1",
        }
        with (self.directory / f"worker-{len(self.workers)}.log").open("wb") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "worker"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.workers.append(worker)
        return worker

    def logs(self) -> str:
        """What all workers said."""
        return "\n".join(
            path.read_text(errors="replace") for path in sorted(self.directory.glob("worker-*.log"))
        )

    async def said_on_disk(self, job_id: str, beyond: int) -> int:
        """Wait for the engine to have said that an update beyond this one is done; which one."""
        path = self.runs_dir / job_id / "a1" / "events.jsonl"

        async def look() -> int:
            said, _ = read_complete(path)
            return said[-1].update if said and said[-1].update > beyond else 0

        return await eventually(look, f"the engine does update {beyond}")

    async def attempts_over(self) -> None:
        """Wait until all attempts have ended, and have removed their run directories."""

        async def look() -> bool:
            return not list(self.runs_dir.glob("*/*"))

        await eventually(look, "no run directory is left")

    async def engine_ended(self) -> None:
        """Wait until there is no engine."""

        async def look() -> bool:
            return not self.engines()

        await eventually(look, "the engine has ended")

    def engines(self) -> list[psutil.Process]:
        """Engines, their launchers, and their guards: all that has a run directory in its command line."""
        return processes_with(str(self.runs_dir))

    def no_engine_left(self) -> None:
        nothing_left(str(self.runs_dir))

    def end(self) -> None:
        """End all workers, as politely as they deserve, and see that nothing is left."""
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGCONT)
                worker.kill()
            worker.wait()
        self.no_engine_left()


def stand_in(*options: object) -> tuple[str, ...]:
    """The command of an engine that behaves as the options say."""
    return (sys.executable, str(STAND_IN), *map(str, options))


def _variables(settings: WorkerSettings) -> dict[str, str]:
    return {
        "PROXIMA_DATA_DIR": str(settings.data_dir),
        "PROXIMA_DATABASE_URL": settings.database_url,
        "PROXIMA_BROKER_URL": settings.broker_url,
        "PROXIMA_QUEUE": settings.queue,
        "PROXIMA_ALLOW_CPU": "true",
        "PROXIMA_LEASE_SECONDS": str(settings.lease_seconds),
        "PROXIMA_HEARTBEAT_SECONDS": str(settings.heartbeat_seconds),
        "PROXIMA_KILL_GRACE_SECONDS": str(settings.kill_grace_seconds),
    }


def _text(value: object) -> str:
    return (
        json.dumps(list(value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
    )
