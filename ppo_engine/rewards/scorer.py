"""All rewards of a run as one: each is asked, its answer checked, and the weighted sum taken.

A row without a score (the reward raised, or gave None, NaN, or too few numbers) is asked for again as often
as its reward allows. What then is left gets the reward's fallback, or stops the run with the reward's and the
row's name; it never becomes a 0 by itself. This module does not know what kinds of rewards there are.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from ppo_engine.issues import shown
from ppo_engine.memory import OutOfMemory, asked_for, is_out_of_memory
from ppo_engine.redaction import redacted
from ppo_engine.rewards.contract import Reward, RewardBatch, RewardError, RewardValues

Value: TypeAlias = float | list[float]
"""Of a row: a number, or one per response token."""

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 8.0
LONGEST_WISH = 60.0
"""Seconds before a row is asked for again; the last: where a server said when."""


@dataclass(frozen=True)
class NamedReward:
    """A reward with the name of its metric and its weight in the sum.

    retries: how often rows without a score are asked for again. fallback: the score, before its weight, of a
    row that has none after that; None: the run stops.
    """

    name: str
    reward: Reward
    weight: float = 1.0
    retries: int = 0
    fallback: float | None = None


class ByAdapter:
    """Stands for the reward of an adapter on the policy's base, which the trainer reads by itself.

    All processes take part in that together; a `Scorer` asks each reward in one process, and passes over it.
    """

    def __call__(self, batch: RewardBatch, /) -> RewardValues:
        raise AssertionError("a Scorer passes over it")


@dataclass(frozen=True)
class Scores:
    """Of one batch.

    scores: the weighted sum of the rewards that give a number per row, [B].
    dense: the weighted sum of those that give one per response token, ragged [B][R]; None: none does.
    by_name: what each reward gave a row (a dense one: its sum over the row), without weights.
    retried: how many rows were asked for again, of each reward that has retries.
    failed: how many rows have the fallback, of each reward that has one.
    """

    scores: list[float]
    dense: list[list[float]] | None
    by_name: dict[str, list[float]]
    retried: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)

    def including(self, named: NamedReward, values: Sequence[float]) -> Scores:
        """With one reward more, which gave each row a number. Raises RewardError where one is not finite."""
        wrong = [row for row, value in enumerate(values) if not math.isfinite(value)]
        if wrong:
            raise RewardError(
                f"Reward {shown(named.name)} gave {values[wrong[0]]} for row {wrong[0]}; a score must be a "
                "finite number."
            )
        scores = [score + named.weight * value for score, value in zip(self.scores, values, strict=True)]
        return replace(self, scores=scores, by_name={**self.by_name, named.name: list(values)})

    @property
    def totals(self) -> list[float]:
        """The weighted score of each row, dense rewards included, [B]."""
        if self.dense is None:
            return list(self.scores)
        return [score + sum(row) for score, row in zip(self.scores, self.dense, strict=True)]


@dataclass(frozen=True)
class Answer:
    """Of one reward to one batch: a value per row; how many were asked for again, or have the fallback."""

    values: list[Value]
    retried: int = 0
    failed: int = 0


class Scorer:
    """The rewards of a run. Called with a batch, it returns the `Scores`.

    wait: called with the seconds to pass before rows are asked for again.

    Raises:
        RewardError: a row is left without a score: one finite number, or one per response token.
        OutOfMemory: memory has ended in a reward, whatever retries and fallback it has.
    """

    def __init__(self, rewards: Sequence[NamedReward], wait: Callable[[float], None] = time.sleep) -> None:
        names = [named.name for named in rewards]
        assert rewards, "a run has at least one reward"
        assert len(set(names)) == len(names), "each reward has its own name"
        self.rewards, self._wait = list(rewards), wait

    def __call__(self, batch: RewardBatch) -> Scores:
        scores = [0.0] * len(batch)
        dense = [[0.0] * len(ids) for ids in batch.response_ids]
        asked = [named for named in self.rewards if not isinstance(named.reward, ByAdapter)]
        answers = {named.name: self._answer(named, batch) for named in asked}
        for named in asked:
            for row, value in enumerate(answers[named.name].values):
                if isinstance(value, list):
                    dense[row] = [
                        total + named.weight * one for total, one in zip(dense[row], value, strict=True)
                    ]
                else:
                    scores[row] += named.weight * value
        is_dense = any(isinstance(value, list) for answer in answers.values() for value in answer.values)
        return Scores(
            scores,
            dense if is_dense else None,
            {name: [_sum(value) for value in answer.values] for name, answer in answers.items()},
            {named.name: answers[named.name].retried for named in asked if named.retries},
            {named.name: answers[named.name].failed for named in asked if named.fallback is not None},
        )

    def _answer(self, named: NamedReward, batch: RewardBatch) -> Answer:
        if not len(batch):
            return Answer([])
        found = _asked(named, batch)
        retried = 0
        for attempt in range(named.retries):
            again = [row for row, value in enumerate(found) if _is_worth_asking(value)]
            if not again:
                break
            retried = retried or len(again)  # later rounds ask for some of the same rows
            self._wait(_pause(attempt, [found[row] for row in again]))
            for row, value in zip(again, _asked(named, batch.take(again)), strict=True):
                found[row] = value
        values = [named.fallback if isinstance(value, RewardError) else value for value in found]
        failed = sum(isinstance(value, RewardError) for value in found)
        if failed and named.fallback is None:
            raise _refusal(named, batch, found)
        return Answer([value for value in values if value is not None], retried, failed)


def _sum(value: Value) -> float:
    return sum(value) if isinstance(value, list) else value


def _is_worth_asking(value: Value | RewardError) -> bool:
    return isinstance(value, RewardError) and not value.lasting


def _pause(attempt: int, values: Sequence[Value | RewardError]) -> float:
    """Seconds before asking again: twice as long each time, with jitter, or later, where a server said so."""
    wish = max(value.retry_after for value in values if isinstance(value, RewardError))
    longest = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
    # An own source: the global one is the training's.
    return max(random.SystemRandom().uniform(longest / 2, longest), min(wish, LONGEST_WISH))


def _refusal(named: NamedReward, batch: RewardBatch, found: Sequence[Value | RewardError]) -> RewardError:
    """Why the run stops: the first row without a score, and how many more there are."""
    failed = [(row, value) for row, value in enumerate(found) if isinstance(value, RewardError)]
    row, first = failed[0]
    where = f" for row {row} (prompt {shown(batch.prompts[row])})"
    if len(failed) > 1:
        is_one = all(value is first for _, value in failed)
        where = "" if is_one and len(failed) == len(batch) else f"{where} and {len(failed) - 1} more"
    tried = f" (asked {named.retries + 1} times)" if named.retries and not first.lasting else ""
    error = RewardError(f"Reward {shown(named.name)}{where} {first}{tried}")
    error.__cause__ = first.__cause__
    return error


# Asking once -----------------------------------------------------------------------------------------------


def _asked(named: NamedReward, batch: RewardBatch) -> list[Value | RewardError]:
    """A value for each row, as plain floats, or why there is none."""
    try:
        return _Checked(batch).values(named.reward(batch))
    except OutOfMemory as error:
        raise OutOfMemory(f"Reward {shown(named.name)}: {error}") from error
    except (
        Exception
    ) as error:  # a reward is anybody's code; whatever it raises fails the rows it was asked for
        if is_out_of_memory(error):
            # Asking again would not help, and a fallback would hide that the reward never scored.
            msg = f"out of memory in its code ({asked_for(error)}); let it take less at a time."
            raise OutOfMemory(f"Reward {shown(named.name)}: {msg}") from error
        return [_failure(error)] * len(batch)


def _failure(error: Exception) -> RewardError:
    if isinstance(error, _Fault):
        return error
    if isinstance(error, RewardError):
        failure = RewardError(f"failed: {error}", lasting=error.lasting, retry_after=error.retry_after)
        failure.__cause__ = error.__cause__
    else:
        failure = RewardError(f"failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
    return failure


class _Fault(RewardError):
    """An answer that is none; the message goes on after the reward's name."""


