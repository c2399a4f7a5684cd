"""The bytes of what was deleted, on a storage that is not always there."""

from __future__ import annotations

from pathlib import Path

import pytest
from obstore.exceptions import GenericError
from sqlalchemy import func, select, update

from service.storage import Storage
from service.store import deletions
from service.store.models import Deletion
from service.store.session import Store
from service.store.types import moment
from service.sweep import sweep
from tests.service.store.conftest import store as store  # a fixture

pytestmark = pytest.mark.anyio


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "storage"


@pytest.fixture
def storage(root: Path) -> Storage:
    return Storage.open(f"file://{root}")


async def put(storage: Storage, root: Path, *keys: str) -> None:
    source = root.parent / "source"
    source.write_bytes(b"content")
    for key in keys:
        await storage.put_file(key, source)


async def note(store: Store, *prefixes: str) -> None:
    async with store.write() as session:
        for prefix in prefixes:
            await deletions.note(session, prefix)


async def left(store: Store) -> int:
    async with store.read() as session:
        return await session.scalar(select(func.count()).select_from(Deletion)) or 0


async def a_while_goes_by(store: Store) -> None:
    async with store.write() as session:
        await session.execute(update(Deletion).values(due=moment(-1.0)))


async def test_what_is_due_is_deleted_and_nothing_else(store: Store, storage: Storage, root: Path):
    await put(storage, root, "jobs/a/a1/x/y", "jobs/a/a2/z", "jobs/ab/kept")
    await note(store, "jobs/a/", "files/never-was/")
    await sweep(store, storage)
    assert [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()] == ["jobs/ab/kept"]
    assert await left(store) == 0


async def test_what_storage_does_not_delete_comes_again_and_holds_up_nothing(
    store: Store, storage: Storage, root: Path, monkeypatch: pytest.MonkeyPatch
):
    await put(storage, root, "files/bad/p", "files/good/p")
    await note(store, "files/bad/")
    await note(store, "files/good/")
    delete = storage.delete_prefix

    async def stubborn(prefix: str) -> None:
        if prefix == "files/bad/":
            raise GenericError("no")
        await delete(prefix)

    monkeypatch.setattr(storage, "delete_prefix", stubborn)
    with pytest.raises(GenericError):
        await sweep(store, storage)
    await sweep(store, storage)
    assert [path.parent.name for path in root.rglob("p")] == ["bad"]
    monkeypatch.undo()
    await a_while_goes_by(store)
    await sweep(store, storage)
    assert not any(root.rglob("p"))
    assert await left(store) == 0
