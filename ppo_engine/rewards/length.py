"""Reward by the distance from a target length. Knows no spec and no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ppo_engine.rewards.contract import RewardBatch


@dataclass(frozen=True)
class LengthReward:
    """-|n - target| / target: 0 at the target, -1 at twice the target and at nothing.

    unit: what n counts: tokens of the response, the stop token included, or characters of its text.
    """

    target: int
    unit: Literal["token", "text"]

    def __call__(self, batch: RewardBatch) -> list[float]:
        written = batch.response_ids if self.unit == "token" else batch.responses
        return [-abs(len(response) - self.target) / self.target for response in written]
