"""A fleet of workers: embedded (SQLite, a broker in a directory), or as in production (Postgres, Redis)."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.storage import Storage
from service.store.session import Store
from tests.conftest import NewDatabase
from tests.worker.fleet import Fleet
from worker.settings import WorkerSettings


async def make_fleet(directory: Path, database_url: str, broker_url: str) -> Fleet:
    settings = WorkerSettings(
        data_dir=directory / "data",
        database_url=database_url,
        broker_url=broker_url,
        queue=f"queue-{secrets.token_hex(4)}",
        allow_cpu=True,
        lease_seconds=20.0,
        heartbeat_seconds=0.5,
        kill_grace_seconds=1.0,
    )
    store = Store.open(settings.database_url)
    fleet = Fleet(directory, settings, store, Storage.open(settings.storage_url))
    await fleet.found()
    return fleet


@pytest.fixture
async def embedded(tmp_path: Path, new_sqlite: NewDatabase) -> AsyncIterator[Fleet]:
    fleet = await make_fleet(tmp_path, new_sqlite(), "")
    yield fleet
    fleet.end()
    await fleet.store.close()


@pytest.fixture
async def production(tmp_path: Path, emptied_postgres: NewDatabase, redis_url: str) -> AsyncIterator[Fleet]:
    fleet = await make_fleet(tmp_path, emptied_postgres(), redis_url)
    yield fleet
    fleet.end()
    await fleet.store.close()


@pytest.fixture(params=["embedded", "production"])
def fleet(request: pytest.FixtureRequest) -> Fleet:
    found: Fleet = request.getfixturevalue(request.param)
    return found
