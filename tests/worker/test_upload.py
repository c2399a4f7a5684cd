"""What goes to storage, once, and only when it is what it says."""

from __future__ import annotations

import asyncio
import errno
import json
from pathlib import Path
from typing import Any, get_args

import pytest
from obstore.exceptions import GenericError
from pydantic import JsonValue

from ppo_engine.run_dir import MANIFEST, Acks, RunDir, describe, write_atomic
from service.storage import Storage
from service.store import transitions
from service.store.models import Artifact, ArtifactKind
from service.store.transitions import Fence, FenceLost
from tests.worker.fleet import Fleet
from tests.worker.waiting import eventually
from worker.outage import Patience, persist
from worker.upload import LOG_BYTES, Damaged, Uploads

pytestmark = pytest.mark.anyio

KINDS: tuple[ArtifactKind, ...] = get_args(ArtifactKind)


@pytest.fixture
async def fence(embedded: Fleet) -> Fence:
    """A job that this test has claimed."""
    await embedded.submit(bell=False)
    async with embedded.store.write() as session:
        claim = await transitions.claim(session, worker="here", queue=embedded.settings.queue)
    assert claim is not None
    return claim.fence


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    ask_for(run_dir)
    return run_dir


def ask_for(run_dir: RunDir, **ppo: Any) -> None:
    """Lay down a spec with these hyperparameters."""
    spec = {
        "model": {"type": "local", "path": "a-model"},
        "prompts": {"train": "file_1"},
        "rewards": [{"type": "length", "name": "short", "target": 5}],
        "ppo": ppo,
    }
    run_dir.spec.write_text(json.dumps(spec))


def make(
    directory: Path, update: int, content: str = "{}", metrics: dict[str, JsonValue] | None = None
) -> None:
    directory.mkdir(parents=True)
    (directory / "state.json").write_text(content)
    manifest = describe(directory, update, metrics or {})
    write_atomic(directory / MANIFEST, manifest.model_dump_json().encode())


async def nothing_said() -> None:
    """For an engine that says nothing."""


async def test_everything_is_uploaded_once_and_acknowledged(
    embedded: Fleet, fence: Fence, run_dir: RunDir
) -> None:
    uploads = Uploads(embedded.store, embedded.storage, fence, run_dir, nothing_said, safe=[2])
    running = asyncio.create_task(uploads.run(poll=0.01))
    make(run_dir.checkpoint(2), 2)
    make(run_dir.checkpoint(4), 4)
    make(run_dir.export(4), 4)
    run_dir.log.write_text("a line\n")
    await uploads.finish()
    running.cancel()
    made = [await embedded.artifacts(fence.job_id, kind) for kind in KINDS]
    assert [[artifact.update for artifact in kind] for kind in made] == [[4], [4], [0], [4]]
    acks = run_dir.read_acks()
    assert acks is not None
    assert acks.checkpoints == (2, 4), "the one it began with is safe, too, and is not uploaded again"


async def test_a_checkpoint_is_known_only_once_what_was_said_before_it_is(
    embedded: Fleet, fence: Fence, run_dir: RunDir
) -> None:
    known: list[list[Artifact]] = []

    async def catch_up() -> None:
        known.append(await embedded.artifacts(fence.job_id, "checkpoint"))

    make(run_dir.checkpoint(2), 2)
    await Uploads(embedded.store, embedded.storage, fence, run_dir, catch_up).finish()
    assert known == [[]]
    assert len(await embedded.artifacts(fence.job_id, "checkpoint")) == 1


@pytest.mark.parametrize(
    ("ppo", "expected"),
    [
        ({}, [6, 8]),
        ({"save_total_limit": 1, "metric_for_best_model": "objective/scores"}, [4, 8]),
        ({"save_total_limit": 1, "metric_for_best_model": "objective/kl"}, [2, 8]),
        ({"save_total_limit": None}, [2, 4, 6, 8]),
    ],
)
async def test_storage_keeps_the_checkpoints_that_the_spec_asks_for(
    embedded: Fleet, fence: Fence, run_dir: RunDir, ppo: dict[str, Any], expected: list[int]
) -> None:
    ask_for(run_dir, **ppo)
    scores = {2: 0.1, 4: 0.9, 6: 0.5, 8: 0.6}
    for update, score in scores.items():
        metrics: dict[str, JsonValue] = {"objective/scores": score, "objective/kl": score}
        make(run_dir.checkpoint(update), update, metrics=metrics)
    await Uploads(embedded.store, embedded.storage, fence, run_dir, nothing_said).finish()

    staying = await embedded.artifacts(fence.job_id, "checkpoint")
    assert sorted(artifact.update for artifact in staying) == expected
    for update in scores:
        key = f"jobs/{fence.job_id}/a1/update-{update}/checkpoint/state.json"
        if update in expected:
            assert await embedded.storage.size(key) == 2
        else:
            with pytest.raises(FileNotFoundError):
                await embedded.storage.size(key)


