"""Which checkpoints stay, which are passed over, and what is said of one that was made elsewhere."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

from ppo_engine import checkpoint
from ppo_engine.issues import SpecError
from ppo_engine.learn import Learner, NotFinite
from ppo_engine.retention import best_of, kept
from ppo_engine.run_dir import MANIFEST, RunDir, describe, write_atomic
from tests.engine.test_program import digest, events, finish, timeless
from tests.engine.training import logged, make_run, trainer

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
    assert heard == [f"checkpoint update-10 is damaged ({words}); update-9 is used."]


def test_where_no_whole_one_is_left_that_is_said_of_each(tmp_path: Path) -> None:
    for update in (1, 2):
        make(tmp_path / f"update-{update}")
        missing(tmp_path / f"update-{update}")
    heard: list[str] = []

    assert checkpoint.newest_whole(tmp_path, heard.append) is None
    then = "no whole one is left, so the run begins anew"
    assert heard == [
        f"checkpoint update-{update} is damaged (state is missing); {then}." for update in (2, 1)
    ]


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
    assert (state["best_global_step"], state["best_metric"]) == (1, pytest.approx(0.0, abs=1e-5))


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
    assert (made.state.best_metric, made.state.best_global_step) == (pytest.approx(0.0, abs=1e-5), 1)
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")


def test_a_script_that_names_a_metric_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"metric_for_best_model: \"eval/scores\" given"):
        trainer(tmp_path, changes={"metric_for_best_model": "eval/scores"})


# Of a script, by its path -----------------------------------------------------------------------------------

SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a run of three updates, with a checkpoint after each."""
    directory = tmp_path_factory.mktemp("script")
    trainer(directory, changes=SAVES).train()
    return directory


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (
            lambda it: flip(it / "adapter_model.safetensors"),
            "adapter_model.safetensors does not have the sha",
        ),
        (lambda it: (it / "run_state.json").unlink(), "run_state.json is missing"),
        (no_manifest, "its manifest is gone"),
        (shutil.rmtree, "there is no such directory"),
    ],
)
def test_a_damaged_checkpoint_that_a_script_names_is_refused(
    script: Path, tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    named = tmp_path / "output" / "checkpoint-2"
    shutil.copytree(script, named.parent)
    harm(named)
    made = trainer(named.parent, changes=SAVES)
    start = {name: weight.clone() for name, weight in made.model.state_dict().items()}

    with pytest.raises(SpecError, match=re.escape(words)) as refused:
        made.train(resume_from_checkpoint=str(named))

    (issue,) = refused.value.issues
    assert issue.loc == ("resume_from_checkpoint",)
    assert str(named) in issue.msg
    assert "give another one" in issue.msg
    assert all(weight.equal(start[name]) for name, weight in made.model.state_dict().items())


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def checkpoints(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("checkpoint-*")}


def test_only_whole_checkpoints_of_the_own_run_are_counted_and_deleted(script: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    trainer(output, changes={**SAVES, "save_steps": 3, "seed": 7}).train()  # another run's, at update 3
    (output / "checkpoint-3").rename(output / "checkpoint-9")
    shutil.copytree(output / "checkpoint-9", output / "checkpoint-1")
    shutil.copytree(script / "checkpoint-2", output / "checkpoint-2")

    made = trainer(output, changes={**SAVES, "save_total_limit": 1})
    made.train(resume_from_checkpoint=str(output / "checkpoint-2"))

    assert checkpoints(output) == {"checkpoint-1", "checkpoint-3", "checkpoint-9"}
    assert checkpoint.fault(output / "checkpoint-3") is None


def test_a_damaged_checkpoint_is_none_of_the_last_ones(script: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    shutil.copytree(script, output)
    shutil.rmtree(output / "checkpoint-3")
    flip(output / "checkpoint-2" / "adapter_model.safetensors")

    changes = {**SAVES, "save_total_limit": 2}
    trainer(output, changes=changes).train(resume_from_checkpoint=str(output / "checkpoint-1"))
    assert checkpoints(output) == {"checkpoint-2", "checkpoint-3"}, "the second was made anew"

    flip(output / "checkpoint-2" / "adapter_model.safetensors")
    shutil.copytree(script / "checkpoint-1", output / "checkpoint-1")
    shutil.rmtree(output / "checkpoint-3")
    shutil.copytree(script / "checkpoint-3", output / "checkpoint-3")
    again = trainer(output, changes={**changes, "save_steps": 3})
    again.train(resume_from_checkpoint=str(output / "checkpoint-1"))
    assert checkpoints(output) == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


def test_a_run_that_is_begun_again_keeps_what_it_makes(script: Path, tmp_path: Path) -> None:
    """The checkpoints beyond it are of a future that it may not come to."""
    output = tmp_path / "output"
    shutil.copytree(script, output)
    shutil.rmtree(output / "checkpoint-1")
    seen: list[set[str]] = []
    made = trainer(output, changes={**SAVES, "save_total_limit": 1})
    made.add_callback(_Sees(output, seen))
    made.train()

    assert seen[0] == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    assert checkpoints(output) == {"checkpoint-3"}


class _Sees(TrainerCallback):
    def __init__(self, directory: Path, seen: list[set[str]]) -> None:
        self.directory, self.seen = directory, seen

    def on_save(self, *_: Any, **__: Any) -> None:
        self.seen.append(checkpoints(self.directory))


# What else a checkpoint has ---------------------------------------------------------------------------------


def test_a_share_of_the_run_as_warm_up_is_part_of_what_a_run_is(tmp_path: Path) -> None:
    trainer(tmp_path, changes={**SAVES, "warmup_steps": 0.5}).train()

    other = trainer(tmp_path, changes={**SAVES, "warmup_steps": 0.25})
    with pytest.raises(checkpoint.CheckpointMismatch, match=r"\(warmup_steps: 0.5 then, 0.25 now\)"):
        other.train(resume_from_checkpoint=True)


@contextmanager
def spoiled(steps: set[int]) -> Iterator[None]:
    """Inside, the gradients of these optimizer steps, counted from 1, are NaN."""
    numbers, step = itertools.count(1), Learner._step

    def taken(learner: Learner, *given: Any) -> Any:
        weights = [weight for weight in learner.module.parameters() if weight.requires_grad]
        factor = math.nan if next(numbers) in steps else 1.0
        hooks = [weight.register_hook(lambda gradient: gradient * factor) for weight in weights]
        done = step(learner, *given)
        for hook in hooks:
            hook.remove()
        return done

    with mock.patch.object(Learner, "_step", taken):
        yield


def test_steps_that_were_not_finite_are_counted_over_a_resume(tmp_path: Path) -> None:
    """Of four steps each: two at the end of the first update and one in the second are three in a row."""
    whole = trainer(tmp_path, changes=SAVES)
    with spoiled({3, 4, 5}), pytest.raises(NotFinite, match="3 optimizer steps in a row") as ended:
        whole.train()
    assert logged(whole, "optimizer_steps_skipped") == [2.0]

    resumed = trainer(tmp_path, changes=SAVES)
    with spoiled({1}), pytest.raises(NotFinite) as again:
        resumed.train(resume_from_checkpoint=True)
    assert str(again.value) == str(ended.value)


def test_a_policy_with_a_part_of_an_update_says_so(policy_dir: Path, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir, ppo={"save_steps": 100, "total_episodes": 32})
    with spoiled({6, 7, 8}):
        result = finish(run_dir)

    assert (result.outcome, result.reason, result.update) == ("failed", "nan", 1)
    assert "the last in update 2 (steps taken in it: 1); none of them was applied" in result.message
    card = (run_dir.export(1) / "README.md").read_text()
    assert "the policy after update 1 of 2, and 1 optimizer step more; those that followed" in card
