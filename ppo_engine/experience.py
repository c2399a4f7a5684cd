"""From a scored rollout to experience: rewards per token, whitening, advantages, returns.

The whole batch is here, of all processes, so statistics are the batch's. This module knows the arithmetic's
order; it does not know models, processes, or text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppo_engine.advantages import (
    RunningMoments,
    discounted_returns,
    gae,
    grpo,
    kl,
    missing_stop,
    moments,
    rloo,
    shaped_scores,
    token_rewards,
    whiten,
)
from ppo_engine.batch import Experience, Rollout, padded, response_mask, unflatten_tokens
from ppo_engine.hyperparameters import Hyperparameters
from ppo_engine.losses import token_weights
from ppo_engine.rewards import Scores


@dataclass(frozen=True)
class TokenScores:
    """What the models say of each response token, [B, R], zero beyond a row's length.

    values_BR: None without a critic.
    """

    logprobs_BR: Tensor
    ref_logprobs_BR: Tensor
    values_BR: Tensor | None


def experience_of(
    rollout: Rollout,
    scores: Scores,
    tokens: TokenScores,
    ppo: Hyperparameters,
    kl_coef: float,
    score_moments: RunningMoments | None,
) -> tuple[Experience, Tensor]:
    """The experience of a batch, and the KL of each of its tokens [B, R].

    kl_coef: as it is now. score_moments: where scores are normalised, of all scores so far, these included.
    """
    device, width = tokens.logprobs_BR.device, tokens.logprobs_BR.shape[1]
    lengths_B = torch.tensor([len(ids) for ids in rollout.response_ids], device=device)
    mask_BR = _written(rollout, lengths_B, width)
    kl_BR = kl(tokens.logprobs_BR, tokens.ref_logprobs_BR, ppo.kl_estimator)
    kl_BR = torch.where(mask_BR, kl_BR, 0.0)
    scores_B, dense_BR = shaped_scores(
        torch.tensor(scores.scores, device=device),
        None if scores.dense is None else padded(scores.dense, device),
        score_moments,
        ppo.score_scale,
        ppo.score_clip,
    )
    scores_B = missing_stop(scores_B, torch.tensor(rollout.finished, device=device), ppo.missing_eos_penalty)
    kl_price = kl_coef if ppo.kl_placement == "reward" else 0.0
    rewards_BR = token_rewards(scores_B, kl_BR, mask_BR, kl_price, dense_BR)
    advantages_BR, returns_BR = advantages_of(rewards_BR, tokens.values_BR, mask_BR, ppo)
    experience = Experience(
        prompt_ids=rollout.prompt_ids,
        response_ids=rollout.response_ids,
        response_lengths_B=lengths_B,
        logprobs_BR=tokens.logprobs_BR,
        ref_logprobs_BR=tokens.ref_logprobs_BR,
        rewards_BR=rewards_BR,
        advantages_BR=advantages_BR,
        values_BR=tokens.values_BR,
        returns_BR=returns_BR,
        mask_BR=mask_BR,
        weights_BR=token_weights(mask_BR, ppo.loss_aggregation),
    )
    return experience, kl_BR


def advantages_of(
    rewards_BR: Tensor, values_BR: Tensor | None, mask_BR: Tensor, ppo: Hyperparameters
) -> tuple[Tensor, Tensor | None]:
    """Advantages [B, R] by the estimator asked for, and with a critic the returns [B, R]."""
    if ppo.whiten_rewards:
        rewards_BR = _whitened(rewards_BR, mask_BR, shift_mean=False)
    returns_BR = None
    match ppo.advantage_estimator:
        case "gae":
            assert values_BR is not None, "gae has a critic"
            advantages_BR, returns_BR = gae(rewards_BR, values_BR, mask_BR, ppo.gamma, ppo.lam)
        case "reinforce++":
            advantages_BR = discounted_returns(rewards_BR, mask_BR, ppo.gamma)
        case "rloo" | "grpo":
            compare = rloo if ppo.advantage_estimator == "rloo" else grpo
            advantages_B = compare(rewards_BR.double().sum(-1), ppo.num_return_sequences)
            advantages_BR = torch.where(mask_BR, advantages_B[:, None], 0.0).to(rewards_BR.dtype)
    if ppo.whitens_advantages:
        advantages_BR = _whitened(advantages_BR, mask_BR, shift_mean=True)
    return advantages_BR, returns_BR


def _whitened(values_BR: Tensor, mask_BR: Tensor, *, shift_mean: bool) -> Tensor:
    of_batch = moments(values_BR, mask_BR)
    return whiten(values_BR, mask_BR, of_batch.mean, of_batch.var, shift_mean=shift_mean)


def _written(rollout: Rollout, lengths_B: Tensor, width: int) -> Tensor:
    if rollout.written is None:
        return response_mask(lengths_B, width)
    flags_N = torch.tensor([flag for row in rollout.written for flag in row], device=lengths_B.device)
    return unflatten_tokens(flags_N, lengths_B, width)
