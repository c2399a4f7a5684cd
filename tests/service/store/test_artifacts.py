"""Artifacts: recorded with their event, read newest first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from sqlalchemy import event

from ppo_engine.run_dir import ManifestFile
from service.store import artifacts, transitions
from service.store.models import Artifact, ArtifactKind
from service.store.session import Store
from service.store.transitions import Fence
from tests.service.store.making import claim, history, running

pytestmark = pytest.mark.anyio

FILES = [
    ManifestFile(name="adapter_model.safetensors", size=2**33, sha256="ab" * 32),
    ManifestFile(name="adapter_config.json", size=100, sha256="cd" * 32),
]


async def record(
    store: Store, fence: Fence, kind: ArtifactKind, update: int, files: list[ManifestFile] = FILES
) -> None:
    async with store.write() as session:
        prefix = f"jobs/{fence.job_id}/a{fence.attempt}/update-{update}/{kind}/"
        await artifacts.record(session, fence, kind, update, files, prefix, {"reward": float("nan")})


async def test_an_artifact_comes_with_its_event(store: Store, project: str):
    fence = await running(store, project)
    await record(store, fence, "export", 3)
    async with store.read() as session:
        found = await artifacts.get(session, project, fence.job_id, "export", 3)
    assert found is not None
    assert (found.kind, found.update, found.attempt) == ("export", 3, 1)
    assert found.key_prefix == f"jobs/{fence.job_id}/a1/update-3/export/"
    assert found.files == [file.model_dump() for file in FILES]
    assert found.metrics == {"reward": "NaN"}
    said = (await history(store, fence.job_id))[-1]
    assert (said.type, said.key, said.update) == ("artifact", "artifact:export:a1:3", 3)
    assert said.data == {"kind": "export", "update": 3, "bytes": 2**33 + 100}


async def test_recorded_again_it_is_replaced_without_a_word(store: Store, project: str):
    fence = await running(store, project)
    await record(store, fence, "log", 0)
    before = len(await history(store, fence.job_id))
    longer = [ManifestFile(name="engine.log", size=7, sha256="ef" * 32)]
    await record(store, fence, "log", 0, longer)
    async with store.read() as session:
        log = await artifacts.latest(session, project, fence.job_id, "log")
    assert log is not None
    assert log.files == [longer[0].model_dump()]
    assert len(await history(store, fence.job_id)) == before


async def test_of_each_update_the_newest_attempt_is_listed(store: Store, project: str):
    first = await running(store, project)
    for update in (10, 20, 30):
        await record(store, first, "export", update)
    await record(store, first, "checkpoint", 20)
    async with store.write() as session:
        await transitions.requeue(session, first, "lost", spend_attempt=True)
    second = (await claim(store, "w2")).fence
    await record(store, second, "export", 30)
    await record(store, second, "export", 40)
    async with store.read() as session:
        listed = (await artifacts.page(session, project, first.job_id, "export")).data
        latest = await artifacts.latest(session, project, first.job_id, "export")
        at_30 = await artifacts.get(session, project, first.job_id, "export", 30)
        nowhere = await artifacts.get(session, project, first.job_id, "export", 11)
    assert [(found.update, found.attempt) for found in listed] == [(10, 1), (20, 1), (30, 2), (40, 2)]
    assert latest is not None
    assert at_30 is not None
    assert (latest.update, at_30.attempt, nowhere) == (40, 2, None)


async def test_pages_load_no_more_than_they_show(store: Store, project: str):
    fence = await running(store, project)
    for update in range(10):
        await record(store, fence, "export", update)
    async with store.write() as session:
        await transitions.requeue(session, fence, "lost", spend_attempt=True)
    fence = (await claim(store, "w2")).fence
    for update in (3, 5, 9):
        await record(store, fence, "export", update)
    loaded: list[Artifact] = []
    seen, after, has_more = [], -1, True
    while has_more:
        loaded.clear()
        async with store.read() as session:
            event.listen(session.sync_session, "loaded_as_persistent", lambda _, row: loaded.append(row))
            page = await artifacts.page(session, project, fence.job_id, "export", after, limit=3)
        assert len(loaded) <= 4  # one more tells whether there are more
        seen += [(found.update, found.attempt) for found in page.data]
        after, has_more = seen[-1][0], page.has_more
    assert seen == [(update, 2 if update in (3, 5, 9) else 1) for update in range(10)]


async def test_what_is_not_kept_is_forgotten_by_kind(store: Store, project: str):
    fence = await running(store, project)
    for update in (10, 20, 30):
        await record(store, fence, "checkpoint", update)
        await record(store, fence, "export", update)
    told: list[Mapping[int, Mapping[str, Any]]] = []

    def kept(metrics: Mapping[int, Mapping[str, Any]]) -> set[int]:
        told.append(metrics)
        return {10, 30}

    async with store.write() as session:
        old = await artifacts.forget_others(session, fence, "checkpoint", kept)
    assert [artifact.key_prefix for artifact in old] == [f"jobs/{fence.job_id}/a1/update-20/checkpoint/"]
    assert [set(metrics) for metrics in told] == [{10, 20, 30}]
    async with store.read() as session:
        staying = (await artifacts.page(session, project, fence.job_id, "checkpoint")).data
        exports = (await artifacts.page(session, project, fence.job_id, "export")).data
    assert [artifact.update for artifact in staying] == [10, 30]
    assert len(exports) == 3


async def test_a_stranger_sees_none(store: Store, project: str, stranger: str):
    fence = await running(store, project)
    await record(store, fence, "export", 1)
    async with store.read() as session:
        assert (await artifacts.page(session, stranger, fence.job_id, "export")).data == []
        assert await artifacts.latest(session, stranger, fence.job_id, "export") is None
        assert await artifacts.get(session, stranger, fence.job_id, "export", 1) is None
