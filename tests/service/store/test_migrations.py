"""The schema: what the revisions build is what the models say, on both databases."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect

from service import migrate
from service.store.models import Base


@pytest.fixture(params=["sqlite", "postgres"])
def own_url(request: pytest.FixtureRequest) -> str:
    """A database whose schema a test may break."""
    make: Callable[[], str] = request.getfixturevalue(f"new_{request.param}")
    return make()


def differences(connection: Connection) -> list[object]:
    options = {"compare_type": True, "compare_server_default": True}
    return compare_metadata(MigrationContext.configure(connection, opts=options), Base.metadata)


def test_the_revisions_give_the_schema_of_the_models(database_url: str):
    with migrate.locked(database_url) as connection:
        assert differences(connection) == []


def test_a_missing_index_is_seen(own_url: str):
    with migrate.locked(own_url) as connection:
        connection.exec_driver_sql("DROP INDEX ix_jobs_state_lease_until")
        assert differences(connection) != []


def test_cascades_are_in_the_database(database_url: str):
    """Alembic does not compare what happens at a delete."""
    with migrate.locked(database_url) as connection:
        inspector = inspect(connection)
        found = {
            (table, key["constrained_columns"][0]): key["options"].get("ondelete")
            for table in inspector.get_table_names()
            for key in inspector.get_foreign_keys(table)
        }
    said = {
        (table.name, key.parent.name): key.ondelete
        for table in Base.metadata.tables.values()
        for key in table.foreign_keys
    }
    assert found == said


def test_upgrading_again_changes_nothing(database_url: str):
    assert not migrate.pending(database_url)
    migrate.upgrade(database_url)
    assert not migrate.pending(database_url)


def test_the_way_back_leaves_nothing(own_url: str):
    with migrate.locked(own_url) as connection:
        command.downgrade(migrate.config(connection), "base")
    assert migrate.pending(own_url)
    with migrate.locked(own_url) as connection:
        assert inspect(connection).get_table_names() == ["alembic_version"]


def test_several_at_once_do_it_once(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/new/proxima.db"
    failures: list[BaseException] = []

    def run() -> None:
        try:
            migrate.upgrade(url)
        except BaseException as error:  # told to the main thread
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (failures, migrate.pending(url)) == ([], False)
