"""Moves between states: who may make which, what each leaves behind, and the order of claims."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import get_args

import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from ppo_engine.issues import Issue
from ppo_engine.run_dir import ManifestFile
from service.errors import WrongState
from service.store import artifacts, jobs, keys, transitions
from service.store.models import Event, State, Wanted
from service.store.session import Store
from service.store.transitions import MAX_STALLED_ATTEMPTS, Fence, FenceLost
from tests.service.store.making import (
    FOREVER,
    OVER,
    claim,
    history,
    look,
    make_job,
    running,
    said,
    states,
)

pytestmark = pytest.mark.anyio

Write = Callable[[AsyncSession, Fence], Awaitable[object]]

WRITES: dict[str, Write] = {
    "beat": lambda session, fence: transitions.beat(session, fence, [said(9)]),
    "set_plan": lambda session, fence: transitions.set_plan(session, fence, {}, 9),
    "succeed": transitions.succeed,
    "fail": lambda session, fence: transitions.fail(session, fence, "crash", "why"),
    "cancelled": transitions.cancelled,
    "paused": transitions.paused,
    "requeue": lambda session, fence: transitions.requeue(session, fence, "sigterm", spend_attempt=False),
    "record": lambda session, fence: artifacts.record(session, fence, "export", 9, [], "jobs/"),
    "forget_others": lambda session, fence: artifacts.forget_others(session, fence, "export", set),
}


async def wish(store: Store, project: str, job_id: str, wanted: Wanted) -> str:
    async with store.write() as session:
        return (await jobs.set_wanted(session, project, job_id, wanted)).state


# Arrows ----------------------------------------------------------------------------------------------------


async def test_a_job_begins_queued_with_its_first_event(store: Store, project: str):
    job_id = await make_job(store, project, total_updates=7)
    job = await look(store, job_id)
    assert (job.state, job.wanted, job.attempt, job.update) == ("queued", "run", 0, 0)
    assert job.created_at is not None
    assert job.queued_at is not None
    [event] = await history(store, job_id)
    assert (event.seq, event.type, event.data) == (1, "state", {"state": "queued", "attempt": 0})


async def test_a_claim_begins_an_attempt(store: Store, project: str):
    job_id = await make_job(store, project, spec={"version": 1, "x": 1})
    taken = await claim(store, "w7")
    assert taken.fence == Fence(job_id, 1, "w7")
    assert (taken.project_id, taken.spec, taken.spec_version, taken.checkpoints) == (
        project,
        {"version": 1, "x": 1},
        1,
        (),
    )
    job = await look(store, job_id)
    assert (job.state, job.attempt, job.worker, job.queued_at) == ("running", 1, "w7", None)
    assert job.started_at is not None
    assert job.lease_until is not None
    assert taken.lease_until == pytest.approx(job.lease_until.timestamp())
    assert FOREVER - 60 < taken.lease_until - job.started_at.timestamp() < FOREVER + 60
    assert await states(store, job_id) == ["queued", "running"]


async def test_success_is_final(store: Store, project: str):
    fence = await running(store, project)
    async with store.write() as session:
        await transitions.succeed(session, fence)
    job = await look(store, fence.job_id)
    assert (job.state, job.worker, job.lease_until, job.error_code) == ("succeeded", None, None, None)
    assert job.finished_at is not None
    assert await states(store, fence.job_id) == ["queued", "running", "succeeded"]


async def test_failure_keeps_its_reason(store: Store, project: str):
    fence = await running(store, project)
    issue = Issue(loc=("ppo", "stop_token"), msg="why")
    async with store.write() as session:
        await transitions.fail(session, fence, "spec", "It cannot be.", "last\0line", [issue])
    job = await look(store, fence.job_id)
    assert (job.state, job.error_code, job.error_message) == ("failed", "spec", "It cannot be.")
    assert job.error_log_tail == "last\ufffdline"
    assert job.error_issues == [{"loc": ["ppo", "stop_token"], "msg": "why"}]
    assert (await history(store, fence.job_id))[-1].data == {
        "state": "failed",
        "attempt": 1,
        "reason": "spec",
    }


async def test_a_queued_job_that_can_never_run_is_rejected(store: Store, project: str):
    job_id = await make_job(store, project)
    job = await look(store, job_id)
    async with store.write() as session:
        assert await transitions.reject(session, job, "spec", "why") is not None
        assert await transitions.reject(session, job, "spec", "why") is None
    assert await states(store, job_id) == ["queued", "failed"]


async def test_an_attempt_that_is_given_back_is_taken_up_again(store: Store, project: str):
    fence = await running(store, project)
    async with store.write() as session:
        await transitions.requeue(session, fence, "sigterm", spend_attempt=False)
    job = await look(store, fence.job_id)
    assert (job.state, job.worker, job.lease_until) == ("queued", None, None)
    assert job.queued_at is not None
    assert job.started_at is not None
    again = await claim(store, "w2")
    assert again.fence == Fence(fence.job_id, 2, "w2")
    assert (await look(store, fence.job_id)).started_at == job.started_at


async def test_all_ways_of_a_cancel(store: Store, project: str):
    waiting = await make_job(store, project)
    assert await wish(store, project, waiting, "cancel") == "cancelled"
    fence = await running(store, project)
    assert await wish(store, project, fence.job_id, "cancel") == "running"
    async with store.write() as session:
        assert (await transitions.beat(session, fence)).wanted == "cancel"
        await transitions.cancelled(session, fence)
    assert (await look(store, fence.job_id)).finished_at is not None
    assert await states(store, fence.job_id) == ["queued", "running", "cancelled"]


async def test_all_ways_of_a_pause(store: Store, project: str):
    fence = await running(store, project)
    assert await wish(store, project, fence.job_id, "pause") == "running"
    async with store.write() as session:
        await transitions.paused(session, fence)
    assert await wish(store, project, fence.job_id, "run") == "queued"
    assert await wish(store, project, fence.job_id, "pause") == "paused"
    assert await wish(store, project, fence.job_id, "cancel") == "cancelled"
    walk = ["queued", "running", "paused", "queued", "paused", "cancelled"]
    assert await states(store, fence.job_id) == walk


async def test_a_pause_that_was_taken_back_queues_the_job(store: Store, project: str):
    fence = await running(store, project)
    await wish(store, project, fence.job_id, "pause")
    await wish(store, project, fence.job_id, "run")
    async with store.write() as session:
        await transitions.paused(session, fence)
    assert (await look(store, fence.job_id)).state == "queued"


@pytest.mark.parametrize(("wanted", "state"), [("pause", "paused"), ("cancel", "cancelled")])
async def test_an_attempt_given_back_goes_where_the_owner_wants(
    store: Store, project: str, wanted: Wanted, state: State
):
    fence = await running(store, project)
    await wish(store, project, fence.job_id, wanted)
    async with store.write() as session:
        await transitions.requeue(session, fence, "sigterm", spend_attempt=False)
    assert (await look(store, fence.job_id)).state == state


async def test_a_run_that_ends_before_it_hears_of_the_cancel_has_ended(store: Store, project: str):
    fence = await running(store, project)
    await wish(store, project, fence.job_id, "cancel")
    async with store.write() as session:
        await transitions.succeed(session, fence)
    assert (await look(store, fence.job_id)).state == "succeeded"


async def test_wishes_that_change_nothing_say_nothing(store: Store, project: str):
    job_id = await make_job(store, project)
    assert await wish(store, project, job_id, "run") == "queued"
    await wish(store, project, job_id, "pause")
    assert await wish(store, project, job_id, "pause") == "paused"
    await wish(store, project, job_id, "cancel")
    assert await wish(store, project, job_id, "cancel") == "cancelled"
    assert await states(store, job_id) == ["queued", "paused", "cancelled"]


async def test_a_cancel_is_never_taken_back(store: Store, project: str):
    fence = await running(store, project)
    await wish(store, project, fence.job_id, "cancel")
    for wanted in ("run", "pause"):
        with pytest.raises(WrongState, match="not taken back"):
            await wish(store, project, fence.job_id, wanted)


@pytest.mark.parametrize("wanted", get_args(Wanted))
async def test_nothing_is_wanted_of_a_job_that_is_over(store: Store, project: str, wanted: Wanted):
    fence = await running(store, project)
    async with store.write() as session:
        await transitions.succeed(session, fence)
    with pytest.raises(WrongState, match=f"{fence.job_id} is succeeded and cannot be .*: it is over"):
        await wish(store, project, fence.job_id, wanted)


# The fence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stale", ["older attempt", "other worker", "no job"])
async def test_a_stale_worker_writes_nothing(store: Store, project: str, stale: str):
    first = await running(store, project)
    async with store.write() as session:
        await transitions.requeue(session, first, "sigterm", spend_attempt=False)
    second = (await claim(store)).fence  # by the same worker
    await wish(store, project, second.job_id, "cancel")
    before = await look(store, second.job_id)
    fence = {
        "older attempt": first,
        "other worker": Fence(second.job_id, second.attempt, "w3"),
        "no job": Fence("job_none", 1, "w1"),
    }[stale]
    for write in WRITES.values():
        with pytest.raises(FenceLost):
            async with store.write() as session:
                await write(session, fence)
    after = await look(store, second.job_id)
    assert (after.state, after.next_seq, after.lease_until) == (
        before.state,
        before.next_seq,
        before.lease_until,
    )


async def test_the_fence_falls_with_the_end_of_the_attempt(store: Store, project: str):
    fence = await running(store, project)
    async with store.write() as session:
        await transitions.succeed(session, fence)
    for write in WRITES.values():
        with pytest.raises(FenceLost):
            async with store.write() as session:
                await write(session, fence)
    assert await states(store, fence.job_id) == ["queued", "running", "succeeded"]


async def test_a_move_and_its_event_are_one(store: Store, project: str):
    fence = await running(store, project)

    async def fail() -> None:
        async with store.write() as session:
            await transitions.beat(session, fence, [said(1)])
            await transitions.succeed(session, fence)
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    assert (await look(store, fence.job_id)).state == "running"
    assert await states(store, fence.job_id) == ["queued", "running"]


# Beats and leases ------------------------------------------------------------------------------------------


async def test_a_beat_keeps_what_was_said_and_renews_the_lease(store: Store, project: str):
    fence = await running(store, project, lease=OVER)
    async with store.write() as session:
        beat = await transitions.beat(session, fence, [said(0, "started"), said(1, loss=2.5)], FOREVER)
        now = (await session.scalars(select(func.max(Event.created_at)))).one()
    assert beat.wanted == "run"
    assert beat.lease_until > now.timestamp() + 60
    job = await look(store, fence.job_id)
    assert (job.update, job.furthest_update) == (1, 1)
    event = (await history(store, fence.job_id))[-1]
    assert (event.key, event.type, event.attempt, event.update) == ("metrics:1", "metrics", 1, 1)
    assert event.data == {"loss": 2.5}
    assert event.created_at.timestamp() == 1_700_000_001.25
    async with store.write() as session:
        assert await transitions.expire_leases(session) == []


async def test_a_job_shows_where_its_attempt_is_and_keeps_how_far_it_came(store: Store, project: str):
    fence = await running(store, project)
    async with store.write() as session:
        await transitions.beat(session, fence, [said(4), said(5)])
        await transitions.beat(session, fence, [said(3, "rewound")])
    job = await look(store, fence.job_id)
    assert (job.update, job.furthest_update) == (3, 5)


async def test_an_attempt_that_a_worker_planned_shows_its_plan(store: Store, project: str):
    fence = await running(store, project)
    async with store.write() as session:
        await transitions.set_plan(session, fence, {"num_total_batches": 8}, 8)
    job = await look(store, fence.job_id)
    assert (job.plan, job.total_updates) == ({"num_total_batches": 8}, 8)


async def test_a_silent_worker_loses_its_job(store: Store, project: str):
    silent = await running(store, project, lease=OVER)
    living = await running(store, project)
    async with store.write() as session:
        assert await transitions.expire_leases(session) == [silent.job_id]
    assert (await look(store, silent.job_id)).state == "queued"
    assert (await look(store, living.job_id)).state == "running"
    assert (await history(store, silent.job_id))[-1].data["reason"] == "lost"
    assert (await claim(store, "w2")).fence == Fence(silent.job_id, 2, "w2")


@pytest.mark.parametrize(("wanted", "state"), [("pause", "paused"), ("cancel", "cancelled")])
async def test_a_job_of_a_lost_worker_goes_where_its_owner_wants(
    store: Store, project: str, wanted: Wanted, state: State
):
    fence = await running(store, project, lease=OVER)
    await wish(store, project, fence.job_id, wanted)
    async with store.write() as session:
        await transitions.expire_leases(session)
    assert (await look(store, fence.job_id)).state == state


async def test_attempts_without_progress_end_in_failure(store: Store, project: str):
    job_id = await make_job(store, project)
    for _ in range(MAX_STALLED_ATTEMPTS):
        assert (await look(store, job_id)).state == "queued"
        await claim(store, lease=OVER)
        async with store.write() as session:
            await transitions.expire_leases(session)
    job = await look(store, job_id)
    assert (job.state, job.error_code) == ("failed", "lost")
    assert job.error_message == "3 attempts in a row ended without a step of progress; the last: lost."
    assert job.finished_at is not None


async def test_progress_forgives_the_attempts_before_it(store: Store, project: str):
    job_id = await make_job(store, project)
    for attempt in range(1, 4 * MAX_STALLED_ATTEMPTS):
        fence = (await claim(store)).fence
        async with store.write() as session:
            if attempt % MAX_STALLED_ATTEMPTS == 0:
                await transitions.beat(session, fence, [said(attempt)])
            await transitions.requeue(session, fence, "crash", spend_attempt=True)
    assert (await look(store, job_id)).state == "queued"


async def test_going_over_old_ground_is_no_progress(store: Store, project: str):
    job_id = await make_job(store, project)
    for _ in range(MAX_STALLED_ATTEMPTS + 1):
        fence = (await claim(store)).fence
        async with store.write() as session:
            await transitions.beat(session, fence, [said(update) for update in range(1, 5)])
            await transitions.requeue(session, fence, "crash", spend_attempt=True)
    # The first attempt made progress; the three after it only repeated it.
    assert (await look(store, job_id)).state == "failed"


async def test_leaving_politely_costs_no_attempt(store: Store, project: str):
    job_id = await make_job(store, project)
    for _ in range(3 * MAX_STALLED_ATTEMPTS):
        fence = (await claim(store)).fence
        async with store.write() as session:
            await transitions.requeue(session, fence, "sigterm", spend_attempt=False)
    job = await look(store, job_id)
    assert (job.state, job.stalled_attempts) == ("queued", 0)


async def test_queues_in_which_jobs_wait_are_rung_again(store: Store, project: str):
    await make_job(store, project, queue="a")
    await make_job(store, project, queue="a")
    await make_job(store, project, queue="b")
    await make_job(store, project, queue="c")
    await claim(store, queue="b")
    async with store.read() as session:
        assert sorted(await transitions.queued_without_bell(session, -60)) == ["a", "c"]
        assert await transitions.queued_without_bell(session, 60) == []


async def test_attempts_that_run_are_told_from_those_that_are_over(store: Store, project: str):
    ended, runs = await running(store, project), await running(store, project)
    async with store.write() as session:
        await transitions.requeue(session, ended, "sigterm", spend_attempt=False)
        asked = {ended.job_id, runs.job_id, "job_none"}
        assert await transitions.running_attempts(session, asked) == {(runs.job_id, 1)}
        assert await transitions.running_attempts(session, []) == set()


# The order of claims ---------------------------------------------------------------------------------------


async def test_claims_take_priority_then_fair_share_then_age(store: Store, project: str):
    async with store.write() as session:
        other = (await keys.ensure_project(session, "other")).id
    first, second = await make_job(store, project), await make_job(store, project)
    theirs = await make_job(store, other)
    urgent = await make_job(store, project, priority=5)
    order = [(await claim(store)).fence.job_id for _ in range(4)]
    # `urgent` runs for our project: the others are served first, and then everybody by age.
    assert order == [urgent, theirs, first, second]


async def test_a_queue_is_its_own(store: Store, project: str):
    await make_job(store, project, queue="large")
    async with store.write() as session:
        assert await transitions.claim(session, worker="w", queue="default") is None
        assert await transitions.claim(session, worker="w", queue="large") is not None


async def test_a_later_attempt_is_given_the_checkpoints_furthest_first(store: Store, project: str):
    fence = await running(store, project)
    file = ManifestFile(name="state.safetensors", size=3, sha256="ab")
    async with store.write() as session:
        for update in (10, 20):
            await artifacts.record(session, fence, "checkpoint", update, [file], f"jobs/x/{update}/")
        await artifacts.record(session, fence, "export", 30, [file], "jobs/x/30/")
        await transitions.requeue(session, fence, "lost", spend_attempt=True)
    found = (await claim(store)).checkpoints
    assert [(made.update, made.attempt, made.key_prefix) for made in found] == [
        (20, 1, "jobs/x/20/"),
        (10, 1, "jobs/x/10/"),
    ]
    assert found[0].files == [file.model_dump()]
