"""Rewards that a script hands to the trainer: any callables of `contract.Reward`'s form.

A callable gets one argument, the `RewardBatch`, and nothing else: further columns stand in `batch.columns`.
So a plug-in's reward is such a callable too. This module knows no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ppo_engine.rewards.contract import Reward
from ppo_engine.rewards.scorer import NamedReward


def named(functions: Sequence[Reward]) -> list[NamedReward]:
    """Give each function, as the name of its metric, its own name, made unique by a number. Weights are 1.

    Raises:
        TypeError: one of them cannot be called.
    """
    rewards: list[NamedReward] = []
    for function in functions:
        if not callable(function):
            raise TypeError(
                f"A {type(function).__name__} given as a reward; give a callable that takes a RewardBatch "
                "and returns one number per row, or one per response token."
            )
        name = _unique(_name(function), {reward.name for reward in rewards})
        rewards.append(NamedReward(name, function))
    return rewards


def _name(function: Reward) -> str:
    name: str = getattr(function, "__name__", type(function).__name__)
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "reward"


def _unique(name: str, taken: set[str]) -> str:
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    return candidate
