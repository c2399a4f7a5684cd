"""From scores to advantages: KL rewards, generalised advantage estimation, whitening.

Functions of tensors, shape letters as in `batch.py`; G: rows of one prompt. A mask tells which response
tokens the policy wrote; where it is False an input may hold anything, NaN included, and an output holds 0.
Results are fp32 or wider. This module does not know models, configs, or processes: it is given the whole
batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3", "abs"]

_GROUP_EPSILON = 1e-6  # beside a group's standard deviation, in units of the reward
_EPSILON = 1e-8  # under the root of a variance, as TRL and OpenAI's original have it
_ROUNDING = 1e-6  # of a score, in parts of it


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


@dataclass(frozen=True)
class RunningMoments:
    """Mean and spread of all scores so far; a value, which `including` makes the next of."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of the squared distances from the mean."""

    def including(self, values: Tensor) -> RunningMoments:
        """Of all so far and these too, in float64: Chan et al. 1983, the update of two samples."""
        new = values.detach().double().flatten()
        if not len(new):
            return self
        count = self.count + len(new)
        mean = float(new.mean())
        squares = float((new - mean).square().sum())
        distance = mean - self.mean
        return RunningMoments(
            count,
            self.mean + distance * len(new) / count,
            self.squares + squares + distance**2 * self.count * len(new) / count,
        )

    @property
    def std(self) -> float:
        """Unbiased; 1 where there are fewer than two values, or all are equal but for fp32's rounding."""
        std = (self.squares / (self.count - 1)) ** 0.5 if self.count > 1 else 0.0
        return std if std > _ROUNDING * abs(self.mean) else 1.0


def shaped_scores(
    scores_B: Tensor,
    dense_BR: Tensor | None,
    moments: RunningMoments | None,
    scale: float,
    clip: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Scores of rows [B], and of tokens [B, R] where there are any, normalised, then scaled, then clipped.

    moments: of the rows' totals. The mean comes off once, from the row's score; all are divided by the
    deviation (Engstrom et al. 2020, arXiv 2005.12729, section 3, scale rewards so).
    """
    scores_B = _wide(scores_B)
    factor = scale if moments is None else scale / moments.std
    shaped_B = (scores_B - (0.0 if moments is None else moments.mean)) * factor
    shaped_BR = None if dense_BR is None else _wide(dense_BR) * factor
    if clip is None:
        return shaped_B, shaped_BR
    return shaped_B.clamp(-clip, clip), None if shaped_BR is None else shaped_BR.clamp(-clip, clip)


def adapted_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The KL coefficient after a batch of so many episodes, whose responses have this mean KL.

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2: a proportional controller in log space, whose error
    is clipped to 20 %. horizon: in episodes. A KL that is no number leaves the coefficient as it is.
    """
    if math.isnan(kl):
        return kl_coef
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


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


def rloo(rewards_B: Tensor, group_size: int) -> Tensor:
    """Advantage of each response [B]: its reward less the mean of the others to the same prompt.

    Ahmadian et al. 2024 (arXiv 2402.14740), section 2.3: REINFORCE, leave one out. Rows of a group stand
    side by side; group_size: at least 2.
    """
    rewards_BG = _wide(rewards_B).view(-1, group_size)
    others_BG = (rewards_BG.sum(-1, keepdim=True) - rewards_BG) / (group_size - 1)
    return (rewards_BG - others_BG).flatten()


def grpo(rewards_B: Tensor, group_size: int) -> Tensor:
    """Advantage of each response [B]: its distance from its group's mean, in standard deviations.

    Shao et al. 2024 (arXiv 2402.03300), equation 4 and section 4.1.2; the deviation is the unbiased one. A
    group of equal rewards has advantages of 0. Rows of a group stand side by side; group_size: at least 2.
    """
    rewards_BG = rewards_B.double().view(-1, group_size)
    distances_BG = rewards_BG - rewards_BG.mean(-1, keepdim=True)
    deviations_BG = distances_BG / (rewards_BG.std(-1, keepdim=True) + _GROUP_EPSILON)
    return deviations_BG.flatten().to(_wide(rewards_B).dtype)


def discounted_returns(rewards_BR: Tensor, mask_BR: Tensor, gamma: float) -> Tensor:
    """Sum of the rewards from each token on, discounted per token the policy wrote [B, R].

    The advantages of REINFORCE++ (Hu 2025, arXiv 2501.03262, equation 5), before they are whitened: those of
    `gae` with values of 0 and lambda 1.
    """
    return gae(rewards_BR, torch.zeros_like(rewards_BR), mask_BR, gamma, 1.0)[0]


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
    tokens = int(mask.sum())
    exact = values.double()
    mean = float(masked_mean(exact, mask)) if tokens else 0.0
    var = float(masked_var(exact, mask)) if tokens > 1 else 1.0
    return Moments(tokens, mean, var)


def whiten(values: Tensor, mask: Tensor, mean: float, var: float, *, shift_mean: bool) -> Tensor:
    """Values scaled to unit variance, moved to mean 0 (advantages) or with their mean kept (rewards).

    Huang et al. 2024 (arXiv 2403.17031), details 18 and 20. mean, var: from `moments`.
    """
    return _within(mask, _scaled(values, mean, var, shift_mean=shift_mean))


def _scaled(values: Tensor, mean: float, var: float, *, shift_mean: bool) -> Tensor:
    scaled: Tensor = (_wide(values) - mean) * (var + _EPSILON) ** -0.5
    return scaled if shift_mean else scaled + mean


# The same under TRL's names: a mask here may be of bools, or of 0s and 1s, and what it leaves out stays.


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Mean of what lies within the mask, over everything or along one axis; of nothing it is NaN."""
    within = mask.bool()
    if axis is None:
        mean = values.masked_select(within).double().mean()
    else:
        mean = torch.where(within, values.double(), 0.0).sum(axis) / within.sum(axis)
    return mean.to(_wide(values).dtype)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of what lies within the mask.

    Raises:
        ValueError: too little lies within it: unbiased, a variance needs two values, else one.
    """
    kept = values.masked_select(mask.bool()).double()
    if len(kept) < 1 + unbiased:
        raise ValueError(
            f"mask has {len(kept)} values within it; {'an unbiased' if unbiased else 'a'} variance needs "
            f"{1 + unbiased} or more: give a larger batch."
        )
    squares: Tensor = (kept - kept.mean()).square().sum()
    return (squares / (len(kept) - unbiased)).to(_wide(values).dtype)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """All values, moved and scaled so that those within the mask are whitened, as by `whiten`.

    Raises:
        ValueError: fewer than two lie within it.
    """
    exact = values.double()
    mean, var = float(masked_mean(exact, mask)), float(masked_var(exact, mask))
    return _scaled(values, mean, var, shift_mean=shift_mean)


def _wide(values: Tensor) -> Tensor:
    """At least fp32: half precision is for forwards."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _within(mask: Tensor, values: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0)
