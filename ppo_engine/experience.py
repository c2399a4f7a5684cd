"""From a scored rollout to experience: rewards per token, whitening, advantages, returns.

The whole batch is here, of all processes, so statistics are the batch's. This module knows the arithmetic's
order; it does not know models, processes, or text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppo_engine.advantages import gae, kl, missing_stop, moments, token_rewards, whiten
from ppo_engine.batch import Experience, Rollout, response_mask, unflatten_tokens
from ppo_engine.rewards import Scores
from ppo_engine.spec import Hyperparameters


@dataclass(frozen=True)
class TokenScores:
    """What the models say of each response token, [B, R], zero beyond a row's length."""

    logprobs_BR: Tensor
    ref_logprobs_BR: Tensor
    values_BR: Tensor


def experience_of(
    rollout: Rollout, scores: Scores, tokens: TokenScores, ppo: Hyperparameters
) -> tuple[Experience, Tensor]:
    """The experience of a batch, and the KL of each of its tokens [B, R]."""
    device, width = tokens.logprobs_BR.device, tokens.logprobs_BR.shape[1]
    lengths_B = torch.tensor([len(ids) for ids in rollout.response_ids], device=device)
    mask_BR = response_mask(lengths_B, width)
    kl_BR = kl(tokens.logprobs_BR, tokens.ref_logprobs_BR, ppo.kl_estimator)
    kl_BR = torch.where(mask_BR, kl_BR, 0.0)
    scores_B = missing_stop(
        torch.tensor(scores.scores, device=device),
        torch.tensor(rollout.finished, device=device),
        ppo.missing_eos_penalty,
    )
    dense_BR = None if scores.dense is None else _padded(scores.dense, lengths_B, width)
    rewards_BR = token_rewards(scores_B, kl_BR, mask_BR, ppo.kl_coef, dense_BR)
    advantages_BR, returns_BR = gae(
        _whitened(rewards_BR, mask_BR, shift_mean=False) if ppo.whiten_rewards else rewards_BR,
        tokens.values_BR,
        mask_BR,
        ppo.gamma,
        ppo.lam,
    )
    experience = Experience(
        prompt_ids=rollout.prompt_ids,
        response_ids=rollout.response_ids,
        response_lengths_B=lengths_B,
        logprobs_BR=tokens.logprobs_BR,
        ref_logprobs_BR=tokens.ref_logprobs_BR,
        values_BR=tokens.values_BR,
        rewards_BR=rewards_BR,
        advantages_BR=_whitened(advantages_BR, mask_BR, shift_mean=True),
        returns_BR=returns_BR,
        mask_BR=mask_BR,
    )
    return experience, kl_BR


def _whitened(values_BR: Tensor, mask_BR: Tensor, *, shift_mean: bool) -> Tensor:
    of_batch = moments(values_BR, mask_BR)
    return whiten(values_BR, mask_BR, of_batch.mean, of_batch.var, shift_mean=shift_mean)


def _padded(rows: list[list[float]], lengths_B: Tensor, width: int) -> Tensor:
    values_N = torch.tensor([value for row in rows for value in row], device=lengths_B.device)
    return unflatten_tokens(values_N, lengths_B, width)
