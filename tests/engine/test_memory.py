"""Where memory ends, the same work is done with fewer rows at a time, and the result is the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from ppo_engine import PPOTrainer
from ppo_engine.learn import Learner
from ppo_engine.load import _refusing
from ppo_engine.memory import OutOfMemory, Room, is_out_of_memory
from ppo_engine.parallel import Parallel
from ppo_engine.rewards import ModelReward, NamedReward
from tests.engine import tiny
from tests.engine.scarcity import HUGE, scarce, scarce_reward, told_of_memory
from tests.engine.test_program import events, finish
from tests.engine.training import PROMPTS, logged, make_run, trainer


def weights(made: PPOTrainer) -> dict[str, torch.Tensor]:
    return made.parallel.state_dict(made.model, trained_only=True)


def no_memory(*_: Any, **__: Any) -> None:
    torch.empty(HUGE, dtype=torch.uint8)


@pytest.fixture(scope="module")
def plenty(tmp_path_factory: pytest.TempPathFactory) -> PPOTrainer:
    made = trainer(tmp_path_factory.mktemp("plenty"))
    made.train()
    return made


@pytest.mark.parametrize(
    ("where", "work"),
    [("rollout", "rollout"), ("scoring", "scoring"), ("forward", "update"), ("backward", "update")],
)
def test_less_at_a_time_gives_the_same_policy(
    tmp_path: Path, plenty: PPOTrainer, where: str, work: str
) -> None:
    made = trainer(tmp_path)
    heard = told_of_memory(made)
    with scarce(made, 2, where=where):
        made.train()

    for name in ("objective/scores", "policy/grad_norm", "loss/policy_avg"):
        assert logged(made, name) == pytest.approx(logged(plenty, name), rel=1e-4, abs=1e-7), name
    for name, weight in weights(plenty).items():
        torch.testing.assert_close(weights(made)[name], weight, rtol=1e-3, atol=1e-4)
    assert [warning["work"] for warning in heard] == [work] * len(heard)
    assert heard[0]["rows_tried"] > 2 >= heard[-1]["rows"]
    assert {w for w, times in made.room.halvings.items() if times} == {work}
    assert "1152921504606846976 bytes" in heard[0]["message"]


def test_the_smaller_size_is_kept_and_goes_on_with_a_checkpoint(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 1}
    made = trainer(tmp_path, changes=changes)
    heard = told_of_memory(made)
    with scarce(made, 2, where="backward"):
        made.train()
    before = len(heard)
    assert 0 < before <= 2  # not once more in a later step

    resumed = trainer(tmp_path, changes=changes)
    heard = told_of_memory(resumed)
    with scarce(resumed, 2, where="backward"):
        resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-1")
    assert heard == []
    assert resumed.room.halvings == made.room.halvings
    for name, weight in weights(made).items():
        assert torch.equal(weights(resumed)[name], weight)


@pytest.mark.parametrize("where", ["rollout", "scoring", "backward"])
def test_a_single_row_that_does_not_fit_ends_the_run_with_numbers_and_a_fix(
    tmp_path: Path, where: str
) -> None:
    made = trainer(tmp_path)
    with scarce(made, 0, where=where), pytest.raises(OutOfMemory) as caught:
        made.train()

    assert not caught.value.can_go_on
    assert "a single row, of " in str(caught.value)
    assert f"{HUGE} bytes asked for" in str(caught.value)
    assert "shorten prompts or response_length" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other call.",
        "CUDA driver error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
        "to allocate 8 bytes. Error code 12 (Cannot allocate memory)",
    ],
)
def test_memory_that_ends_is_known_by_what_torch_says(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(ValueError(text)), "of torch it is a RuntimeError"


@pytest.mark.parametrize(
    "text",
    ["CUDA error: device-side assert triggered", "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED", "memory"],
)
def test_other_texts_are_something_else(text: str) -> None:
    assert not is_out_of_memory(RuntimeError(text))


def test_a_lack_of_memory_says_nothing_of_the_files_that_were_read(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="allocate memory"), _refusing("m", ("model",)):
        no_memory()
    judge = tiny.save(tiny.reward_model(), tiny.tokenizer(), tmp_path)
    loading = mock.patch.object(AutoModelForSequenceClassification, "from_pretrained", no_memory)
    with loading, pytest.raises(RuntimeError, match="allocate memory"):
        ModelReward.load(judge)


# Rewards -----------------------------------------------------------------------------------------------


def judged(directory: Path, **reward: Any) -> PPOTrainer:
    """A trainer whose reward is a model's score."""
    judge = NamedReward(
        "judge", ModelReward(tiny.reward_model(), tiny.tokenizer(), shares_ids=True), **reward
    )
    changes = {"total_episodes": 32, "eval_strategy": "steps", "eval_steps": 1}
    return trainer(directory, reward_model=judge, eval_dataset=PROMPTS[:8], changes=changes)


def judge_of(made: PPOTrainer) -> Any:
    [judge] = made.collector.scorer.rewards
    return judge.reward


