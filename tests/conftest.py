"""Fixtures for all tests: empty, migrated databases on SQLite and Postgres, and a Redis database."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL, make_url

from service import migrate
from tests import servers

NewDatabase = Callable[[], str]
"""Makes an empty, migrated database; gives its URL."""


def pytest_configure() -> None:
    # What a shell runs in its background has SIGINT ignored, and all that the tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[URL]:
    with servers.postgres() as url:
        yield url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file, to be copied."""
    path = tmp_path_factory.mktemp("template") / "proxima.db"
    migrate.upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def new_sqlite(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> NewDatabase:
    def make() -> str:
        path = tmp_path_factory.mktemp("database") / "proxima.db"
        shutil.copy(sqlite_template, path)
        return f"sqlite:///{path}"

    return make


@pytest.fixture(scope="session")
def new_postgres(postgres_server: URL) -> Iterator[NewDatabase]:
    """Makes copies of a migrated database, and drops them all at the end."""
    made: list[str] = []

    def make() -> str:
        made.append(servers.new_name())
        template = f"TEMPLATE {made[0]}" if len(made) > 1 else ""
        servers.execute(postgres_server, f"CREATE DATABASE {made[-1]} {template}")
        return servers.dsn(postgres_server.set(database=made[-1]))

    migrate.upgrade(make())
    yield make
    for name in made:
        servers.execute(postgres_server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def emptied_postgres(new_postgres: NewDatabase) -> NewDatabase:
    """Gives the same database again and again, emptied: to make one takes a second."""
    url = new_postgres()

    def empty() -> str:
        # Everything else goes with the projects.
        servers.execute(make_url(url), "DELETE FROM projects; DELETE FROM deletions")
        return url

    return empty


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """An empty, migrated database of each kind, for one test."""
    fixture = {"sqlite": "new_sqlite", "postgres": "emptied_postgres"}[request.param]
    make: NewDatabase = request.getfixturevalue(fixture)
    return make()


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """An empty Redis database."""
    with servers.redis_database() as url:
        yield url