class _Checked:
    """Checks one answer."""

    def __init__(self, batch: RewardBatch) -> None:
        self.batch = batch

    def values(self, answer: object) -> list[Value | RewardError]:
        rows = _as_list(answer)
        if rows is None:
            raise _Fault(f"gave a {type(answer).__name__}; give a list with one entry per row.")
        if len(rows) != len(self.batch):
            raise _Fault(f"gave {len(rows)} entries for {len(self.batch)} rows; give one per row.")
        is_dense = any(_as_list(row) is not None for row in rows)
        return [self._row(index, row, is_dense) for index, row in enumerate(rows)]

    def _row(self, index: int, row: object, is_dense: bool) -> Value | RewardError:
        if isinstance(row, RewardError):
            return _failure(row)
        try:
            return self._dense(index, row) if is_dense else _number(row)
        except _Fault as fault:
            return fault

    def _dense(self, index: int, row: object) -> list[float]:
        values, length = _as_list(row), len(self.batch.response_ids[index])
        if values is None:
            raise _Fault(f"gave {_given(row)}, but lists for other rows; give one kind.")
        if len(values) != length:
            raise _Fault(f"gave {len(values)} numbers for {length} response tokens; give one each.")
        return [_number(value) for value in values]


def _number(value: object) -> float:
    number = _as_number(value)
    if number is None or not math.isfinite(number):
        raise _Fault(f"gave {_given(value)}; a score must be a finite number.")
    return number


def _as_list(value: object) -> list[Any] | None:
    """Lists and tuples, tensors and arrays; None: it is neither."""
    to_list: Callable[[], object] | None = getattr(value, "tolist", None)
    plain = to_list() if to_list is not None else value
    return list(plain) if isinstance(plain, list | tuple) else None


def _as_number(value: object) -> float | None:
    to_item: Callable[[], object] | None = getattr(value, "item", None)
    plain = to_item() if to_item is not None else value
    try:
        return float(plain) if isinstance(plain, int | float) else None
    except OverflowError:  # an integer that no float holds
        return math.inf


def _given(value: object) -> str:
    if isinstance(value, str):
        return shown(redacted(value))  # before it is cut, when what is left of a secret could not be told
    return shown(value) if value is None or isinstance(value, int | float) else f"a {type(value).__name__}"