def test_a_reward_model_scores_less_at_a_time_with_the_same_scores(tmp_path: Path) -> None:
    plenty = judged(tmp_path / "plenty")
    plenty.train()
    made = judged(tmp_path / "scarce", retries=2, fallback=-100.0)
    heard = told_of_memory(made)
    with scarce_reward(judge_of(made).model, 2):
        made.train()

    for name in ("reward/judge", "eval/reward/judge", "policy/grad_norm"):
        assert logged(made, name) == pytest.approx(logged(plenty, name), rel=1e-4, abs=1e-7), name
    assert not any(logged(made, "reward/judge/retried") + logged(made, "reward/judge/failed"))
    assert [warning["work"] for warning in heard] == ["reward"] * len(heard)
    assert heard[0]["rows_tried"] > 2 >= heard[-1]["rows"]
    tried = [warning["rows_tried"] for warning in heard]
    assert tried == sorted(set(tried), reverse=True), "the size is kept"
    assert {w for w, times in made.room.halvings.items() if times} == {"reward"}


def test_a_single_row_that_no_reward_model_can_take_ends_the_run_and_gets_no_fallback(tmp_path: Path) -> None:
    made = judged(tmp_path, retries=2, fallback=0.0)
    with scarce_reward(judge_of(made).model, 0), pytest.raises(OutOfMemory) as caught:
        made.train()

    assert not caught.value.can_go_on
    assert 'Reward "judge": Out of memory (reward): a single row, of ' in str(caught.value)
    assert f"{HUGE} bytes asked for" in str(caught.value)
    assert "take a smaller reward model" in str(caught.value)


# Other errors ------------------------------------------------------------------------------------------


def test_another_error_is_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    trunk = made.model.policy.get_base_model().model
    trunk.register_forward_pre_hook(lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"inconsistent tensor size|size mismatch"):
        made.train()
    assert not any(made.room.halvings.values())


# The program -------------------------------------------------------------------------------------------


@contextmanager
def scarce_losses(rows: int) -> Iterator[None]:
    """Inside, memory ends in every backward pass of more rows than these."""
    losses = Learner._losses

    def too_much(learner: Learner, experience: Any, micro_batch: Any, *more: Any) -> Any:
        if len(micro_batch) > rows:
            torch.empty(HUGE, dtype=torch.uint8)
        return losses(learner, experience, micro_batch, *more)

    with mock.patch.object(Learner, "_losses", too_much):
        yield


def test_a_program_says_that_it_takes_less_and_says_it_once(tmp_path: Path, policy_dir: Path) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir, ppo={"total_episodes": 32})
    with scarce_losses(2):
        assert finish(run_dir).outcome == "succeeded"

    warnings = [event for event in events(run_dir) if event.type == "warning"]
    assert {warning.data["code"] for warning in warnings} == {"out_of_memory"}
    assert {warning.data["work"] for warning in warnings} == {"update"}
    tried = [(warning.data["rows_tried"], warning.data["rows"]) for warning in warnings]
    assert tried[0][0] > 2 >= tried[-1][1]  # type: ignore[operator]
    assert len(set(tried)) == len(tried)
    assert {warning.update for warning in warnings} == {0}


def test_a_program_that_cannot_begin_a_step_again_leaves_word_for_the_next_one(
    tmp_path: Path, policy_dir: Path
) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir, ppo={"total_episodes": 32})
    cannot = mock.patch.object(Room, "can_begin_again", new_callable=mock.PropertyMock, return_value=False)
    ends = []
    with scarce_losses(2), cannot:
        while not ends or ends[-1].outcome == "stopped":
            ends.append(finish(run_dir))

    assert [(end.outcome, end.reason) for end in ends[:-1]] == [("stopped", "oom")] * (len(ends) - 1)
    assert ends[-1].outcome == "succeeded"
    assert len(ends) > 1
    assert run_dir.read_halvings().update >= len(ends) - 1
    assert [event.data["code"] for event in events(run_dir) if event.type == "warning"] == ["out_of_memory"]
    assert "from now on" in ends[0].message


def test_memory_that_ends_beside_the_rows_is_told_as_that(tmp_path: Path, policy_dir: Path) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir)
    with mock.patch.object(Parallel, "step", no_memory):
        result = finish(run_dir)

    assert (result.outcome, result.reason) == ("failed", "oom")
    assert str(HUGE) in result.message


def test_a_program_whose_single_row_does_not_fit_fails(tmp_path: Path, policy_dir: Path) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir)
    with scarce_losses(0):
        result = finish(run_dir)

    assert (result.outcome, result.reason) == ("failed", "oom")
    assert "a single row" in result.message


def test_a_run_that_is_no_number_any_more_leaves_its_last_good_policy(
    tmp_path: Path, policy_dir: Path
) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir, ppo={"save_steps": 100})
    update = Learner.update

    def spoiled(learner: Learner, experience: Any, number: int, kl_coef: float) -> Any:
        if number == 3:
            experience.advantages_BR.fill_(torch.nan)
        return update(learner, experience, number, kl_coef)

    with mock.patch.object(Learner, "update", spoiled):
        result = finish(run_dir)

    assert (result.outcome, result.reason, result.update) == ("failed", "nan", 2)
    assert run_dir.complete_exports() == [2]
    weights = load_file(run_dir.export(2) / "adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
