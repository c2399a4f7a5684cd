"""One job after another: claim, prepare, run the engine, relay what it says, settle.

An attempt is three things at once: the work itself, the beat (`relay.py`), and the uploads (`upload.py`).
When the fence is lost in any of them, the others end, and the engine with them. However an attempt ends, no
process is left of it, and its run directory is removed.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from sqlalchemy.ext.asyncio import AsyncSession

from ppo_engine.events import BEGUN_AGAIN
from ppo_engine.issues import SpecError
from ppo_engine.reward_kinds import HTTP_ALLOW_PRIVATE, SECRET_PREFIX
from ppo_engine.run_dir import Acks, Halvings, RunDir
from ppo_engine.spec import SPEC_VERSION, RunSpec, Tracker, secrets
from service.queue import ring
from service.storage import Storage
from service.store import artifacts, events, transitions
from service.store.models import Artifact
from service.store.session import Store
from service.store.transitions import Claim, Fence, FenceLost
from worker import launch
from worker.hub import Hub, HubAway, ModelUnavailable
from worker.outage import Outage, Patience, first_line, outages, persist
from worker.prepare import Preparation, Ready, discard
from worker.process import Process, Program, running
from worker.relay import Pace, Relay
from worker.settings import WorkerSettings
from worker.upload import Uploads
from worker.verdict import Verdict, invalid, judge, log_tail, starts_again, stopped

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 600.0
"""For which an attempt waits for storage that is away, before another one is to try."""


@dataclass(frozen=True)
class Worker:
    """What a worker works with. leaving: whether it was asked to go."""

    settings: WorkerSettings
    store: Store
    storage: Storage
    name: str
    gpus: tuple[str, ...]
    leaving: Callable[[], bool]

    @property
    def can_run(self) -> bool:
        """Whether jobs may run on this machine at all."""
        return bool(self.gpus) or self.settings.allow_cpu


async def run_jobs(worker: Worker) -> None:
    """Claim and run, until there is nothing to claim, the worker is to leave, or an attempt breaks.

    What broke an attempt may be this machine's, and would break the next one, too: others get their chance
    first. The reaper rings again at its next round.
    """
    while worker.can_run and not worker.leaving():
        claim = await _claim(worker)
        if claim is None:
            return
        log.info("%s: attempt %d begins", claim.fence.job_id, claim.fence.attempt)
        if not await Attempt(worker, claim).run():
            return


async def _claim(worker: Worker) -> Claim | None:
    """The next job; where more are waiting, the bell goes on to the next worker."""
    settings = worker.settings
    try:
        with outages():
            async with worker.store.write() as session:
                claim = await transitions.claim(
                    session, worker=worker.name, queue=settings.queue, lease_seconds=settings.lease_seconds
                )
                waiting = await transitions.queued_without_bell(session, older_than=0)
    except Outage as outage:
        log.warning("nothing can be claimed: %s", outage)
        return None
    if claim is not None and settings.queue in waiting:
        ring(settings, settings.queue)
    return claim


class Attempt:
    """One try at one job, from its claim to its end."""

    def __init__(self, worker: Worker, claim: Claim) -> None:
        settings, fence = worker.settings, claim.fence
        assert settings.runs_dir is not None, "settings derive it"
        self._worker = worker
        self._claim = claim
        self._run_dir = RunDir(settings.runs_dir / fence.job_id / f"a{fence.attempt}")
        pace = Pace(POLL_SECONDS, settings.heartbeat_seconds, settings.lease_seconds)
        self._relay = Relay(worker.store, fence, self._run_dir, pace, worker.leaving)
        safe = [checkpoint.update for checkpoint in claim.checkpoints]
        self._uploads = Uploads(
            worker.store, worker.storage, fence, self._run_dir, self._relay.catch_up, safe
        )

    @property
    def _fence(self) -> Fence:
        return self._claim.fence

    async def run(self) -> bool:
        """Bring the job as far as it goes here, and say in the store how it ended.

        False: the attempt did not come to an end of its own; it broke, or became somebody else's.
        """
        try:
            with outages():
                await asyncio.to_thread(self._make_run_dir)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._relay.run())
                uploading = tasks.create_task(self._uploads.run(POLL_SECONDS))
                verdict = await self._work()
                await self._settle(await self._upload_rest(verdict))
                uploading.cancel()
            return True
        except* FenceLost as lost:
            log.warning("%s", first_line(lost.exceptions[0]))
        except* Outage as outage:
            log.exception("%s: attempt %d was given up", self._fence.job_id, self._fence.attempt)
            await self._give_back("outage", outage.exceptions[0], spend_attempt=False)
        except* Exception as broken:
            # Whatever broke, the engine is gone by now, and another attempt may do better.
            log.exception("%s: attempt %d broke", self._fence.job_id, self._fence.attempt)
            await self._give_back("worker_error", broken.exceptions[0], spend_attempt=True)
        finally:
            await asyncio.to_thread(discard, self._run_dir.path)
        return False

    def _make_run_dir(self) -> None:
        discard(self._run_dir.path)
        self._run_dir.path.mkdir(parents=True)
        self._run_dir.write_acks(Acks())

    # 1. The work

    async def _work(self) -> Verdict:
        try:
            ready = await self._prepare()
        except SpecError as error:
            return invalid(tuple(error.issues))
        except ModelUnavailable as error:
            return Verdict("failed", code="model_unavailable", message=str(error))
        except HubAway as away:
            return Verdict("queued", code="hub", message=str(away), spend_attempt=True)
        except Outage as outage:
            return Verdict("queued", code="outage", message=str(outage), spend_attempt=True)
        if ready is None:
            assert self._relay.wish is not None, "only a wish keeps a run from being prepared"
            return stopped(self._relay.wish)
        while True:
            async with running(self._program(ready.spec)) as process:
                status = await self._follow(process)
            result = self._run_dir.read_result()
            if not starts_again(result, self._relay.wish):
                return judge(result, status, self._relay.wish)
            log.warning("%s: the engine ran out of memory, and is started with less", self._fence.job_id)
            await self._relay.begin_anew(self._patience(PATIENCE_SECONDS))
            self._run_dir.result.unlink()  # one that cannot even start must not seem to have ended so again

    async def _prepare(self) -> Ready | None:
        """None: the run is to stop before it has begun."""
        settings = self._worker.settings
        environment = self._environment()
        preparation = Preparation(
            store=self._worker.store,
            storage=self._worker.storage,
            hub=Hub(environment, settings.max_file_bytes),
            model_roots=settings.model_roots,
            allow_hub_models=settings.allow_hub_models,
            gpus=len(self._worker.gpus),
            launcher=settings.launcher,
        )
        task = asyncio.create_task(
            persist(partial(self._fill, preparation), self._patience(PATIENCE_SECONDS))
        )
        try:
            await self._unless_stopping(task)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            await asyncio.wait({task})  # a download that was going on has ended, too

    async def _fill(self, preparation: Preparation) -> Ready:
        ready = await preparation.fill(self._claim, self._run_dir)
        plan = ready.plan.model_dump(mode="json")
        async with self._worker.store.write() as session:
            await transitions.set_plan(session, self._fence, plan, ready.plan.num_total_batches)
            if ready.pinned is not None:
                pinned = ready.pinned.model_dump(mode="json")
                await transitions.pin(session, self._fence, pinned, SPEC_VERSION)
            await self._forget(session, ready.damaged)
            known = await events.newest_keyed(session, self._fence.job_id, BEGUN_AGAIN)
        if known is not None:  # there may be no checkpoint that has it
            times = {name: known.data.get(name, 0) for name in Halvings.model_fields}
            await asyncio.to_thread(self._run_dir.write_halvings, Halvings(**times))
        return ready

    async def _forget(self, session: AsyncSession, damaged: Sequence[Artifact]) -> None:
        """Checkpoints that cannot be resumed from are known no more, and the owner knows why work is lost."""
        await artifacts.forget(session, self._fence, damaged)
        for checkpoint in damaged:
            self._uploads.lost(checkpoint.update)
            message = (
                f"The checkpoint of update {checkpoint.update} is not in storage as it was put there; "
                "the run goes on from an earlier one."
            )
            await transitions.warn(session, self._fence, "damaged_checkpoint", message)

    async def _unless_stopping(self, task: asyncio.Task[object]) -> None:
        """Until the task is done, or the run is to stop."""
        stopping = asyncio.create_task(self._relay.stopping.wait())
        try:
            await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()

    def _program(self, spec: RunSpec) -> Program:
        settings = self._worker.settings
        return Program(
            command=launch.command(
                settings.engine_command,
                settings.launcher,
                spec.resources,
                self._run_dir.path,
                self._fence.attempt,
            ),
            environment=self._environment(
                self._worker.gpus[: spec.resources.gpus], secrets(spec), spec.report_to
            ),
            directory=self._run_dir.path,
            output=self._run_dir.log,
            lease=self._run_dir.control,
            grace_seconds=settings.kill_grace_seconds,
        )

    def _environment(
        self,
        gpus: tuple[str, ...] = (),
        secrets: Collection[str] = (),
        trackers: tuple[Tracker, ...] = (),
    ) -> dict[str, str]:
        settings = self._worker.settings
        more = [*settings.engine_environment, *(SECRET_PREFIX + name for name in secrets)]
        environment = launch.environment(os.environ, more, gpus, settings.allow_hub_models, trackers)
        allowed = {HTTP_ALLOW_PRIVATE: "1"} if settings.http_allow_private else {}
        return environment | allowed

    async def _follow(self, process: Process) -> int:
        """Until the engine has ended: by itself, politely asked, or firmly."""
        ended = asyncio.create_task(process.wait())
        try:
            await self._unless_stopping(ended)
            if not ended.done():
                await asyncio.wait({ended}, timeout=self._grace())
            if not ended.done():
                log.warning("%s: the engine did not stop in time", self._fence.job_id)
                process.stop()
            return await ended
        finally:
            ended.cancel()

    def _grace(self) -> float:
        """Seconds an engine that is to stop may go on; less than the lease, where it cannot be renewed."""
        settings = self._worker.settings
        if self._relay.wish != "lease":
            return settings.stop_grace_seconds
        return max(
            0.0, min(settings.stop_grace_seconds, self._relay.lease_left() - settings.kill_grace_seconds)
        )

    # 2. The rest of the uploads

    async def _upload_rest(self, verdict: Verdict) -> Verdict:
        """What the engine left when it ended; a run has succeeded only when its policy is safe."""
        try:
            await persist(self._uploads.finish, self._patience(PATIENCE_SECONDS))
        except Outage as outage:
            log.error("%s: the last uploads were given up: %s", self._fence.job_id, outage)
            if verdict.state == "succeeded":
                return Verdict("queued", code="storage", message=str(outage), spend_attempt=True)
        return verdict

    # 3. The end

    async def _settle(self, verdict: Verdict) -> None:
        tail = await asyncio.to_thread(log_tail, self._run_dir.log)
        move = partial(_move, fence=self._fence, verdict=verdict, tail=tail)
        await self._relay.settle(move, self._patience(float("inf")))
        log.info("%s: %s %s", self._fence.job_id, verdict.state, verdict.message)
        if verdict.state == "queued":
            ring(self._worker.settings, self._worker.settings.queue)

    def _patience(self, seconds: float) -> Patience:
        return Patience(seconds, self._worker.leaving, self._worker.settings.stop_grace_seconds)

    async def _give_back(self, reason: str, error: BaseException, *, spend_attempt: bool) -> None:
        tail = await asyncio.to_thread(log_tail, self._run_dir.log)
        try:
            with outages():
                async with self._worker.store.write() as session:
                    await transitions.requeue(
                        session, self._fence, reason, spend_attempt, first_line(error), tail
                    )
        except (FenceLost, Outage) as lost:
            log.warning("%s", first_line(lost))


async def _move(session: AsyncSession, fence: Fence, verdict: Verdict, tail: str) -> None:
    match verdict.state:
        case "succeeded":
            await transitions.succeed(session, fence)
        case "failed":
            await transitions.fail(session, fence, verdict.code, verdict.message, tail, verdict.issues)
        case "cancelled":
            await transitions.cancelled(session, fence)
        case "paused":
            await transitions.paused(session, fence)
        case "queued":
            await transitions.requeue(
                session, fence, verdict.code, verdict.spend_attempt, verdict.message, tail
            )
