"""All rewards of a run as one: each is asked, its answer checked, and the weighted sum taken.

A wrong answer of a reward (a missing row, None, NaN) stops the run with the reward's and the row's name;
it never becomes a 0. This module does not know what kinds of rewards there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ppo_engine.rewards.contract import Reward, RewardBatch, RewardError
from ppo_engine.spec import shown


@dataclass(frozen=True)
class NamedReward:
    """A reward with the name of its metric and its weight in the sum."""

    name: str
    reward: Reward
    weight: float = 1.0


@dataclass(frozen=True)
class Scores:
    """Of one batch.

    scores: the weighted sum of the rewards that give a number per row, [B].
    dense: the weighted sum of those that give one per response token, ragged [B][R]; None: none does.
    by_name: what each reward gave a row (a dense one: its sum over the row), without weights.
    """

    scores: list[float]
    dense: list[list[float]] | None
    by_name: dict[str, list[float]]

    @property
    def totals(self) -> list[float]:
        """The weighted score of each row, dense rewards included, [B]."""
        if self.dense is None:
            return list(self.scores)
        return [score + sum(row) for score, row in zip(self.scores, self.dense, strict=True)]


class Scorer:
    """The rewards of a run. Called with a batch, it returns the `Scores`.

    Raises:
        RewardError: a reward failed, or gave anything but one finite number per row or per response token.
    """

    def __init__(self, rewards: Sequence[NamedReward]) -> None:
        names = [named.name for named in rewards]
        assert rewards, "a run has at least one reward"
        assert len(set(names)) == len(names), "each reward has its own name"
        self.rewards = list(rewards)

    def __call__(self, batch: RewardBatch) -> Scores:
        scores = [0.0] * len(batch)
        dense: list[list[float]] | None = None
        by_name: dict[str, list[float]] = {}
        for named in self.rewards:
            values = ask(named, batch) if len(batch) else []
            rows = [sum(value) if isinstance(value, list) else value for value in values]
            by_name[named.name] = rows
            if values and isinstance(values[0], list):
                dense = _add_dense(
                    dense or [[0.0] * len(ids) for ids in batch.response_ids], values, named.weight
                )
            else:
                scores = [score + named.weight * row for score, row in zip(scores, rows, strict=True)]
        return Scores(scores, dense, by_name)


def _add_dense(dense: list[list[float]], values: Sequence[Any], weight: float) -> list[list[float]]:
    return [
        [total + weight * value for total, value in zip(row, row_values, strict=True)]
        for row, row_values in zip(dense, values, strict=True)
    ]


def ask(named: NamedReward, batch: RewardBatch) -> list[float] | list[list[float]]:
    """A reward's answer as plain floats, after every check."""
    try:
        answer = named.reward(batch)
    except RewardError as error:
        raise RewardError(f"Reward {shown(named.name)}: {error}") from error
    except Exception as error:  # a reward is anybody's code; whatever it raises ends the run with its name
        raise RewardError(f"Reward {shown(named.name)} failed: {type(error).__name__}: {error}") from error
    return _Answer(named.name, batch).checked(answer)


class _Answer:
    """Checks one answer; knows whose it is, for the messages."""

    def __init__(self, name: str, batch: RewardBatch) -> None:
        self.name, self.batch = name, batch

    def checked(self, answer: object) -> list[float] | list[list[float]]:
        rows = _as_list(answer)
        if rows is None:
            raise self._error(f"gave a {type(answer).__name__}; give a list with one entry per row.")
        if len(rows) != len(self.batch):
            raise self._error(f"gave {len(rows)} entries for {len(self.batch)} rows; give one per row.")
        if _as_list(rows[0]) is not None:
            return [self._dense(index, row) for index, row in enumerate(rows)]
        return [self._number(index, row) for index, row in enumerate(rows)]

    def _dense(self, index: int, row: object) -> list[float]:
        values, length = _as_list(row), len(self.batch.response_ids[index])
        if values is None:
            raise self._error(f"gave {_given(row)}, but lists for rows before; give one kind.", index)
        if len(values) != length:
            raise self._error(
                f"gave {len(values)} numbers for {length} response tokens; give one each.", index
            )
        return [self._number(index, value) for value in values]

    def _number(self, index: int, value: object) -> float:
        if _as_list(value) is not None:
            raise self._error("gave a list, but numbers for rows before; give one kind.", index)
        number = _as_number(value)
        if number is None or not math.isfinite(number):
            raise self._error(f"gave {_given(value)}; a score must be a finite number.", index)
        return number

    def _error(self, what: str, index: int | None = None) -> RewardError:
        row = "" if index is None else f" for row {index} (prompt {shown(self.batch.prompts[index])})"
        return RewardError(f"Reward {shown(self.name)}{row} {what}")


def _as_list(value: object) -> list[Any] | None:
    """Lists and tuples, tensors and arrays; None: it is neither."""
    to_list: Callable[[], object] | None = getattr(value, "tolist", None)
    plain = to_list() if to_list is not None else value
    return list(plain) if isinstance(plain, list | tuple) else None


def _as_number(value: object) -> float | None:
    to_item: Callable[[], object] | None = getattr(value, "item", None)
    plain = to_item() if to_item is not None else value
    return float(plain) if isinstance(plain, int | float) else None


def _given(value: object) -> str:
    return (
        shown(value) if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"
    )
