"""From logits and uniform numbers to tokens, by inverting the distribution function.

The uniform numbers belong to rows: which token a row gets depends on its own logits and its own number,
never on the batch it is sampled in. This module does not know models or stop tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ppo_engine.draws import Purpose, stream


def row_uniforms(
    seed: int, update: int, rows: Sequence[int], length: int, purpose: Purpose = Purpose.ROLLOUT
) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), float64 [len(rows), length]: one per row and token.

    rows: positions in the update's batch, over all processes. A row's first numbers do not depend on
    `length`, nor on the other rows.
    """
    uniforms = np.empty((len(rows), length))
    for index, row in enumerate(rows):
        stream(seed, purpose, update, row).random(out=uniforms[index])
    return uniforms


def sample(logits_BV: Tensor, uniforms_B: Tensor, temperature: float) -> Tensor:
    """One token id per row, int64 [B].

    The distribution is softmax(logits / temperature), summed up in float64; temperature 0 takes the token
    with the largest logit, the first of equals. A token of probability zero is never taken.

    Raises:
        FloatingPointError: a row's logits hold NaN or +inf, or nothing but -inf.
    """
    if temperature == 0:
        _require_numbers(logits_BV.amax(-1))
        return logits_BV.argmax(-1)
    probabilities_BV = (logits_BV.float() / temperature).softmax(-1)
    cdf_BV = probabilities_BV.cumsum(-1, dtype=torch.float64)
    total_B = cdf_BV[:, -1]
    _require_numbers(total_B)
    return _invert(probabilities_BV, cdf_BV, uniforms_B.to(total_B) * total_B)


def logprobs_of(tokens_B: Tensor, logits_BV: Tensor, temperature: float) -> Tensor:
    """Log-probability [B], fp32, of each row's token, by the distribution `sample` draws from."""
    if temperature == 0:
        return torch.zeros(len(tokens_B), device=logits_BV.device)
    logprobs_BV = (logits_BV.float() / temperature).log_softmax(-1)
    return logprobs_BV.gather(-1, tokens_B[:, None]).squeeze(-1)


def _invert(probabilities_BV: Tensor, cdf_BV: Tensor, targets_B: Tensor) -> Tensor:
    """The first token whose cdf exceeds the target, or the last, where rounding puts the target at the end.

    Should that one be of probability zero, the last possible token before it: a cumulative sum made in
    parallel may rise by a rounding error where nothing is added.
    """
    found_B = torch.searchsorted(cdf_BV, targets_B[:, None], right=True).squeeze(-1)
    found_B = found_B.clamp(max=cdf_BV.shape[1] - 1)
    is_possible_B = probabilities_BV.gather(-1, found_B[:, None]).squeeze(-1) > 0
    if bool(is_possible_B.all()):
        return found_B
    token_V = torch.arange(cdf_BV.shape[1], device=cdf_BV.device)
    possible_BV = (probabilities_BV > 0) & (token_V <= found_B[:, None])
    nearest_B = torch.where(possible_BV, token_V, -1).amax(-1)
    return torch.where(is_possible_B, found_B, nearest_B)


def _require_numbers(values_B: Tensor) -> None:
    if not bool(values_B.isfinite().all()):
        row = int((~values_B.isfinite()).int().argmax())
        raise FloatingPointError(f"The logits of row {row} are not numbers; the policy has diverged.")
