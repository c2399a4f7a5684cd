"""Text → score: the rewards of a run, one file per kind, combined by a `Scorer`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch

from ppo_engine import reward_kinds
from ppo_engine.issues import Issue, SpecError
from ppo_engine.rewards import plugin
from ppo_engine.rewards.contract import Reward, RewardBatch, RewardError
from ppo_engine.rewards.http import HttpReward, key_of
from ppo_engine.rewards.json_schema import JsonSchemaReward
from ppo_engine.rewards.length import LengthReward
from ppo_engine.rewards.model import ModelReward
from ppo_engine.rewards.reference import Reference
from ppo_engine.rewards.regex import RegexReward
from ppo_engine.rewards.scorer import ByAdapter, NamedReward, Scorer, Scores
from ppo_engine.rewards.secrets import reveal
from ppo_engine.rewards.string_check import StringCheckReward
from ppo_engine.rewards.text_similarity import TextSimilarityReward

__all__ = [
    "ByAdapter",
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
    rewards: Sequence[reward_kinds.Reward],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    wait: Callable[[float], None] = time.sleep,
) -> Scorer:
    """The rewards of a spec, models loaded.

    device, dtype: of reward models. wait: as a `Scorer` has it.

    Raises:
        SpecError: with an issue for each reward that cannot be: a plug-in that is not installed or refuses
            its options, a model that cannot score, a server that may not be asked, a secret that is not here.
    """
    built: list[NamedReward] = []
    issues: list[Issue] = []
    for index, reward in enumerate(rewards):
        try:
            built.append(_named(reward, _build(reward, device, dtype)))
        except RewardError as error:
            field = {"model": "source", "plugin": "plugin", "http": "url"}[reward.type]
            issues.append(Issue(loc=("rewards", index, field), msg=str(error)))
        except SpecError as error:
            issues += [Issue(loc=("rewards", index, *issue.loc), msg=issue.msg) for issue in error.issues]
    if issues:
        raise SpecError(issues)
    return Scorer(built, wait)


def _named(spec: reward_kinds.Reward, reward: Reward) -> NamedReward:
    return NamedReward(
        spec.name,
        reward,
        spec.weight,
        retries=spec.retries if isinstance(spec, reward_kinds.AskedPart) else 0,
        fallback=spec.fallback if isinstance(spec, reward_kinds.FalliblePart) else None,
    )


def _build(reward: reward_kinds.Reward, device: torch.device | str, dtype: torch.dtype) -> Reward:
    match reward:
        case reward_kinds.AdapterReward():
            return ByAdapter()
        case reward_kinds.StringCheck():
            return StringCheckReward(reward.operation, Reference(reward.reference, reward.column))
        case reward_kinds.TextSimilarity():
            return TextSimilarityReward(reward.metric, Reference(reward.reference, reward.column))
        case reward_kinds.JsonSchema():
            return JsonSchemaReward(reward.json_schema, reward.match, reward.no_match)
        case reward_kinds.Regex():
            return RegexReward(reward.pattern, reward.match, reward.no_match)
        case reward_kinds.Length():
            return LengthReward(reward.target, reward.unit)
        case reward_kinds.Plugin():
            return plugin.load(reward.plugin, reward.options)
        case reward_kinds.Http():
            return _http(reward)
        case reward_kinds.ModelReward():
            return _load_model(reward, device, dtype)


def _http(reward: reward_kinds.Http) -> HttpReward:
    """Raises RewardError about the URL, or SpecError about the key."""
    key: bytes | None = None
    if reward.signing_key is not None:
        try:
            key = key_of(reveal(reward.signing_key.secret))
        except RewardError as error:
            raise SpecError([Issue(loc=("signing_key",), msg=str(error))]) from None
    return HttpReward(
        reward.url,
        reward.batch_size,
        reward.concurrency,
        reward.timeout,
        key,
        allow_private=os.environ.get(reward_kinds.HTTP_ALLOW_PRIVATE) == "1",
    )


def _load_model(
    reward: reward_kinds.ModelReward, device: torch.device | str, dtype: torch.dtype
) -> ModelReward:
    source = reward.source
    name, revision = (source.path, None) if source.type == "local" else (source.repo, source.revision)
    return ModelReward.load(
        name, revision=revision, chat_template=reward.chat_template, dtype=dtype, device=device
    )
