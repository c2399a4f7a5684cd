"""Reward by whether the response is JSON of a given schema. Knows no spec and no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ppo_engine.issues import shown
from ppo_engine.json_schemas import Checker, TooMuch
from ppo_engine.rewards.contract import RewardBatch, RewardError, row_by_row


class JsonSchemaReward:
    """`match` when the whole response is JSON that the schema allows, else `no_match`.

    A row that takes longer than `seconds_per_row` has no score. schema: one without a `json_schemas.fault`.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        match: float = 1.0,
        no_match: float = 0.0,
        seconds_per_row: float = 10.0,
    ) -> None:
        self.match, self.no_match = match, no_match
        self._checker = Checker(schema, seconds_per_row)

    def __call__(self, batch: RewardBatch) -> list[float | RewardError]:
        return row_by_row(batch, lambda row: self._score(batch.responses[row]))

    def _score(self, response: str) -> float:
        try:
            return self.match if self._checker.allows(response) else self.no_match
        except TooMuch as reason:
            raise RewardError(
                f"the response {shown(response)} could not be held against the schema ({reason}); write the "
                "schema without references that double the work, and patterns without nested repetitions.",
                lasting=True,
            ) from None
