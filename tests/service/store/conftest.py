"""A store on each kind of database, and two projects in it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from service.store import keys
from service.store.session import Store


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    store = Store.open(database_url)
    yield store
    await store.close()


@pytest.fixture
async def project(store: Store) -> str:
    async with store.write() as session:
        return (await keys.ensure_project(session, "ours")).id


@pytest.fixture
async def stranger(store: Store) -> str:
    """Another project, whose every look at ours finds nothing."""
    async with store.write() as session:
        return (await keys.ensure_project(session, "theirs")).id
