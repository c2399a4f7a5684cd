"""What a script hands to `PPOTrainer` as its reward → one `Scorer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from ppo_engine.rewards.contract import Reward
from ppo_engine.rewards.function import named
from ppo_engine.rewards.model import ModelReward
from ppo_engine.rewards.scorer import NamedReward, Scorer

ScriptReward: TypeAlias = nn.Module | Reward | NamedReward


def scorer_of(
    rewards: ScriptReward | Sequence[ScriptReward] | Scorer, tokenizer: Any, device: torch.device
) -> Scorer:
    """Of a model that shares the policy's tokenizer, a function, or several; a `NamedReward` has a weight.

    Raises:
        TypeError, ValueError: one of them is no reward.
    """
    if isinstance(rewards, Scorer):
        return rewards
    several = list(rewards) if isinstance(rewards, Sequence) else [rewards]
    if not several:
        raise ValueError("reward_model is an empty list; give at least one reward.")
    plain = [reward for reward in several if not isinstance(reward, NamedReward)]
    given_names = [reward for reward in several if isinstance(reward, NamedReward)]
    return Scorer([*given_names, *named([_callable(reward, tokenizer, device) for reward in plain])])


def _callable(reward: nn.Module | Reward, tokenizer: Any, device: torch.device) -> Reward:
    if not isinstance(reward, nn.Module):
        return reward
    return ModelReward(reward.to(device), tokenizer, shares_ids=True)
