"""From scores to advantages: KL rewards, generalised advantage estimation, whitening.

Functions of tensors, shape letters as in `batch.py`. A mask tells which response tokens the policy wrote;
where it is False an input may hold anything, NaN included, and an output holds 0. Results are fp32 or
wider. This module does not know models, configs, or processes: it is given the whole batch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3", "abs"]

_EPSILON = 1e-8  # under the root of a variance, as TRL and OpenAI's original have it


def kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens that the policy wrote; shape as given.

    With log r = ref_logprobs - logprobs (Schulman 2020, "Approximating KL divergence"):
    k1 = -log r (unbiased); k2 = (log r)^2 / 2; k3 = (r - 1) - log r (unbiased, never negative);
    abs = |log r|.
    """
    log_ratio = _wide(ref_logprobs) - _wide(logprobs)
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return log_ratio.square() / 2
        case "k3":
            return log_ratio.expm1() - log_ratio
        case "abs":
            return log_ratio.abs()


def missing_stop(scores_B: Tensor, finished_B: Tensor, penalty: float | None) -> Tensor:
    """Scores less a fixed penalty where the response did not reach its stop token.

    Ziegler et al. 2019 (arXiv 1909.08593), section 3.1.2, give such responses a fixed low reward; as TRL,
    we take the penalty off. None: nothing is taken off.
    """
    if penalty is None:
        return _wide(scores_B)
    return torch.where(finished_B, _wide(scores_B), _wide(scores_B) - penalty)


def token_rewards(
    scores_B: Tensor,
    kl_BR: Tensor,
    mask_BR: Tensor,
    kl_coef: float,
    dense_scores_BR: Tensor | None = None,
) -> Tensor:
    """Reward of each response token [B, R]: -kl_coef * KL_t, plus the score at the row's last token.

    Ziegler et al. 2019 (arXiv 1909.08593), equation 2. dense_scores_BR: a score per token, added where it
    stands. The last token is the last one within the mask; a row without any gets no reward.
    """
    rewards_BR = kl_rewards(kl_BR, kl_coef)
    if dense_scores_BR is not None:
        rewards_BR = rewards_BR + _wide(dense_scores_BR)
    scored_BR = rewards_BR + _wide(scores_B)[:, None]
    return _within(mask_BR, torch.where(_last_token(mask_BR), scored_BR, rewards_BR))


def kl_rewards(kl_BR: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * KL_t; with a coefficient of 0 it is 0, also where an estimate has overflowed."""
    return -kl_coef * _wide(kl_BR) if kl_coef else torch.zeros_like(_wide(kl_BR))


def _last_token(mask_BR: Tensor) -> Tensor:
    """True at the last True of each row."""
    remaining_BR = mask_BR.flip(-1).cumsum(-1).flip(-1)
    return mask_BR & (remaining_BR == 1)


def gae(
    rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both [B, R].

    Schulman et al. 2015 (arXiv 1506.02438), equations 11, 12, 16, backwards in time, with V = 0 after the
    last token: delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; returns = A + V.
    Tokens out of the mask are skipped: t + 1 is the next token within it, so nothing is rewarded at, or
    discounted through, what the policy did not write.
    """
    rewards_BR, values_BR = _wide(rewards_BR), _wide(values_BR)
    advantages_BR = torch.zeros_like(values_BR)
    next_value_B = torch.zeros_like(values_BR[:, 0])
    next_advantage_B = torch.zeros_like(next_value_B)
    for t in reversed(range(values_BR.shape[1])):
        delta_B = rewards_BR[:, t] + gamma * next_value_B - values_BR[:, t]
        advantage_B = delta_B + gamma * lam * next_advantage_B
        next_advantage_B = torch.where(mask_BR[:, t], advantage_B, next_advantage_B)
        next_value_B = torch.where(mask_BR[:, t], values_BR[:, t], next_value_B)
        advantages_BR[:, t] = advantage_B
    return _within(mask_BR, advantages_BR), _within(mask_BR, advantages_BR + values_BR)


class Moments(NamedTuple):
    """Of the masked tokens of a whole batch.

    tokens: how many. var: unbiased; 1 where fewer than two tokens leave it undefined.
    """

    tokens: int
    mean: float
    var: float


def moments(values: Tensor, mask: Tensor) -> Moments:
    """Mean and unbiased variance of what lies within the mask; no tokens have mean 0.

    In float64 and two passes: the distances from the mean are squared, since E[x^2] - E[x]^2 loses all its
    digits where the mean is large.
    """
    kept = values[mask].double()
    tokens = len(kept)
    mean = kept.sum() / max(tokens, 1)
    var = float((kept - mean).square().sum()) / (tokens - 1) if tokens > 1 else 1.0
    return Moments(tokens, float(mean), var)


def whiten(values: Tensor, mask: Tensor, mean: float, var: float, *, shift_mean: bool) -> Tensor:
    """Values scaled to unit variance, moved to mean 0 (advantages) or with their mean kept (rewards).

    Huang et al. 2024 (arXiv 2403.17031), details 18 and 20. mean, var: from `moments`.
    """
    whitened = (_wide(values) - mean) * (var + _EPSILON) ** -0.5
    return _within(mask, whitened if shift_mean else whitened + mean)


def _wide(values: Tensor) -> Tensor:
    """At least fp32: half precision is for forwards."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _within(mask: Tensor, values: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0)
