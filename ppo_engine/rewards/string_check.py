"""Reward by comparing the response with a text. Knows no spec and no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ppo_engine.rewards.contract import RewardBatch, RewardError
from ppo_engine.spec import shown

Operation = Literal["eq", "ne", "like", "ilike"]


@dataclass(frozen=True)
class StringCheckReward:
    """1 when the response compares as asked, else 0: equal, not equal, contains, contains ignoring case.

    Exactly one of reference (the same text for every row) and column (the row's column that holds it).
    """

    operation: Operation
    reference: str | None = None
    column: str | None = None

    def __call__(self, batch: RewardBatch) -> list[float]:
        return [
            float(_compare(self.operation, response, self._reference(batch, index)))
            for index, response in enumerate(batch.responses)
        ]

    def _reference(self, batch: RewardBatch, index: int) -> str:
        if self.column is None:
            assert self.reference is not None, "the spec's rule: a reference or a column"
            return self.reference
        value = batch.columns[index].get(self.column)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RewardError(
                f"row {index} (prompt {shown(batch.prompts[index])}) has {shown(value)} in the column "
                f"{shown(self.column)}; it needs a text or a number there."
            )
        return str(value)


def _compare(operation: Operation, response: str, reference: str) -> bool:
    match operation:
        case "eq":
            return response == reference
        case "ne":
            return response != reference
        case "like":
            return reference in response
        case "ilike":
            return reference.casefold() in response.casefold()