async def test_what_is_safe_is_not_uploaded_again(embedded: Fleet, fence: Fence, run_dir: RunDir) -> None:
    async def exports(count: int) -> list[str]:
        async def look() -> list[Artifact]:
            found = await embedded.artifacts(fence.job_id, "export")
            return found if len(found) == count else []

        return [artifact.id for artifact in await eventually(look, f"{count} exports are known")]

    uploads = Uploads(embedded.store, embedded.storage, fence, run_dir, nothing_said)
    running = asyncio.create_task(uploads.run(poll=0.01))
    make(run_dir.export(2), 2)
    first = await exports(1)
    make(run_dir.export(4), 4)
    assert (await exports(2))[:1] == first
    running.cancel()


async def test_what_has_no_manifest_is_not_there_yet(embedded: Fleet, fence: Fence, run_dir: RunDir) -> None:
    make(run_dir.checkpoint(2), 2)
    (run_dir.checkpoint(2) / MANIFEST).unlink()
    await Uploads(embedded.store, embedded.storage, fence, run_dir, nothing_said).finish()
    assert await embedded.artifacts(fence.job_id, "checkpoint") == []


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
async def test_a_file_that_is_not_what_its_manifest_says_is_never_known(
    embedded: Fleet, fence: Fence, run_dir: RunDir, kind: str
) -> None:
    directory: Path = getattr(run_dir, kind)(2)
    make(directory, 2, json.dumps({"state": 1}))
    (directory / "state.json").write_text(json.dumps({"state": 2}))
    with pytest.raises(Damaged, match=r"state\.json does not have the sha256"):
        await Uploads(embedded.store, embedded.storage, fence, run_dir, nothing_said).finish()
    assert await embedded.artifacts(fence.job_id, "checkpoint") == []
    assert await embedded.artifacts(fence.job_id, "export") == []


async def test_of_a_very_long_log_the_end_is_kept(embedded: Fleet, fence: Fence, run_dir: RunDir) -> None:
    run_dir.log.write_bytes(b"x" * LOG_BYTES + b"the end")
    await Uploads(embedded.store, embedded.storage, fence, run_dir, nothing_said).finish()
    [log] = await embedded.artifacts(fence.job_id, "log")
    assert log.files[0]["size"] == LOG_BYTES
    assert (await embedded.log(fence.job_id)).endswith("xthe end")


async def test_without_the_fence_nothing_becomes_known(
    embedded: Fleet, fence: Fence, run_dir: RunDir
) -> None:
    make(run_dir.checkpoint(2), 2)
    await embedded.take_away(fence.job_id)
    with pytest.raises(FenceLost):
        await Uploads(embedded.store, embedded.storage, fence, run_dir, nothing_said).finish()
    assert await embedded.artifacts(fence.job_id, "checkpoint") == []
    assert run_dir.read_acks() is None


class FullDisk(RunDir):
    """Has no room for acks, so many times."""

    refusals = 1

    def write_acks(self, acks: Acks) -> None:
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.ENOSPC, "no room")
        super().write_acks(acks)


class Reluctant(Storage):
    """Deletes nothing, so many times."""

    refusals = 1

    async def delete_prefix(self, prefix: str) -> None:
        if self.refusals:
            self.refusals -= 1
            raise GenericError("not now")
        await super().delete_prefix(prefix)


async def test_what_failed_after_a_checkpoint_was_known_is_made_up_for(
    embedded: Fleet, fence: Fence, tmp_path: Path
) -> None:
    run_dir = FullDisk(tmp_path / "run")
    run_dir.path.mkdir()
    ask_for(run_dir)
    storage = Reluctant.open(embedded.settings.storage_url)
    uploads = Uploads(embedded.store, storage, fence, run_dir, nothing_said)
    for update in (2, 4, 6):
        make(run_dir.checkpoint(update), update)
    await persist(uploads.finish, Patience(60.0))

    acks = run_dir.read_acks()
    assert acks is not None
    assert acks.checkpoints == (2, 4, 6)
    kept = (embedded.settings.data_dir / "storage").rglob("state.json")
    assert {path.parent.parent.name for path in kept} == {"update-4", "update-6"}
    assert run_dir.refusals == storage.refusals == 0
