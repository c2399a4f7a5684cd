"""Reward by a regular expression. Knows no spec and no torch."""

from __future__ import annotations

from dataclasses import dataclass

import regex

from ppo_engine.rewards.contract import RewardBatch, RewardError
from ppo_engine.spec import shown


@dataclass(frozen=True)
class RegexReward:
    """`match` when the pattern (syntax of Python's re) is found anywhere in the response, else `no_match`.

    Raises:
        RewardError: a search took longer than `seconds_per_row`: nested repetitions can backtrack without
            end, and re itself could not be stopped.
    """

    pattern: str
    match: float = 1.0
    no_match: float = 0.0
    seconds_per_row: float = 10.0

    def __call__(self, batch: RewardBatch) -> list[float]:
        compiled = regex.compile(self.pattern, regex.VERSION0)
        return [
            self.match if self._is_found(compiled, batch, index) else self.no_match
            for index in range(len(batch))
        ]

    def _is_found(self, compiled: regex.Pattern[str], batch: RewardBatch, index: int) -> bool:
        try:
            return compiled.search(batch.responses[index], timeout=self.seconds_per_row) is not None
        except TimeoutError:
            raise RewardError(
                f"the pattern {shown(self.pattern)} searched row {index} (response "
                f"{shown(batch.responses[index])}) for more than {self.seconds_per_row:g} s; write it "
                "without nested repetitions."
            ) from None
