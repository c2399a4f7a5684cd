"""Reward by a regular expression. Knows no spec and no torch."""

from __future__ import annotations

from dataclasses import dataclass

import regex

from ppo_engine.issues import shown
from ppo_engine.rewards.contract import RewardBatch, RewardError, row_by_row


@dataclass(frozen=True)
class RegexReward:
    """`match` when the pattern (syntax of Python's re) is found anywhere in the response, else `no_match`.

    A row whose search took longer than `seconds_per_row` has no score: nested repetitions can backtrack
    without end, and re itself could not be stopped.
    """

    pattern: str
    match: float = 1.0
    no_match: float = 0.0
    seconds_per_row: float = 10.0

    def __call__(self, batch: RewardBatch) -> list[float | RewardError]:
        compiled = regex.compile(self.pattern, regex.VERSION0)

        def score(row: int) -> float:
            return self.match if self._is_found(compiled, batch.responses[row]) else self.no_match

        return row_by_row(batch, score)

    def _is_found(self, compiled: regex.Pattern[str], response: str) -> bool:
        try:
            return compiled.search(response, timeout=self.seconds_per_row) is not None
        except TimeoutError:
            raise RewardError(
                f"the pattern {shown(self.pattern)} searched the response {shown(response)} for more than "
                f"{self.seconds_per_row:g} s; write it without nested repetitions.",
                lasting=True,
            ) from None
