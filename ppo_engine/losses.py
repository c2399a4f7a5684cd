"""The losses of PPO, and what is counted beside them, per token.

Functions of tensors of one shape, elementwise: what the tokens of a step weigh, and that their sum is
divided once, by the tokens of the whole optimizer step over all processes, is the caller's. Tokens out of
the mask are left out before they get here, so that nothing that stands there reaches a gradient. This
module does not know models, configs, or processes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

_MOST_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """Per token; only `loss` carries a gradient.

    clipped: 1 where a clip leaves the token without a gradient; else 0.
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
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), with rho = exp(logprobs - old_logprobs).

    Schulman et al. 2017 (arXiv 1707.06347), equation 7, negated to be minimised; a clip_high above clip_low
    as in Yu et al. 2025 (arXiv 2503.14476), section 3.1. dual_clip, above 1: where A < 0 the loss is at most
    -dual_clip A (Ye et al. 2020, arXiv 1912.09729, equation 5), which bounds it where rho is large.
    """
    log_ratio = logprobs - old_logprobs
    # Beyond what any clip lets through; an infinite ratio would have a gradient that is no number.
    ratio = log_ratio.clamp(-_MOST_LOG_RATIO, _MOST_LOG_RATIO).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss, flat = torch.maximum(plain, clipped), clipped > plain
    if dual_clip is not None:
        bound = -dual_clip * advantages
        beyond = (advantages < 0) & (loss > bound)
        loss, flat = torch.where(beyond, bound, loss), flat | beyond
    return PolicyLoss(
        loss=loss,
        clipped=flat.to(plain.dtype),
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


def token_weights(mask_BR: Tensor, aggregation: Literal["token_mean", "sequence_mean"]) -> Tensor:
    """What each token weighs in the loss of an optimizer step [B, R], fp32; 0 out of the mask.

    token_mean: all the same (Yu et al. 2025, arXiv 2503.14476, section 3.3). sequence_mean: those of a row
    share its weight of 1 (Shao et al. 2024, arXiv 2402.03300, equation 3). Divided once by their sum over all
    rows of the step, either is a mean.
    """
    weights_BR = mask_BR.float()
    if aggregation == "sequence_mean":
        weights_BR = weights_BR / weights_BR.sum(-1, keepdim=True).clamp(min=1)
    return weights_BR
