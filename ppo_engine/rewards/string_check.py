"""Reward by comparing the response with a text. Knows no spec and no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ppo_engine.rewards.contract import RewardBatch, RewardError, row_by_row
from ppo_engine.rewards.reference import Reference

Operation = Literal["eq", "ne", "like", "ilike"]


@dataclass(frozen=True)
class StringCheckReward:
    """1 when the response compares as asked, else 0: equal, not equal, contains, contains ignoring case."""

    operation: Operation
    reference: Reference

    def __call__(self, batch: RewardBatch) -> list[float | RewardError]:
        def score(row: int) -> float:
            return float(_compare(self.operation, batch.responses[row], self.reference.of(batch, row)))

        return row_by_row(batch, score)


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
