"""What one of several processes does that use a database at once."""

from __future__ import annotations

import asyncio
import random
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any

from service.errors import ServiceError
from service.store import artifacts, jobs, transitions
from service.store.session import Store
from service.store.transitions import Fence, FenceLost
from tests.service.store.making import FOREVER, OVER, said

EVENTS = 40
ROUNDS = 60


async def claim_all(store: Store, number: int, told: list[str]) -> list[str]:
    """Claim until there is nothing; every other job is finished at once."""
    claimed: list[str] = []
    while True:
        async with store.write() as session:
            claim = await transitions.claim(session, worker=f"w{number}", lease_seconds=FOREVER)
        if claim is None:
            return claimed
        claimed.append(claim.fence.job_id)
        if len(claimed) % 2:
            async with store.write() as session:
                await transitions.succeed(session, claim.fence)


async def say_all(store: Store, number: int, told: list[str]) -> int:
    """Write under one fence that all contenders share: the same events, each in an order of its own."""
    [job_id] = told
    fence = Fence(job_id, 1, "w1")
    updates = list(range(EVENTS))
    random.Random(number).shuffle(updates)
    for start in range(0, EVENTS, 3):
        async with store.write() as session:
            events = [said(update) for update in updates[start : start + 3]]
            await transitions.beat(session, fence, events, FOREVER)
        async with store.write() as session:
            await artifacts.record(session, fence, "export", start, [], f"jobs/{number}/")
    return EVENTS


async def do_anything(store: Store, number: int, told: list[str]) -> dict[str, int]:
    """Be a worker, an owner, and the reaper by turns, and count what was done."""
    project, *job_ids = told
    draw = random.Random(number)
    done: dict[str, int] = {}
    fences: list[Fence] = []
    for _ in range(ROUNDS):
        act = draw.choice(["claim", "claim", "beat", "end", "requeue", "wish", "wish", "expire"])
        try:
            async with store.write() as session:
                await _act(session, act, draw, fences, project, draw.choice(job_ids), number)
        except (FenceLost, ServiceError) as refusal:
            act = type(refusal).__name__
        done[act] = done.get(act, 0) + 1
    return done


async def _act(
    session: Any, act: str, draw: random.Random, fences: list[Fence], project: str, job_id: str, number: int
) -> None:
    fence = draw.choice(fences) if fences else Fence(job_id, 1, "nobody")
    if act == "claim":
        lease = draw.choice([OVER, FOREVER])
        claim = await transitions.claim(session, worker=f"w{number}", lease_seconds=lease)
        fences += [claim.fence] if claim else []
    elif act == "beat":
        await transitions.beat(session, fence, [said(draw.randint(1, 9))], FOREVER)
    elif act == "end":
        await draw.choice([transitions.succeed, transitions.paused])(session, fence)
    elif act == "requeue":
        await transitions.requeue(session, fence, "sigterm", spend_attempt=False)
    elif act == "wish":
        await jobs.set_wanted(session, project, job_id, draw.choice(["run", "run", "pause", "cancel"]))
    else:
        await transitions.expire_leases(session)


PARTS = {"claim": claim_all, "say": say_all, "anything": do_anything}


async def _play(part: str, url: str, number: int, told: list[str], start: Barrier) -> Any:
    store = Store.open(url)
    await store.ping()
    start.wait()
    try:
        return await PARTS[part](store, number, told)
    finally:
        await store.close()


def play(part: str, url: str, number: int, told: list[str], start: Barrier, answer: Connection) -> None:
    """Connect, wait until all have, play a part, and send back what was done."""
    answer.send(asyncio.run(_play(part, url, number, told, start)))
