"""What a script hands to `PPOTrainer` as its reward → one `Scorer`.

A function gets one argument, the `RewardBatch`, and nothing else: further columns stand in `batch.columns`.
So a plug-in's reward can be handed over as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from ppo_engine.issues import Issue, Loc, SpecError
from ppo_engine.rewards.contract import Reward, RewardError
from ppo_engine.rewards.model import ModelReward
from ppo_engine.rewards.scorer import ByAdapter, NamedReward, Scorer

ScriptReward: TypeAlias = nn.Module | Reward | NamedReward


def scorer_of(
    rewards: ScriptReward | Sequence[ScriptReward] | Scorer | None,
    tokenizer: Any,
    device: torch.device | str,
    *,
    by_adapter: bool = False,
) -> Scorer:
    """Of a model, a function, or several.

    A module is a sequence-classification model that shares the policy's tokenizer; it is moved to `device`.
    A `NamedReward` has a name and a weight; others weigh 1 and have a function's own name, made unique.
    by_adapter: the policy has a reward adapter. It weighs 1 and is called "adapter", unless a `NamedReward`
    of a `ByAdapter` says otherwise; then `rewards` may be None.

    Raises:
        TypeError: one of them is neither. ValueError: there are none, or two of the same given name.
        SpecError: a model that cannot score; it is not moved.
    """
    if isinstance(rewards, Scorer):
        return rewards
    several = list(rewards) if isinstance(rewards, Sequence) else [rewards]
    if rewards is None and by_adapter:
        several = []
    if by_adapter and not any(map(_is_by_adapter, several)):
        several.append(NamedReward(_unique("adapter", _names(several)), ByAdapter()))
    elif not by_adapter and any(map(_is_by_adapter, several)):
        raise ValueError("reward_model has a ByAdapter; name the adapter in reward_adapter_name.")
    if not several:
        raise ValueError("reward_model is an empty list; give at least one reward.")
    taken = _names(several)
    if len(set(taken)) != len(taken):
        raise ValueError(f"reward_model has rewards of the names {taken}; each needs a name of its own.")
    named: list[NamedReward] = []
    for index, reward in enumerate(several):
        if not isinstance(reward, NamedReward):
            loc: Loc = ("reward_model", index) if isinstance(rewards, Sequence) else ("reward_model",)
            function = _callable(reward, tokenizer, device, loc)
            reward = NamedReward(_unique(_name(function), taken), function)
            taken.append(reward.name)
        named.append(reward)
    return Scorer(named)


def _is_by_adapter(reward: object) -> bool:
    return isinstance(reward, NamedReward) and isinstance(reward.reward, ByAdapter)


def _names(rewards: Sequence[object]) -> list[str]:
    """Those that are given."""
    return [reward.name for reward in rewards if isinstance(reward, NamedReward)]


def _callable(
    reward: nn.Module | Reward | None, tokenizer: Any, device: torch.device | str, loc: Loc
) -> Reward:
    if isinstance(reward, nn.Module):
        try:
            scoring = ModelReward(reward, tokenizer, shares_ids=True)
        except RewardError as error:
            raise SpecError([Issue(loc=loc, msg=str(error))]) from None
        reward.to(device)
        return scoring
    if not callable(reward):
        raise TypeError(
            f"A {type(reward).__name__} given as a reward; give a sequence-classification model, or a "
            "callable that takes a RewardBatch and returns one number per row, or one per response token."
        )
    return reward


def _name(reward: Reward) -> str:
    if isinstance(reward, ModelReward):
        return "model"
    name: str = getattr(reward, "__name__", type(reward).__name__)
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "reward"


def _unique(name: str, taken: Sequence[str]) -> str:
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    return candidate
