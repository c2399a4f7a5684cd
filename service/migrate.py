"""Brings the database's schema up to date: `python -m service.migrate`.

Several at once do it one after another. `python -m service.migrate --new "what changes"` writes the next
revision from the difference between the models and an up-to-date database.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, NullPool, create_engine, func, select

from service.settings import Settings, of_environment
from service.store.session import driver_url, listen_sqlite

_MIGRATION_LOCK = 0x7072_6F78_6D69  # any number, of Postgres' advisory locks


def upgrade(url: str) -> None:
    """Apply every revision that the database does not have yet: all of them, or none."""
    with locked(url) as connection:
        command.upgrade(config(connection), "head")


def pending(url: str) -> bool:
    """Whether the schema is older, or newer, than this code."""
    with locked(url) as connection:
        heads = ScriptDirectory.from_config(config(connection)).get_heads()
        return set(MigrationContext.configure(connection).get_current_heads()) != set(heads)


@contextmanager
def locked(url: str) -> Iterator[Connection]:
    """A transaction that no other migration runs beside."""
    database = driver_url(url)
    if database.get_backend_name() == "sqlite":
        Path(database.database or "").parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(database.set(drivername="sqlite"), poolclass=NullPool)
        listen_sqlite(engine, "BEGIN IMMEDIATE")
    else:
        engine = create_engine(database, poolclass=NullPool)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(select(func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        yield connection


def config(connection: Connection) -> Config:
    """What Alembic's commands work by; there is no alembic.ini."""
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", "service:migrations")
    config.set_main_option("path_separator", "os")
    return config


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m service.migrate", description=__doc__)
    parser.add_argument("--new", metavar="MESSAGE", help="write a new revision instead")
    message = parser.parse_args().new
    url = of_environment(Settings).database_url
    if message is None:
        upgrade(url)
        return
    with locked(url) as connection:
        command.revision(config(connection), message, autogenerate=True)


if __name__ == "__main__":
    main()
