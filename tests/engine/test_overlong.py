"""Prompts that are too long, from a run's arguments to what it says: refused, dropped, or truncated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ppo_engine.checkpoint import CheckpointMismatch
from ppo_engine.config import check_args
from ppo_engine.facts import Facts, read_model_facts
from ppo_engine.issues import SpecError
from ppo_engine.plan import plan
from ppo_engine.rewards import RewardBatch
from ppo_engine.run_dir import RunDir
from ppo_engine.spec import parse
from tests.engine.test_program import events, finish
from tests.engine.training import PROMPTS, config, likes_seven, make_run, trainer

LONG = [{"prompt": f"{row['prompt']} one two three four five"} for row in PROMPTS[:4]]  # 8 tokens
ROWS = [*PROMPTS[:6], *LONG, *PROMPTS[6:12]]
SHORT_ONES = {"max_prompt_length": 3}
PASSES = {"total_episodes": None, "num_train_epochs": 3}


@pytest.mark.parametrize(
    ("overlong", "kept", "dropped", "truncated"), [("drop", 12, 4, 0), ("truncate", 16, 0, 4)]
)
def test_every_derived_number_is_by_the_rows_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overlong: str, kept: int, dropped: int, truncated: int
) -> None:
    changes = {"overlong_prompts": overlong, **SHORT_ONES, **PASSES}
    made = trainer(tmp_path, train_dataset=ROWS, changes=changes)
    made.train()

    assert len(made.prompts) == kept
    assert (made.plan.total_episodes, made.plan.num_total_batches) == (48, 3)
    assert (made.state.epoch, made.state.num_train_epochs) == (3.0, 3)
    assert (
        "overlong_prompts: Of the prompts of train_dataset, some were too long: "
        f"rows 16, kept {kept}, dropped {dropped}, truncated {truncated}." in capsys.readouterr().out
    )


def test_nothing_is_said_where_no_prompt_is_too_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, changes={"overlong_prompts": "drop"}).train()
    assert "overlong_prompts" not in capsys.readouterr().out


def test_a_reward_is_given_the_text_of_the_ids_that_are_kept(tmp_path: Path) -> None:
    seen: dict[str, list[int]] = {}

    def looks(batch: RewardBatch) -> list[float]:
        seen.update(zip(batch.prompts, batch.prompt_ids, strict=True))
        return likes_seven(batch)

    changes = {"overlong_prompts": "truncate", **SHORT_ONES, **PASSES}
    trainer(tmp_path, train_dataset=ROWS, reward_model=looks, changes=changes).train()

    assert seen.pop("three four five") == [8, 9, 10]
    assert seen.keys() == {row["prompt"] for row in PROMPTS[:12]}
    assert {len(ids) for ids in seen.values()} == {3}


def test_each_evaluation_set_is_counted_and_held_to_the_same_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"overlong_prompts": "drop", **SHORT_ONES}
    made = trainer(tmp_path, eval_dataset={"few": ROWS[:7], "short": PROMPTS[:3]}, changes=changes)
    assert {name: len(prompts) for name, prompts in made.eval_prompts.items()} == {"/few": 6, "/short": 3}
    made.train()
    assert "prompts of eval_dataset/few, some were too long: rows 7, kept 6" in capsys.readouterr().out
    made.evaluate(ROWS[5:8])
    assert "prompts of eval_dataset, some were too long: rows 3, kept 1" in capsys.readouterr().out


def test_a_script_s_data_set_of_which_none_is_left_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="4 of 4 prompts are dropped, since max_prompt_length is 3") as caught:
        trainer(tmp_path, train_dataset=LONG, changes={"overlong_prompts": "drop", **SHORT_ONES})
    assert [issue.loc for issue in caught.value.issues] == [("train_dataset",)]


def test_a_run_does_not_go_on_with_other_prompts(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 1, **SHORT_ONES, **PASSES}
    trainer(tmp_path, train_dataset=ROWS, changes={"overlong_prompts": "drop", **saves}).train()
    other = trainer(tmp_path, train_dataset=ROWS, changes={"overlong_prompts": "truncate", **saves})
    with pytest.raises(CheckpointMismatch, match="prompts"):
        other.train(resume_from_checkpoint=tmp_path / "checkpoint-1")


# By the program ----------------------------------------------------------------------------------------


def run_with(directory: Path, policy_dir: Path, **prompts: Any) -> RunDir:
    """A run over `ROWS`, evaluated on a row that fits beside one that does not."""
    steps = {"eval_steps": 2, "save_steps": 2, "total_episodes": None, "num_train_epochs": 3.0}
    names = {"train": "file_1", "eval": "file_2", "max_length": 3, **prompts}
    run_dir = make_run(directory, policy_dir, ppo=steps, prompts=names)
    for name, rows in (("file_1", ROWS), ("file_2", [LONG[0], PROMPTS[20]])):
        run_dir.data(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def counts(rows: int, kept: int, dropped: int, truncated: int) -> dict[str, int]:
    return {"rows": rows, "kept": kept, "dropped": dropped, "truncated": truncated}


@pytest.mark.parametrize(
    ("overlong", "train", "held_out"),
    [
        ("drop", counts(16, 12, 4, 0), counts(2, 1, 1, 0)),
        ("truncate", counts(16, 16, 0, 4), counts(2, 2, 0, 1)),
    ],
)
def test_the_numbers_are_introduced_and_warned_of_once(
    tmp_path: Path, policy_dir: Path, overlong: str, train: dict[str, int], held_out: dict[str, int]
) -> None:
    run_dir = run_with(tmp_path / "run", policy_dir, overlong=overlong)
    assert finish(run_dir).outcome == "succeeded"

    started = events(run_dir)[0]
    assert started.data["prompts"] == {"train": train, "eval": held_out}
    facts = Facts(model=read_model_facts(policy_dir), prompts=len(ROWS))  # as the API counts them
    assert started.data["plan"] == plan(parse(json.loads(run_dir.spec.read_text())), facts).model_dump(
        mode="json"
    )
    warnings = [event.data for event in events(run_dir) if event.type == "warning"]
    assert [{**warning, "message": ""} for warning in warnings] == [
        {"code": "overlong_prompts", "message": "", "data_set": name, **numbers}
        for name, numbers in (("train", train), ("eval", held_out))
    ]


@pytest.mark.parametrize(("field", "name", "rows"), [("train", "file_1", 16), ("eval", "file_2", 2)])
def test_where_none_is_left_the_run_fails_at_the_field(
    tmp_path: Path, policy_dir: Path, field: str, name: str, rows: int
) -> None:
    run_dir = run_with(tmp_path / "run", policy_dir, overlong="drop")
    run_dir.data(name).write_text((json.dumps(LONG[0]) + "\n") * rows)
    result = finish(run_dir)

    assert (result.outcome, result.reason) == ("failed", "spec")
    assert [issue.loc for issue in result.issues] == [("prompts", field)]
    assert result.issues[0].msg == (
        f"{rows} of {rows} prompts are dropped, since prompts.max_length is 3, and none is left: shorten the "
        'prompts, raise prompts.max_length, or give prompts.overlong "truncate".'
    )


def test_by_default_the_rows_are_named_with_the_fields_that_help(tmp_path: Path, policy_dir: Path) -> None:
    result = finish(run_with(tmp_path / "run", policy_dir))
    assert [issue.loc for issue in result.issues] == [("prompts", "train")] * 4
    assert result.issues[0].msg == (
        "Row 7 has a prompt of 8 tokens; prompts.max_length is 3: shorten the prompt, raise "
        "prompts.max_length, or have such prompts dropped or truncated by prompts.overlong."
    )


def test_a_length_that_leaves_no_room_is_refused_alike_in_spec_and_script(
    tmp_path: Path, policy_dir: Path
) -> None:
    model = read_model_facts(policy_dir)
    told = (
        "25 given; the model has 32 positions, and response_length 8 leaves 24 for a prompt: give at most "
        "24, or leave it out."
    )
    run_dir = run_with(tmp_path / "run", policy_dir, max_length=25)
    with pytest.raises(SpecError) as caught:
        plan(parse(json.loads(run_dir.spec.read_text())), Facts(model=model, prompts=16))
    assert [(issue.loc, issue.msg) for issue in caught.value.issues] == [(("prompts", "max_length"), told)]
    with pytest.raises(SpecError) as caught:
        check_args(config(tmp_path, max_prompt_length=25), 16, model)
    assert [(issue.loc, issue.msg) for issue in caught.value.issues] == [(("max_prompt_length",), told)]
    check_args(config(tmp_path, max_prompt_length=24), 16, model)
