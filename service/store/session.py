"""How to the database: one transaction per unit of work, committed at its edge.

SQLite: write-ahead log; a unit that writes begins with `BEGIN IMMEDIATE`, since a read that turns into a
write fails at once, whatever the timeout. Writers of one process wait in order for its one connection that
writes; processes wait for each other, for the busy timeout. Postgres: psycopg, READ COMMITTED.
A `Store` belongs to one event loop and is opened after any fork.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import URL, Engine, event, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.ext.asyncio import async_sessionmaker as sessionmaker

from ppo_engine.events import finite

BUSY_TIMEOUT_MS = 15_000
POOL_TIMEOUT = 30.0
SILENT_MS = 15_000
"""A transaction in which so long nothing was asked is ended by Postgres: its process may be frozen, and would
hold a job's row for ever."""

_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
}


class Store:
    """The database of a service or a worker."""

    def __init__(self, reader: AsyncEngine, writer: AsyncEngine) -> None:
        self._engines = {reader, writer}
        self._readers = sessionmaker(reader, expire_on_commit=False)
        self._writers = sessionmaker(writer, expire_on_commit=False)

    @classmethod
    def open(cls, url: str) -> Store:
        """A store on `sqlite:///path` or `postgresql://…`. It connects when it is first used."""
        if driver_url(url).get_backend_name() == "sqlite":
            writer = _sqlite(url, "BEGIN IMMEDIATE", pool_size=1, max_overflow=0)
            return cls(_sqlite(url, "BEGIN", "query_only = ON"), writer)
        silent: Any = {"options": f"-c idle_in_transaction_session_timeout={SILENT_MS}"}
        engine = _engine(url, pool_size=5, max_overflow=10, pool_pre_ping=True, connect_args=silent)
        return cls(engine.execution_options(postgresql_readonly=True), engine)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A unit of work that only reads, from one snapshot on SQLite; nothing of it is kept."""
        async with self._readers() as session:
            yield session

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """A unit of work: committed when the body ends, rolled back when it raises."""
        async with self._writers() as session, session.begin():
            yield session

    async def ping(self) -> None:
        """Ask the database for nothing; raises what it raises when it does not answer."""
        async with self.read() as session:
            await session.execute(text("SELECT 1"))

    async def close(self) -> None:
        for engine in self._engines:
            await engine.dispose()


def driver_url(url: str) -> URL:
    """The URL of a database, with the driver that is used for it."""
    given = make_url(url)
    driver = _DRIVERS.get(given.drivername.partition("+")[0])
    if driver is None:
        raise ValueError(f"{given!r} is no database known here; give sqlite:///path or postgresql://…")
    return given.set(drivername=driver)


def dump_json(value: Any) -> str:
    """JSON that every database takes: non-finite numbers as text, beyond ASCII escaped."""
    return json.dumps(finite(value), allow_nan=False, separators=(",", ":"))


def _engine(url: str, **options: Any) -> AsyncEngine:
    return create_async_engine(
        driver_url(url), json_serializer=dump_json, pool_timeout=POOL_TIMEOUT, **options
    )


def _sqlite(url: str, begin: str, *pragmas: str, **options: Any) -> AsyncEngine:
    engine = _engine(url, **options)
    listen_sqlite(engine.sync_engine, begin, *pragmas)
    return engine


def listen_sqlite(engine: Engine, begin: str, *pragmas: str) -> None:
    """Set up every new connection, and begin every transaction, of an engine on SQLite.

    A commit is on the disk when it returns. The driver begins no transactions of its own.
    """
    set_up = (f"busy_timeout = {BUSY_TIMEOUT_MS}", "synchronous = FULL", "foreign_keys = ON", *pragmas)

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        _log_ahead(cursor)
        for pragma in set_up:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def on_begin(connection: Any) -> None:
        connection.exec_driver_sql(begin)


def _log_ahead(cursor: Any) -> None:
    """Switch a database to the write-ahead log, which its file keeps.

    Of several that do so with a new file, SQLite refuses all but one without a wait: they try again.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except Exception as error:  # each driver, and SQLAlchemy's shell around it, has a class of its own
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
