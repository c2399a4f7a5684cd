"""The database or the storage goes away while a job runs: nothing is lost, and no attempt is spent."""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import make_url

from service.store.session import Store
from tests.worker.fleet import SHORT_LEASE, Fleet
from tests.worker.proxy import Proxy, proxy
from tests.worker.stand_in import chain

pytestmark = [
    pytest.mark.anyio,
    # A connection that was cut cannot be closed, only forgotten.
    pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning"),
]

ENDLESS = ("--updates", 1_000_000, "--seconds", 0.05)


@asynccontextmanager
async def far_away(fleet: Fleet) -> AsyncIterator[tuple[Store, Proxy]]:
    """The fleet's database, by a way that can be cut."""
    url = make_url(fleet.settings.database_url)
    async with proxy(url.host or "", url.port or 5432) as way:
        far = url.set(host="127.0.0.1", port=way.port)
        store = Store.open(far.render_as_string(hide_password=False))
        try:
            yield store, way
        finally:
            await store.close()
            gc.collect()  # what is forgotten is forgotten here, where it is no error


async def test_a_short_outage_of_the_database_changes_nothing(production: Fleet) -> None:
    job_id = await production.submit()
    async with (
        far_away(production) as (store, way),
        production.working("--updates", 60, "--save-every", 60, "--seconds", 0.05, store=store),
    ):
        await production.gets_to(job_id, 3)
        await way.cut()
        at = await production.said_on_disk(job_id, beyond=(await production.job(job_id)).update + 5)
        assert (await production.job(job_id)).update < at, "nothing reaches the database"
        way.join()

    job = await production.job(job_id)
    assert (job.state, job.attempt) == ("succeeded", 1)
    metrics = [event.update for event in await production.events(job_id, "metrics")]
    assert metrics == list(range(1, 61)), "what was said meanwhile came later"


async def test_a_long_outage_of_the_database_makes_the_engine_save_and_stop(production: Fleet) -> None:
    job_id = await production.submit()
    async with (
        far_away(production) as (store, way),
        production.working(*ENDLESS, store=store, kill_grace_seconds=0.2, lease_seconds=SHORT_LEASE),
    ):
        await production.gets_to(job_id, 3)
        await way.cut()
        await production.engine_ended()
        way.join()
        await production.gets_to(job_id, 1, attempt=2)
        await production.wish(job_id, "cancel")

    states = [
        (event.data["state"], event.data.get("reason")) for event in await production.events(job_id, "state")
    ]
    assert states[2:] == [("queued", "database"), ("running", None), ("cancelled", None)]
    first = [event for event in await production.events(job_id, "metrics") if event.attempt == 1]
    [rewound] = await production.events(job_id, "rewound")
    assert rewound.data["to"] == first[-1].update, (
        "saved in time, stored after the outage, and nothing done twice"
    )


async def test_an_engine_that_hangs_is_ended_while_the_lease_still_holds(production: Fleet) -> None:
    """By the worker, which asks first: the guard, which looks at the lease alone, would come later."""
    job_id = await production.submit()
    async with (
        far_away(production) as (store, way),
        production.working("--hang-at", 3, store=store, kill_grace_seconds=0.5, lease_seconds=SHORT_LEASE),
    ):
        await production.gets_to(job_id, 3)
        await way.cut()
        await production.engine_ended()
        way.join()
        await production.begins(job_id, attempt=2)
        await production.take_away(job_id)
    assert "was sent SIGTERM" in await production.log(job_id, attempt=1)


async def test_without_the_database_nothing_is_claimed_and_nothing_breaks(production: Fleet) -> None:
    job_id = await production.submit()
    async with far_away(production) as (store, way):
        await way.cut()
        await production.work(store=store)
        way.join()
        await production.work("--updates", 1, store=store)
    assert (await production.job(job_id)).state == "succeeded"


@contextmanager
def storage_away(fleet: Fleet) -> Iterator[None]:
    """Nothing can be stored: where the directory was, there is a file."""
    place = fleet.settings.data_dir / "storage"
    aside = place.with_name("aside")
    aside.touch()
    exchange(place, aside)
    yield
    exchange(place, aside)


def exchange(one: Path, other: Path) -> None:
    """Let two paths change places in one stroke: a moment in which there is nothing would be no outage."""
    at_here, rename_exchange = -100, 2
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(at_here, bytes(one), at_here, bytes(other), rename_exchange) != 0:
        raise OSError(ctypes.get_errno(), f"{one} and {other} cannot change places")


