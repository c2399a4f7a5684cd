"""Models of the hub: taken from the machine's cache, checked like any other, and missed in plain words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ppo_engine.model_sources import HubModel
from ppo_engine.run_dir import RunDir
from tests.servers import free_port
from tests.worker.fleet import MODEL, SPEC, Fleet
from worker import hub
from worker.hub import Hub, ModelUnavailable

pytestmark = pytest.mark.anyio

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ON_HUB = {**SPEC, "model": {"type": "hub", "repo": "acme/tiny"}}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one model, and no way to the hub."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tmp_path / "home" / "hub" / "models--acme--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(MODEL))
    return tmp_path / "home"


async def test_a_model_of_the_hub_is_planned_with_its_facts(embedded: Fleet, cache: Path) -> None:
    job_id = await embedded.submit(ON_HUB)
    await embedded.work("--updates", 1)
    job = await embedded.job(job_id)
    assert job.state == "succeeded", await embedded.log(job_id)
    assert job.spec["model"]["revision"] == COMMIT  # with which a later attempt goes on, wherever main is


async def test_a_model_is_had_by_its_commit_wherever_main_has_gone(embedded: Fleet, cache: Path) -> None:
    job_id = await embedded.submit({**ON_HUB, "model": {**ON_HUB["model"], "revision": COMMIT}})
    (cache / "hub" / "models--acme--tiny" / "refs" / "main").write_text("f" * 40)
    await embedded.work("--updates", 1)
    assert (await embedded.job(job_id)).state == "succeeded", await embedded.log(job_id)


async def test_a_model_of_the_hub_that_breaks_a_rule_fails_the_job(embedded: Fleet, cache: Path) -> None:
    ppo: dict[str, Any] = {**SPEC["ppo"], "stop_token_id": 64}
    job_id = await embedded.submit({**ON_HUB, "ppo": ppo})
    await embedded.work("--updates", 1)
    job = await embedded.job(job_id)
    assert (job.state, job.error_code) == ("failed", "invalid_spec")
    assert [issue["loc"] for issue in job.error_issues or []] == [["ppo", "stop_token_id"]]


async def test_a_model_that_cannot_be_had_fails_the_job_and_says_which(embedded: Fleet, cache: Path) -> None:
    job_id = await embedded.submit({**SPEC, "model": {"type": "hub", "repo": "acme/other"}})
    await embedded.work("--updates", 1)
    job = await embedded.job(job_id)
    assert (job.state, job.error_code) == ("failed", "model_unavailable")
    assert "acme/other at main cannot be had from the hub: " in (job.error_message or "")


async def test_a_hub_that_is_away_is_asked_again_by_later_attempts(
    embedded: Fleet, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(hub, "PATIENCE_SECONDS", 0.0)
    job_id = await embedded.submit({**SPEC, "model": {"type": "hub", "repo": "acme/other"}})
    await embedded.work("--updates", 1)
    job = await embedded.job(job_id)
    assert (job.state, job.error_code, job.attempt) == ("failed", "hub", 3)
    assert "the last: acme/other at main cannot be had from the hub: " in (job.error_message or "")


async def test_where_the_operator_allows_no_hub_none_is_asked(embedded: Fleet, cache: Path) -> None:
    job_id = await embedded.submit(ON_HUB)
    await embedded.work("--updates", 1, allow_hub_models=False)
    job = await embedded.job(job_id)
    assert (job.state, job.error_code) == ("failed", "invalid_spec")
    assert [issue["loc"] for issue in job.error_issues or []] == [["model", "repo"]]


async def test_a_download_that_crashes_says_so(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    broken = Hub({"PYTHONHOME": "/nowhere"}, max_bytes=1)  # no Python starts with that
    with pytest.raises(ModelUnavailable, match="status 1"):
        await broken.fetch(HubModel(repo="acme/tiny"), run_dir)
