"""Requests sent twice: the first makes the thing, the second gets the same answer."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from sqlalchemy import func, select, update

from service.errors import KeyReused, RequestInFlight
from service.store import idempotency, jobs
from service.store.idempotency import Answer, Request, fingerprint
from service.store.models import IdempotencyKey, Job
from service.store.session import Store
from tests.service.store.making import SPEC

pytestmark = pytest.mark.anyio


def request(project: str, key: str = "k1", body: bytes = b"{}", route: str = "jobs") -> Request:
    return Request(project, route, key, fingerprint(body))


async def post(store: Store, sent: Request) -> Answer:
    """What a POST does: make a job, unless this was asked before."""
    async with store.write() as session:
        if (earlier := await idempotency.begin(session, sent)) is not None:
            return earlier
        job = await jobs.insert_job(session, sent.project_id, jobs.NewJob(SPEC, 1))
        answer = Answer(201, {"id": job.id}, {"Location": f"/v1/jobs/{job.id}"})
        await idempotency.finish(session, sent, answer)
        return answer


async def count(store: Store, table: type[Job] | type[IdempotencyKey]) -> int:
    async with store.read() as session:
        return (await session.scalars(select(func.count()).select_from(table))).one()


async def test_the_second_gets_the_answer_of_the_first(store: Store, project: str):
    first = await post(store, request(project))
    assert await post(store, request(project)) == first
    assert (first.status, first.headers["Location"]) == (201, f"/v1/jobs/{first.body['id']}")
    assert await count(store, Job) == 1


async def test_another_key_project_or_route_is_another_request(store: Store, project: str, stranger: str):
    sent = [request(project), request(project, "k2"), request(stranger), request(project, route="files")]
    answers = [await post(store, one) for one in sent]
    assert len({answer.body["id"] for answer in answers}) == 4


async def test_another_body_is_refused(store: Store, project: str):
    await post(store, request(project))
    with pytest.raises(KeyReused, match="'k1' was sent with another body"):
        await post(store, request(project, body=b"{} "))
    assert await count(store, Job) == 1


async def test_a_failure_is_not_kept(store: Store, project: str):
    async def fail() -> None:
        async with store.write() as session:
            assert await idempotency.begin(session, request(project)) is None
            await idempotency.finish(session, request(project), Answer(201, {}))
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    assert await count(store, IdempotencyKey) == 0
    assert (await post(store, request(project))).status == 201


async def test_twins_make_one_thing(store: Store, project: str):
    """On Postgres a twin may be refused while the first is answered; on SQLite it waits."""
    answers = await asyncio.gather(*(post(store, request(project)) for _ in range(8)), return_exceptions=True)
    made = [answer for answer in answers if isinstance(answer, Answer)]
    assert made
    assert all(answer == made[0] for answer in made)
    assert all(isinstance(answer, Answer | RequestInFlight) for answer in answers)
    assert await count(store, Job) == 1


async def test_a_twin_in_flight_is_refused_on_postgres(emptied_postgres):
    store = Store.open(emptied_postgres())
    try:
        async with store.write() as session:
            assert await idempotency.begin(session, request("proj")) is None
            with pytest.raises(RequestInFlight) as refusal:
                await post(store, request("proj"))
            assert refusal.value.retryable
    finally:
        await store.close()


async def test_an_answer_is_kept_for_a_day(store: Store, project: str):
    first = await post(store, request(project))
    for age, again in ((timedelta(hours=23), True), (timedelta(hours=25), False)):
        async with store.write() as session:
            now = (await session.scalars(select(func.max(Job.created_at)))).one()
            await session.execute(update(IdempotencyKey).values(created_at=now - age))
        assert (await post(store, request(project)) == first) is again


async def test_old_answers_are_purged(store: Store, project: str):
    await post(store, request(project))
    async with store.write() as session:
        await idempotency.purge(session)
    assert await count(store, IdempotencyKey) == 1
    async with store.write() as session:
        now = (await session.scalars(select(func.max(Job.created_at)))).one()
        await session.execute(update(IdempotencyKey).values(created_at=now - timedelta(hours=25)))
        await idempotency.purge(session)
    assert await count(store, IdempotencyKey) == 0


async def test_parts_of_a_fingerprint_do_not_run_together():
    assert fingerprint(b"ab", b"c") != fingerprint(b"a", b"bc")