async def test_an_outage_of_the_storage_delays_the_end_and_no_more(embedded: Fleet) -> None:
    job_id = await embedded.submit()
    async with embedded.working("--updates", 8, "--save-every", 4, "--seconds", 0.05):
        await embedded.gets_to(job_id, 1)
        with storage_away(embedded):
            await embedded.gets_to(job_id, 8)
            assert (await embedded.job(job_id)).state == "running", "not before the policy is safe"

    job = await embedded.job(job_id)
    assert (job.state, job.attempt) == ("succeeded", 1)
    [*_, last] = await embedded.artifacts(job_id, "export")
    assert json.loads(await embedded.content(last, "adapter.json"))["state"] == chain(8)


async def test_leaving_does_not_wait_for_the_storage_for_ever(embedded: Fleet) -> None:
    job_id = await embedded.submit()
    leaving: list[bool] = []
    settings = {"stop_grace_seconds": 1.0, "leaving": lambda: bool(leaving)}
    async with embedded.working(*ENDLESS, **settings):
        await embedded.gets_to(job_id, 3)
        with storage_away(embedded):
            leaving.append(True)
            await embedded.attempts_over()
    job = await embedded.job(job_id)
    assert (job.state, job.attempt, job.stalled_attempts) == ("queued", 1, 0)


async def test_a_job_whose_prompts_cannot_be_had_waits_for_them(embedded: Fleet) -> None:
    job_id = await embedded.submit()
    async with embedded.working("--updates", 1):
        with storage_away(embedded):
            await embedded.reaches(job_id, "running")
    assert (await embedded.job(job_id)).state == "succeeded"


async def paused_with(embedded: Fleet, damage: Callable[[Path], object]) -> tuple[str, list[int]]:
    """A paused job, and the updates of its two checkpoints, of which the newer one is damaged in storage."""
    job_id = await embedded.submit()
    async with embedded.working(*ENDLESS):
        await embedded.has_checkpoint(job_id, 4)
        await embedded.wish(job_id, "pause")
    checkpoints = await embedded.artifacts(job_id, "checkpoint")
    damage(embedded.settings.data_dir / "storage" / checkpoints[-1].key_prefix / "state.json")
    await embedded.wish(job_id, "run")
    return job_id, [checkpoint.update for checkpoint in checkpoints]


@pytest.mark.parametrize(
    "damage", [lambda file: file.write_text("{}"), Path.unlink], ids=["other", "missing"]
)
async def test_of_a_damaged_checkpoint_the_one_before_it_is_resumed_from(
    embedded: Fleet, damage: Callable[[Path], object]
) -> None:
    job_id, (older, newer) = await paused_with(embedded, damage)
    await embedded.work("--updates", newer + 2, "--save-every", 2)

    job = await embedded.job(job_id)
    assert (job.state, job.attempt) == ("succeeded", 2)
    assert [event.data["to"] for event in await embedded.events(job_id, "rewound")] == [older]
    [warning] = await embedded.events(job_id, "warning")
    assert warning.data["code"] == "damaged_checkpoint"
    assert f"update {newer} " in str(warning.data["message"])
    kept = await embedded.artifacts(job_id, "checkpoint")
    assert {checkpoint.attempt for checkpoint in kept} == {2}, "what was made again is safe again"
    [*_, last] = await embedded.artifacts(job_id, "export")
    assert json.loads(await embedded.content(last, "adapter.json"))["state"] == chain(newer + 2)


async def test_without_a_whole_checkpoint_a_job_begins_anew(embedded: Fleet) -> None:
    job_id, _ = await paused_with(embedded, lambda file: [each.unlink() for each in every_state(file)])
    await embedded.work("--updates", 3)

    assert (await embedded.job(job_id)).state == "succeeded"
    assert await embedded.events(job_id, "rewound") == []
    assert len(await embedded.events(job_id, "warning")) == 2


def every_state(file: Path) -> list[Path]:
    """The state of every checkpoint of the job whose one is given."""
    return list(file.parents[3].rglob("checkpoint/state.json"))


async def test_leaving_does_not_wait_for_the_database_for_ever(production: Fleet) -> None:
    job_id = await production.submit()
    leaving: list[bool] = []
    async with far_away(production) as (store, way):
        async with production.working(
            *ENDLESS, store=store, stop_grace_seconds=1.0, leaving=lambda: bool(leaving)
        ):
            await production.gets_to(job_id, 3)
            await way.cut()
            leaving.append(True)
            await production.attempts_over()
        way.join()
    assert (await production.job(job_id)).state == "running", "until its lease is over"
    production.no_engine_left()
