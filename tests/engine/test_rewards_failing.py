"""Rewards that fail: asked again, then their fallback, or the end; and what is counted."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_engine.memory import OutOfMemory
from ppo_engine.rewards import NamedReward, RewardBatch, RewardError, Scorer, Scores
from ppo_engine.rewards.scorer import FIRST_PAUSE, LONGEST_PAUSE, LONGEST_WISH
from tests.engine.test_rewards import batch
from tests.engine.training import PROMPTS, logged, trainer

ROWS = batch("one", "one two", "one two three")


class Flaky:
    """Gives one answer after another, and keeps what it was asked; an exception is raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = list(answers), list[list[str]]()

    def __call__(self, rows: RewardBatch) -> Any:
        self.asked.append(rows.responses)
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def score(
    reward: Callable[[RewardBatch], Any],
    *,
    retries: int = 2,
    fallback: float | None = None,
    weight: float = 1.0,
    waits: list[float] | None = None,
) -> Scores:
    named = NamedReward("r", reward, weight, retries, fallback)
    return Scorer([named], wait=(waits if waits is not None else []).append)(ROWS)


# Asked again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failing", [OSError("away"), None, [1.0], [1.0, 2.0, 3.0, 4.0], [math.nan] * 3, RewardError("no")]
)
def test_all_rows_are_asked_again_where_none_has_a_score(failing: Any) -> None:
    reward = Flaky(failing, failing, [1.0, 2.0, 3.0])
    found = score(reward)
    assert found.scores == [1, 2, 3]
    assert reward.asked == [ROWS.responses] * 3
    assert found.retried == {"r": 3}


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf, "1", {}, RewardError("not this one")])
def test_only_rows_without_a_score_are_asked_again(nothing: Any) -> None:
    reward = Flaky([1.0, nothing, nothing], [2.0, nothing], [3.0])
    found = score(reward)
    assert found.scores == [1, 2, 3]
    assert reward.asked == [ROWS.responses, ["one two", "one two three"], ["one two three"]]
    assert found.retried == {"r": 2}


def test_rows_asked_again_keep_all_their_fields() -> None:
    seen: list[RewardBatch] = []

    def reward(rows: RewardBatch) -> list[float | None]:
        seen.append(rows)
        return [1.0, None, 1.0] if len(rows) == 3 else [1.0]

    score(reward)
    again = seen[1]
    assert (again.prompts, again.response_ids) == ([ROWS.prompts[1]], [ROWS.response_ids[1]])
    assert (again.columns, again.prompt_ids) == ([ROWS.columns[1]], [ROWS.prompt_ids[1]])


def test_a_list_per_token_is_asked_again_too() -> None:
    reward = Flaky([[1.0], [2.0], [3.0, 3.0, 3.0]], [[2.0, 2.0]])  # the second row is one short
    found = score(reward, weight=2.0)
    assert found.dense == [[2], [4, 4], [6, 6, 6]]
    assert found.by_name == {"r": [1, 4, 9]}


def test_nothing_is_asked_again_without_a_need_or_leave() -> None:
    waits: list[float] = []
    assert score(Flaky([1.0, 2.0, 3.0]), waits=waits).retried == {"r": 0}
    lasting = Flaky([1.0, RewardError("never", lasting=True), 3.0])
    assert score(lasting, fallback=0.5, waits=waits).scores == [1, 0.5, 3]
    once = Flaky(OSError("away"))
    with pytest.raises(RewardError):
        score(once, retries=0, waits=waits)
    assert len(lasting.asked) == len(once.asked) == 1
    assert waits == []


@pytest.mark.parametrize("fatal", [KeyboardInterrupt(), SystemExit(1)])
def test_what_is_no_failure_of_a_reward_ends_the_run_at_once(fatal: BaseException) -> None:
    reward = Flaky(fatal)
    with pytest.raises(type(fatal)):
        score(reward, fallback=0.0)
    assert len(reward.asked) == 1


