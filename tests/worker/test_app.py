"""Workers as processes under Celery: bells, deaths, handovers; and that nothing is left of anybody."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import redis

from service.queue import ring
from service.store import jobs
from service.store.models import Job
from tests.worker.fleet import ROOT, SHORT_LEASE, Fleet
from tests.worker.stand_in import chain
from tests.worker.waiting import DEADLINE_SECONDS, eventually, until

pytestmark = pytest.mark.anyio

ENDLESS = ("--updates", 1_000_000, "--seconds", 0.05)


async def policy(fleet: Fleet, job: Job) -> str:
    """The policy a job ended with."""
    [*_, last] = await fleet.artifacts(job.id, "export")
    assert last.update == job.update
    state: str = json.loads(await fleet.content(last, "adapter.json"))["state"]
    return state


async def test_a_bell_starts_a_job(fleet: Fleet) -> None:
    worker = fleet.start("--updates", 5)
    await listening(fleet)

    job = await fleet.reaches(await fleet.submit(), "succeeded", "failed")
    assert (job.state, await policy(fleet, job)) == ("succeeded", chain(5)), fleet.logs()

    worker.terminate()
    assert worker.wait(DEADLINE_SECONDS) == 0, "an idle worker leaves at once"


async def listening(fleet: Fleet) -> None:
    """Wait until the last worker hears bells."""

    async def look() -> bool:
        return "ready." in fleet.logs()

    await eventually(look, "the worker is ready")


async def test_a_killed_worker_loses_no_job(fleet: Fleet) -> None:
    first = fleet.start(*ENDLESS, "--rank", lease_seconds=SHORT_LEASE)
    job_id = await fleet.submit()
    await fleet.has_checkpoint(job_id, 4)

    first.kill()
    killed_at = (await fleet.job(job_id)).update
    fleet.no_engine_left()
    fleet.start("--updates", killed_at + 20)
    job = await fleet.reaches(job_id, "succeeded", "failed")

    assert (job.state, job.attempt) == ("succeeded", 2), fleet.logs()
    assert await policy(fleet, job) == chain(killed_at + 20), "as if it had never been interrupted"
    [rewound] = await fleet.events(job_id, "rewound")
    assert rewound.data["to"] >= 4
    metrics = [event.update for event in await fleet.events(job_id, "metrics")]
    assert metrics == list(range(1, killed_at + 21)), "every update once, none left out"


async def test_a_killed_worker_leaves_no_engine_that_hangs(embedded: Fleet) -> None:
    worker = embedded.start("--hang-at", 2, "--updates", 9, "--rank")
    await embedded.gets_to(await embedded.submit(), 2)
    assert len(embedded.engines()) == 3, "guard, engine, and its rank"
    worker.kill()
    embedded.no_engine_left()


async def test_a_worker_that_is_asked_to_leave_hands_the_job_over(fleet: Fleet) -> None:
    first = fleet.start(*ENDLESS, "--rank")
    job_id = await fleet.submit()
    await fleet.gets_to(job_id, 3)

    first.send_signal(signal.SIGTERM)
    assert first.wait(DEADLINE_SECONDS) == 0, fleet.logs()
    assert fleet.engines() == []
    left = await fleet.job(job_id)
    assert (left.state, left.stalled_attempts) == ("queued", 0), "no attempt is spent"
    checkpoints = await fleet.artifacts(job_id, "checkpoint")
    assert checkpoints[-1].update == left.update, "no update is lost"

    fleet.start("--updates", left.update + 2)
    job = await fleet.reaches(job_id, "succeeded", "failed")
    assert (job.attempt, await policy(fleet, job)) == (2, chain(left.update + 2))


async def test_a_worker_that_was_frozen_finds_its_job_gone_and_leaves_it_alone(fleet: Fleet) -> None:
    frozen = fleet.start(*ENDLESS, "--rank", lease_seconds=SHORT_LEASE)
    job_id = await fleet.submit()
    await fleet.has_checkpoint(job_id, 4)

    async with fleet.store.write() as session:  # or SQLite's one lock for writing might freeze with it
        await jobs.get_job(session, fleet.project, job_id, lock=True)
        frozen.send_signal(signal.SIGSTOP)
    fleet.no_engine_left()  # the engine watches its lease by itself
    at = (await fleet.job(job_id)).update
    fleet.start(*ENDLESS, "--updates", at + 40)
    await fleet.gets_to(job_id, 1, attempt=2)
    frozen.send_signal(signal.SIGCONT)
    job = await fleet.reaches(job_id, "succeeded", "failed")

    assert (job.state, job.attempt) == ("succeeded", 2), fleet.logs()
    assert await policy(fleet, job) == chain(at + 40)
    until(lambda: "no longer holds" in fleet.logs(), "the frozen worker learns that its attempt is over")
    states = [event.data["state"] for event in await fleet.events(job_id, "state")]
    assert states == ["queued", "running", "queued", "running", "succeeded"]
    frozen.terminate()
    assert frozen.wait(DEADLINE_SECONDS) == 0


async def test_a_job_without_a_bell_is_found(embedded: Fleet) -> None:
    early = await embedded.submit(bell=False)
    embedded.start("--updates", 1)
    await embedded.reaches(early, "succeeded")
    late = await embedded.submit(bell=False)
    await embedded.reaches(late, "succeeded")


async def test_one_bell_wakes_as_many_workers_as_there_are_jobs(embedded: Fleet) -> None:
    for _ in range(2):
        embedded.start(*ENDLESS, heartbeat_seconds=200, lease_seconds=600)  # no reaper helps
    until(lambda: embedded.logs().count("ready.") == 2, "both workers are ready")
    made = [await embedded.submit(bell=False) for _ in range(2)]
    ring(embedded.settings, embedded.settings.queue)
    for job_id in made:
        await embedded.gets_to(job_id, 1)
    assert len({(await embedded.job(job_id)).worker for job_id in made}) == 2


async def test_what_a_dead_worker_left_on_the_disk_is_removed(embedded: Fleet) -> None:
    worker = embedded.start(*ENDLESS, lease_seconds=SHORT_LEASE)
    job_id = await embedded.submit()
    await embedded.gets_to(job_id, 1)
    worker.kill()
    assert [path.name for path in embedded.runs_dir.glob("*/*")] == ["a1"]

    embedded.start("--updates", 1)
    await embedded.reaches(job_id, "succeeded")
    await embedded.attempts_over()


async def test_a_broker_that_hung_up_while_a_job_ran_is_heard_again(production: Fleet) -> None:
    slow = {"heartbeat_seconds": 60, "lease_seconds": 300}  # no reaper helps
    worker = production.start(*ENDLESS, **slow)
    await listening(production)
    job_id = await production.submit()
    await production.gets_to(job_id, 1)

    hang_up(production.settings.broker_url)
    await production.wish(job_id, "cancel")
    await production.reaches(job_id, "cancelled")
    other = await production.submit()
    await production.gets_to(other, 1)

    worker.terminate()
    assert worker.wait(DEADLINE_SECONDS) == 0


def hang_up(url: str) -> None:
    """End all connections to a Redis database but our own."""
    with redis.Redis.from_url(url) as client:
        number = client.connection_pool.connection_kwargs["db"]
        for other in client.client_list():
            if int(other["db"]) == number and int(other["id"]) != client.client_id():
                client.client_kill_filter(_id=other["id"])


def test_a_worker_without_a_gpu_says_how_to_use_the_cpu() -> None:
    environment = {**os.environ, "PROXIMA_ALLOW_CPU": "false", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "worker"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "PROXIMA_ALLOW_CPU" in done.stderr
