"""The losses of PPO, and what is counted beside them, per token.

Functions of tensors of one shape, elementwise: what the tokens of a step weigh, and that their sum is
divided once, by the tokens of the whole optimizer step over all processes, is the caller's. Tokens out of
the mask are left out before they get here, so that nothing that stands there reaches a gradient. This
module does not know models, configs, or processes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    """Per token; only `loss` carries a gradient.

    clipped: 1 where the clipped term is the larger one, so that the token has no gradient; else 0.
    ratio: probability now over probability when written. approxkl: (log ratio)^2 / 2, TRL's estimate of how
    far the policy has moved since.
    """

    loss: Tensor
    clipped: Tensor
    ratio: Tensor
    approxkl: Tensor


class ValueLoss(NamedTuple):
    """Per token; only `loss` carries a gradient. clipped: 1 where the clipped term is the larger one."""

    loss: Tensor
    clipped: Tensor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> PolicyLoss:
    """max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), with rho = exp(logprobs - old_logprobs).

    Schulman et al. 2017 (arXiv 1707.06347), equation 7, negated to be minimised.
    """
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    return PolicyLoss(
        loss=torch.maximum(plain, clipped),
        clipped=(clipped > plain).to(plain.dtype),
        ratio=ratio.detach(),
        approxkl=log_ratio.detach().square() / 2,
    )


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> ValueLoss:
    """max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2.

    Huang et al. 2024 (arXiv 2403.17031), after OpenAI's baselines: the value may not gain from moving
    further than `clip` from its old prediction in one update.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    plain = (values - returns).square()
    clipped = (near - returns).square()
    return ValueLoss(torch.maximum(plain, clipped) / 2, (clipped > plain).to(plain.dtype))


def entropy(logprobs_NV: Tensor) -> Tensor:
    """-sum of p log p over the vocabulary [N], in nats; a token of probability zero adds nothing."""
    entropies_N: Tensor = torch.special.entr(logprobs_NV.exp()).sum(-1)
    return entropies_N