@pytest.mark.parametrize(
    "lack",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_ends_in_the_code_of_a_reward_ends_the_run_and_gets_no_fallback(lack: Exception) -> None:
    reward = Flaky(lack)
    with pytest.raises(
        OutOfMemory, match=r'^Reward "r": out of memory in its code \(.* asked for\)'
    ) as caught:
        score(reward, fallback=0.0)
    assert caught.value.__cause__ is lack
    assert len(reward.asked) == 1


@given(st.integers(0, 10), st.floats(0, 1e6))
def test_pauses_double_up_to_a_bound_and_heed_a_wish(retries: int, wish: float) -> None:
    waits: list[float] = []
    failing = [RewardError("away", retry_after=wish)] * (retries + 1)
    score(Flaky(*failing), retries=retries, fallback=0.0, waits=waits)
    assert len(waits) == retries
    for attempt, wait in enumerate(waits):
        longest = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
        wished = min(wish, LONGEST_WISH)
        assert max(longest / 2, wished) <= wait <= max(longest, wished)


def test_pauses_differ_and_leave_the_runs_random_numbers_alone() -> None:

    state, waits = random.getstate(), list[float]()
    for _ in range(8):
        score(Flaky(OSError(), [0.0] * 3), waits=waits)
    assert len(set(waits)) > 1
    assert random.getstate() == state


# In the end ----------------------------------------------------------------------------------------------


def test_the_fallback_stands_for_rows_that_have_none_in_the_end() -> None:
    reward = Flaky([1.0, None, None], [None, 3.0], [None])
    found = score(reward, fallback=-0.5, weight=2.0)
    assert found.scores == [2, -1, 6]
    assert found.by_name == {"r": [1, -0.5, 3]}
    assert (found.retried, found.failed) == ({"r": 2}, {"r": 1})


def test_a_row_of_a_dense_reward_has_its_fallback_as_a_whole() -> None:
    found = score(Flaky([[1.0], None, [3.0] * 3]), retries=0, fallback=-1.0)
    assert found.dense == [[1], [0, 0], [3, 3, 3]]
    assert found.scores == [0, -1, 0]
    assert found.totals == [1, -1, 9]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([OSError("away")] * 3, r'Reward "r" failed: OSError: away \(asked 3 times\)$'),
        ([None] * 3, r'Reward "r" gave a NoneType; .* \(asked 3 times\)$'),
        (
            [[1.0, None, None], [2.0, None], [math.nan]],
            r'Reward "r" for row 2 \(prompt "one two 2"\) gave NaN; .* \(asked 3 times\)$',
        ),
        (
            [[1.0, None, None], [None, None], [None, None]],
            r'Reward "r" for row 1 \(prompt "one two 1"\) and 1 more gave null; ',
        ),
        (
            [[1.0, RewardError("too long", lasting=True), 3.0]],
            r'Reward "r" for row 1 \(prompt "one two 1"\) failed: too long$',
        ),
    ],
)
def test_without_a_fallback_the_run_stops_and_names_reward_and_row(answers: list[Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score(Flaky(*answers))


def test_only_what_can_happen_is_counted() -> None:
    scorer = Scorer(
        [
            NamedReward("plain", Flaky([1.0] * 3)),
            NamedReward("again", Flaky([1.0] * 3), retries=1),
            NamedReward("falls", Flaky([None] * 3), fallback=0.0),
        ]
    )
    found = scorer(ROWS)
    assert found.retried == {"again": 0}
    assert found.failed == {"falls": 3}
    empty = scorer(ROWS.take([]))
    assert (empty.scores, empty.retried, empty.failed) == ([], {"again": 0}, {"falls": 0})


def test_a_reason_survives_the_way_between_processes() -> None:

    error = pickle.loads(pickle.dumps(RewardError("away", lasting=True, retry_after=3.0)))
    assert (str(error), error.lasting, error.retry_after) == ("away", True, 3.0)
    lack = pickle.loads(pickle.dumps(OutOfMemory("no room", can_go_on=True)))
    assert (str(lack), lack.can_go_on) == ("no room", True)


def test_an_update_and_an_evaluation_tell_how_many_rows_failed(tmp_path: Path) -> None:
    asked: list[int] = []

    def sometimes(rows: RewardBatch) -> list[float | None]:
        asked.append(len(rows))
        return [1.0 if len(ids) % 2 else None for ids in rows.response_ids]

    reward = Scorer([NamedReward("odd", sometimes, 1.0, 1, -1.0)], wait=lambda seconds: None)
    made = trainer(
        tmp_path,
        reward_model=reward,
        eval_dataset=PROMPTS[:4],
        changes={"eval_strategy": "steps", "eval_steps": 1, "total_episodes": 32},
    )
    made.train()

    for prefix in ("reward", "eval/reward"):
        failed = logged(made, f"{prefix}/odd/failed")
        rows = 16 if prefix == "reward" else 4
        assert len(failed) == 2  # in every row of the table, whatever happened
        assert failed == logged(made, f"{prefix}/odd/retried")
        means = logged(made, f"{prefix}/odd")
        assert means == pytest.approx([1 - 2 * count / rows for count in failed])
    assert any(logged(made, "reward/odd/failed"))
