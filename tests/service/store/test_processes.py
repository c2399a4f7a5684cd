"""Several operating-system processes at one database."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest

from service.store.session import Store
from tests.service.store import contender
from tests.service.store.contender import EVENTS
from tests.service.store.making import history, look, make_job, running
from tests.service.store.test_transitions_model import ARROWS

pytestmark = pytest.mark.anyio

PROCESSES = 4
LIMIT_SECONDS = 300

# Each process is forked from a server that has imported what it needs, and has no threads or connections.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([contender.__name__])


def contend(part: str, url: str, *told: str) -> list[Any]:
    """Let several processes play a part at the same moment; what each has done."""
    start = context.Barrier(PROCESSES, timeout=LIMIT_SECONDS)
    pipes = [context.Pipe(duplex=False) for _ in range(PROCESSES)]
    processes = [
        context.Process(
            target=contender.play, args=(part, url, number, list(told), start, answer), daemon=True
        )
        for number, (_, answer) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_SECONDS)
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    return [reader.recv() for reader, _ in pipes]


async def test_no_job_is_claimed_by_two(store: Store, project: str, database_url: str):
    made = [await make_job(store, project) for _ in range(40)]
    claimed = contend("claim", database_url)
    assert sorted(job_id for ids in claimed for job_id in ids) == sorted(made)
    assert sum(bool(ids) for ids in claimed) > 1, "only one of them ever came to it"
    assert {(await look(store, job_id)).attempt for job_id in made} == {1}


async def test_events_of_many_writers_have_no_gap_and_no_double(
    store: Store, project: str, database_url: str
):
    fence = await running(store, project)
    contend("say", database_url, fence.job_id)
    events = await history(store, fence.job_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert sorted(event.update for event in events if event.type == "metrics") == list(range(EVENTS))
    assert sorted(event.update for event in events if event.type == "artifact") == list(range(0, EVENTS, 3))


async def test_whatever_comes_together_jobs_move_along_the_arrows_only(
    store: Store, project: str, database_url: str
):
    made = [await make_job(store, project) for _ in range(12)]
    done = contend("anything", database_url, project, *made)
    assert sum(counts.get("claim", 0) for counts in done) > 0
    for job_id in made:
        job, events = await look(store, job_id), await history(store, job_id)
        assert [event.seq for event in events] == list(range(1, job.next_seq))
        walk = [event.data["state"] for event in events if event.type == "state"]
        assert walk[-1] == job.state
        assert walk.count("running") == job.attempt
        for before, after in zip([None, *walk], walk, strict=False):
            assert after in ARROWS[before]
