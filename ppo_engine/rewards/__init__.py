"""Text → score: the rewards of a run, one file per kind, combined by a `Scorer`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ppo_engine import spec
from ppo_engine.rewards import plugin
from ppo_engine.rewards.contract import Reward, RewardBatch, RewardError
from ppo_engine.rewards.length import LengthReward
from ppo_engine.rewards.model import ModelReward
from ppo_engine.rewards.regex import RegexReward
from ppo_engine.rewards.scorer import NamedReward, Scorer, Scores
from ppo_engine.rewards.string_check import StringCheckReward
from ppo_engine.spec import Issue, SpecError

__all__ = [
    "ModelReward",
    "NamedReward",
    "Reward",
    "RewardBatch",
    "RewardError",
    "Scorer",
    "Scores",
    "build",
]


def build(
    rewards: Sequence[spec.Reward],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Scorer:
    """The rewards of a spec, models loaded.

    device, dtype: of reward models.

    Raises:
        SpecError: with an issue for each reward that cannot be: a plug-in that is not installed or refuses
            its options, a model that cannot score.
    """
    built: list[NamedReward] = []
    issues: list[Issue] = []
    for index, reward in enumerate(rewards):
        try:
            built.append(NamedReward(reward.name, _build(reward, device, dtype), reward.weight))
        except RewardError as error:
            field = {"model": "source", "plugin": "plugin"}[reward.type]
            issues.append(Issue(loc=("rewards", index, field), msg=str(error)))
    if issues:
        raise SpecError(issues)
    return Scorer(built)


def _build(reward: spec.Reward, device: torch.device | str, dtype: torch.dtype) -> Reward:
    match reward:
        case spec.StringCheck():
            return StringCheckReward(reward.operation, reward.reference, reward.column)
        case spec.Regex():
            return RegexReward(reward.pattern, reward.match, reward.no_match)
        case spec.Length():
            return LengthReward(reward.target, reward.unit)
        case spec.Plugin():
            return plugin.load(reward.plugin, reward.options)
        case spec.ModelReward():
            return _load_model(reward, device, dtype)


def _load_model(reward: spec.ModelReward, device: torch.device | str, dtype: torch.dtype) -> ModelReward:
    source = reward.source
    name, revision = (source.path, None) if source.type == "local" else (source.repo, source.revision)
    return ModelReward.load(
        name, revision=revision, chat_template=reward.chat_template, dtype=dtype, device=device
    )
