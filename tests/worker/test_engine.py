"""Workers and the real engine: one process and several; a run that changes hands ends as if it had not."""

from __future__ import annotations

import io
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.engine import tiny
from tests.worker.fleet import Fleet

pytestmark = pytest.mark.anyio

PROMPTS = b"".join(b'{"prompt": "%s two"}\n' % word.encode() for word in tiny.WORDS[6:])

SPEC: dict[str, Any] = {
    "model": {"type": "local", "path": "llama"},
    "method": {"type": "lora", "r": 2},
    "rewards": [{"name": "seven", "type": "regex", "pattern": "seven"}],
    "ppo": {
        "total_episodes": 8 * 12,
        "per_device_train_batch_size": 8,
        "response_length": 6,
        "learning_rate": 1e-2,
        "save_steps": 1,
    },
}
ENDLESS = {**SPEC, "ppo": {**SPEC["ppo"], "total_episodes": 8 * 10_000}}
REAL = (sys.executable, "-m", "ppo_engine")


@pytest.fixture
async def fleet(embedded: Fleet, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny.save(tiny.policy(), tiny.tokenizer(), embedded.settings.model_roots[0] / "llama")
    embedded.prompts = PROMPTS
    return embedded


async def adapter(fleet: Fleet, job_id: str, directory: Path) -> dict[str, bytes]:
    """The weights in a job's archive."""
    [*_, archive] = await fleet.artifacts(job_id, "archive")
    with tarfile.open(fileobj=io.BytesIO(await fleet.content(archive, "export.tar"))) as tar:
        tar.extractall(directory, filter="data")
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


async def test_a_run_that_changes_hands_ends_as_one_that_did_not(fleet: Fleet, tmp_path: Path) -> None:
    whole = await fleet.submit(SPEC)
    await fleet.work(engine_command=REAL)
    expected = await adapter(fleet, whole, tmp_path / "whole")
    assert list(expected) == ["adapter_model.safetensors"]

    cut = await fleet.submit(SPEC)
    leaving = threading.Event()
    async with fleet.working(engine_command=REAL, leaving=leaving.is_set):
        await fleet.has_checkpoint(cut, 3)
        leaving.set()
    left = await fleet.job(cut)
    assert (left.state, left.attempt) == ("queued", 1)
    assert left.update < 12, "it was stopped on its way"
    await fleet.work(engine_command=REAL)

    job = await fleet.job(cut)
    assert (job.state, job.attempt, job.update) == ("succeeded", 2, 12), await fleet.log(cut)
    assert await adapter(fleet, cut, tmp_path / "cut") == expected
    metrics = [event.data for event in await fleet.events(cut, "metrics")]
    assert [row["objective/scores"] for row in metrics] == [
        event.data["objective/scores"] for event in await fleet.events(whole, "metrics")
    ]


@pytest.mark.parametrize("zero_stage", [0, 2])
async def test_several_processes_run_a_job_and_are_stopped_together(fleet: Fleet, zero_stage: int) -> None:
    job_id = await fleet.submit({**ENDLESS, "resources": {"gpus": 2, "zero_stage": zero_stage}})
    async with fleet.working(engine_command=REAL):
        await fleet.gets_to(job_id, 2)
        ranks = [process for process in fleet.engines() if "ppo_engine" in process.cmdline()]
        assert len(ranks) >= 3, "guard, launcher, and two ranks"
        await fleet.wish(job_id, "cancel")

    job = await fleet.job(job_id)
    assert job.state == "cancelled", await fleet.log(job_id)
    [*_, last] = await fleet.artifacts(job_id, "archive")
    assert last.update == job.update, "the ranks stopped by themselves, and saved"
    assert (job.plan or {})["world_size"] == 2
    fleet.no_engine_left()


async def test_what_only_the_engine_can_know_fails_the_job(fleet: Fleet) -> None:
    fleet.prompts = b'{"prompt": "%s"}\n' % b" ".join([b"one"] * 64) * 8
    job_id = await fleet.submit(SPEC)
    await fleet.work(engine_command=REAL)
    job = await fleet.job(job_id)
    assert (job.state, job.error_code) == ("failed", "invalid_spec")
    assert "prompt" in (job.error_message or "")
    assert job.error_issues
