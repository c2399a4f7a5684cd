"""Which checkpoints stay, which are passed over, and what is said of one that was made elsewhere."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_engine import checkpoint
from ppo_engine.issues import SpecError
from ppo_engine.retention import best_of, kept
from ppo_engine.run_dir import MANIFEST, RunDir, describe, write_atomic
from tests.engine.test_program import digest, events, finish, timeless
from tests.engine.training import make_run, trainer

METRICS = st.none() | st.floats()


@given(st.dictionaries(st.integers(1, 50), METRICS), st.integers(1, 5), st.booleans())
def test_the_last_ones_and_the_best_one_are_kept(
    metrics: dict[int, float | None], limit: int, greater: bool
) -> None:
    staying = kept(metrics, limit, greater_is_better=greater)

    last = sorted(metrics)[-limit:]
    numbers = [value for value in metrics.values() if value is not None and math.isfinite(value)]
    assert set(last) <= staying
    assert len(staying - set(last)) <= 1
    if numbers:
        assert (max if greater else min)(numbers) in {metrics[update] for update in staying}
    else:
        assert staying == set(last)


@given(st.dictionaries(st.integers(1, 50), METRICS))
def test_without_a_limit_all_are_kept(metrics: dict[int, float | None]) -> None:
    assert kept(metrics, None) == set(metrics)


def test_of_equals_the_first_is_the_best() -> None:
    assert best_of({1: 0.5, 2: 0.5, 3: 0.1}, greater_is_better=True) == 1


def make(directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "state").write_bytes(b"x" * 100)
    write_atomic(directory / MANIFEST, describe(directory, 1, {}).model_dump_json().encode())


def truncated(directory: Path) -> None:
    (directory / "state").write_bytes(b"x" * 50)


def flipped(directory: Path) -> None:
    (directory / "state").write_bytes(b"x" * 99 + b"y")


def missing(directory: Path) -> None:
    (directory / "state").unlink()


def no_manifest(directory: Path) -> None:
    (directory / MANIFEST).unlink()


def half_a_manifest(directory: Path) -> None:
    (directory / MANIFEST).write_bytes((directory / MANIFEST).read_bytes()[:20])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (truncated, "state has 50 bytes instead of 100"),
        (flipped, "state does not have the sha256 of its manifest"),
        (missing, "state is missing"),
        (no_manifest, "its manifest is gone"),
        (half_a_manifest, "its manifest is gone"),
    ],
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(
    tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    make(tmp_path / "update-9")
    make(tmp_path / "update-10")
    (
        tmp_path / "_update-11.partial"
    ).mkdir()  # a crash while it was written: nothing that anybody was told of
    harm(tmp_path / "update-10")
    heard: list[str] = []

    assert checkpoint.newest_whole(tmp_path, heard.append) == tmp_path / "update-9"
    assert heard == [f"checkpoint update-10 is damaged ({words}); the one before it is used."]


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, policy_dir: Path) -> RunDir:
    """A run whose KL, which grows, tells the best checkpoint: the first."""
    ppo = {"save_steps": 1, "total_episodes": 64, "save_total_limit": 1}
    run_dir = make_run(
        tmp_path_factory.mktemp("chosen") / "run",
        policy_dir,
        ppo={**ppo, "metric_for_best_model": "objective/kl"},
    )
    assert finish(run_dir).outcome == "succeeded"
    return run_dir


def test_the_best_checkpoint_outlives_those_after_it(chosen: RunDir) -> None:
    assert chosen.complete_checkpoints() == [1, 4]
    assert chosen.complete_exports() == [1, 2, 3, 4]
    state = json.loads((chosen.checkpoint(4) / checkpoint.TRAINER_STATE).read_text())
    assert (state["best_global_step"], state["best_metric"]) == (1, 0.0)


def test_a_checkpoint_made_elsewhere_is_gone_on_from_with_a_word_of_it(
    chosen: RunDir, tmp_path: Path
) -> None:
    run_dir = RunDir(tmp_path / "run")
    shutil.copytree(chosen.path, run_dir.path)
    directory = run_dir.checkpoint(4)
    state = json.loads((directory / checkpoint.RUN_STATE).read_text())
    state["made_with"] |= {"threads": 64, "torch": "1.0"}
    (directory / checkpoint.RUN_STATE).write_text(json.dumps(state))
    write_atomic(directory / MANIFEST, describe(directory, 4, {}).model_dump_json().encode())

    assert finish(run_dir, attempt=2).outcome == "succeeded"
    warning = next(event for event in events(run_dir) if event.type == "warning")
    assert warning.data["code"] == "not_exact"
    assert "threads: 64 then, 1 now; torch: 1.0 then" in str(warning.data["message"])
    assert "python" not in str(warning.data["message"])


def test_where_nothing_differs_nothing_is_said(chosen: RunDir, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    shutil.copytree(chosen.path, run_dir.path)

    assert finish(run_dir, attempt=2).outcome == "succeeded"
    assert timeless(run_dir) == timeless(chosen)
    assert digest(run_dir, 4) == digest(chosen, 4)


def test_a_script_keeps_the_last_and_the_best_and_knows_which_that_is(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    made = trainer(tmp_path, changes={**changes, "metric_for_best_model": "objective/kl"})
    made.train()

    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    assert (made.state.best_metric, made.state.best_global_step) == (0.0, 1)
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")


def test_a_script_that_names_a_metric_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"metric_for_best_model: \"eval/scores\" given"):
        trainer(tmp_path, changes={"metric_for_best_model": "eval/scores"})
