"""All moves in any order, against a small model in Python: what the rows say, and what each call refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select

from service.errors import NotFound, ServiceError, WrongState
from service.store import jobs, keys, transitions
from service.store.models import FINAL, Event, Job
from service.store.session import Store
from service.store.transitions import MAX_STALLED_ATTEMPTS, Fence, FenceLost
from tests.service.store.making import FOREVER, OVER, SPEC, said

T = TypeVar("T")

ARROWS = {
    None: {"queued"},
    "queued": {"running", "paused", "cancelled", "failed"},
    "running": {"succeeded", "failed", "cancelled", "paused", "queued"},
    "paused": {"queued", "cancelled"},
}


BACK = st.integers(0, 3)
"""How far back to look for something to act on: mostly at what is alive, at times at what is long over."""


def newest(made: list[T], back: int) -> T:
    return made[-1 - back % len(made)]


@dataclass
class Model:
    """What should be true of one job."""

    project: str
    priority: int
    age: tuple[Any, ...]
    state: str = "queued"
    wanted: str = "run"
    attempt: int = 0
    stalled: int = 0
    worker: str | None = None
    is_silent: bool = False
    furthest: int = 0
    update: int = 0
    walk: list[str] = field(default_factory=lambda: ["queued"])
    keys: set[str] = field(default_factory=set)

    def go(self, state: str) -> None:
        self.state = state
        self.walk.append(state)
        if state != "running":
            self.worker = None
        if state == "queued":
            self.wanted = "run"

    def leave(self, spend: bool) -> None:
        """The end of an attempt that is not the end of the run."""
        if not spend:
            self.stalled = max(self.stalled - 1, 0)
        if self.wanted != "run":
            self.go({"cancel": "cancelled", "pause": "paused"}[self.wanted])
        elif spend and self.stalled >= MAX_STALLED_ATTEMPTS:
            self.go("failed")
        else:
            self.go("queued")


class Moves(RuleBasedStateMachine):
    """Two projects, one queue, two workers. make_url: gives an empty database."""

    make_url: Callable[[], str]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.models: dict[str, Model] = {}
        self.made: list[tuple[str, str]] = []  # (job, project), the deleted too
        self.fences: list[Fence] = []
        self.store = Store.open(self.make_url())
        self.projects = [self.write(keys.ensure_project, name).id for name in ("ours", "theirs")]

    def teardown(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()

    def write(self, call: Callable[..., Coroutine[Any, Any, T]], *args: Any, **kwargs: Any) -> T:
        """One unit of work."""

        async def unit() -> T:
            async with self.store.write() as session:
                return await call(session, *args, **kwargs)

        return self.runner.run(unit())

    # Owners

    @initialize(project=st.integers(0, 1))
    def begin(self, project: int) -> None:
        self.create(project, 0)

    @precondition(lambda self: len(self.models) < 4)
    @rule(project=st.integers(0, 1), priority=st.integers(0, 1))
    def create(self, project: int, priority: int) -> None:
        new = jobs.NewJob(spec=SPEC, spec_version=1, priority=priority)
        job = self.write(jobs.insert_job, self.projects[project], new)
        self.models[job.id] = Model(job.project_id, priority, age=(job.created_at, job.id))
        self.made.append((job.id, job.project_id))

    @precondition(lambda self: self.made)
    @rule(back=BACK, wanted=st.sampled_from(["run", "pause", "cancel"]))
    def wish(self, back: int, wanted: str) -> None:
        job_id, project = newest(self.made, back)
        job = self.models.get(job_id)
        is_done = job is not None and job.wanted == wanted and job.state not in {"succeeded", "failed"}
        refusal: type[ServiceError] | None = None
        if job is None:
            refusal = NotFound
        elif not is_done and (job.state in FINAL or job.wanted == "cancel"):
            refusal = WrongState
        with pytest.raises(refusal) if refusal else nullcontext():
            self.write(jobs.set_wanted, project, job_id, wanted)
        if job is None or refusal or is_done:
            return
        job.wanted = wanted
        if job.state != "running":
            job.go({"run": "queued", "pause": "paused", "cancel": "cancelled"}[wanted])

    @precondition(lambda self: self.made)
    @rule(back=BACK)
    def delete(self, back: int) -> None:
        job_id, project = newest(self.made, back)
        job = self.models.get(job_id)
        refusal = NotFound if job is None else None if job.state in FINAL else WrongState
        with pytest.raises(refusal) if refusal else nullcontext():
            self.write(jobs.delete_job, project, job_id)
        if refusal is None:
            del self.models[job_id]

    # Workers

    @precondition(lambda self: self.next() is not None)
    @rule(worker=st.sampled_from(["w1", "w2"]), is_silent=st.booleans())
    def claim(self, worker: str, is_silent: bool) -> None:
        lease = OVER if is_silent else FOREVER
        claim = self.write(transitions.claim, worker=worker, lease_seconds=lease)
        assert claim is not None
        assert claim.fence.job_id == self.next()
        job = self.models[claim.fence.job_id]
        job.attempt += 1
        job.stalled += 1
        job.worker, job.is_silent = worker, is_silent
        job.go("running")
        assert claim.fence == Fence(claim.fence.job_id, job.attempt, worker)
        self.fences.append(claim.fence)

    def next(self) -> str | None:
        running = [job.project for job in self.models.values() if job.state == "running"]
        queued = [
            (-job.priority, running.count(job.project), job.age, job_id)
            for job_id, job in self.models.items()
            if job.state == "queued"
        ]
        return min(queued)[-1] if queued else None

    def under(
        self, fence: Fence, call: Callable[..., Coroutine[Any, Any, object]], *args: Any
    ) -> Model | None:
        """Write under a fence; the job it is about, or None when it was rightly refused."""
        job = self.models.get(fence.job_id)
        holds = job is not None and job.state == "running"
        holds = holds and (job.attempt, job.worker) == (fence.attempt, fence.worker)
        with nullcontext() if holds else pytest.raises(FenceLost):
            self.write(call, fence, *args)
        return job if holds else None

    @precondition(lambda self: self.fences)
    @rule(back=BACK, updates=st.lists(st.integers(1, 6), max_size=4), is_silent=st.booleans())
    def beat(self, back: int, updates: list[int], is_silent: bool) -> None:
        events = [said(update) for update in updates]
        lease = OVER if is_silent else FOREVER
        job = self.under(newest(self.fences, back), transitions.beat, events, lease)
        if job is None:
            return
        job.is_silent = is_silent
        job.keys |= {event.key for event in events}
        if updates:
            job.update = updates[-1]
            if max(updates) > job.furthest:
                job.furthest, job.stalled = max(updates), 0

    @precondition(lambda self: self.fences)
    @rule(back=BACK, how=st.sampled_from(["succeed", "fail", "stop", "requeue", "requeue", "give back"]))
    def end(self, back: int, how: str) -> None:
        """The end of an attempt; `stop`: what a worker does when it has read a wish to stop."""
        fence = newest(self.fences, back)
        wanted = self.models[fence.job_id].wanted if fence.job_id in self.models else "run"
        call, *args = {
            "succeed": (transitions.succeed,),
            "fail": (transitions.fail, "crash", "why"),
            "stop": (transitions.cancelled if wanted == "cancel" else transitions.paused,),
            "requeue": (transitions.requeue, "crash", True),
            "give back": (transitions.requeue, "sigterm", False),
        }[how]
        job = self.under(fence, call, *args)
        if job is None:
            return
        if how in {"succeed", "fail"}:
            job.go({"succeed": "succeeded", "fail": "failed"}[how])
        else:
            job.leave(spend=how == "requeue")

    @precondition(lambda self: any(job.state == "running" for job in self.models.values()))
    @rule()
    def expire(self) -> None:
        silent = {job_id for job_id, job in self.models.items() if job.state == "running" and job.is_silent}
        assert set(self.write(transitions.expire_leases)) == silent
        for job_id in silent:
            self.models[job_id].leave(spend=True)

    # What is always true

    @invariant()
    def rows_are_as_the_model_says(self) -> None:
        rows, events = self.runner.run(self.read())
        assert {row.id for row in rows} == set(self.models)
        for row in rows:
            job = self.models[row.id]
            shown = (row.state, row.wanted if row.state not in FINAL else None, row.attempt, row.worker)
            assert shown == (
                job.state,
                job.wanted if job.state not in FINAL else None,
                job.attempt,
                job.worker,
            )
            assert (row.stalled_attempts, row.furthest_update, row.update) == (
                job.stalled,
                job.furthest,
                job.update,
            )
            assert (row.lease_until is None) == (row.state != "running")
            assert (row.queued_at is None) == (row.state != "queued")
            assert (row.finished_at is None) == (row.state not in FINAL)
            self.check_events(row, job, [event for event in events if event.job_id == row.id])

    def check_events(self, row: Job, job: Model, events: list[Event]) -> None:
        assert [event.seq for event in events] == list(range(1, row.next_seq))
        assert [event.data["state"] for event in events if event.type == "state"] == job.walk
        said_keys = [event.key for event in events if event.type != "state"]
        assert len(said_keys) == len(set(said_keys))
        assert set(said_keys) == job.keys
        for before, after in zip([None, *job.walk], job.walk, strict=False):
            assert after in ARROWS[before]

    async def read(self) -> tuple[list[Job], list[Event]]:
        async with self.store.read() as session:
            rows = (await session.scalars(select(Job))).all()
            events = (await session.scalars(select(Event).order_by(Event.job_id, Event.seq))).all()
            return list(rows), list(events)


@pytest.mark.parametrize(
    ("database", "examples", "steps"), [("new_sqlite", 20, 30), ("emptied_postgres", 4, 25)]
)
def test_any_order_of_moves(database: str, examples: int, steps: int, request: pytest.FixtureRequest):
    class Here(Moves):
        make_url = staticmethod(request.getfixturevalue(database))

    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=checks
        ),
    )
