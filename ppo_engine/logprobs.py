"""From hidden states to log-probabilities and entropies of tokens, in chunks.

The logits of all positions and of the whole vocabulary never exist at once, so the peak of memory does not
grow with vocabulary x length x batch. Shape letters as in `batch.py`; N: response tokens of all rows; C: of a
chunk. This module does not know adapters, values, or what is learned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**24  # logits held at a time: 64 MiB in fp32
_LEAST = -200.0  # of a log-probability: at it p is zero in fp32, and with it p log p
_BLOCK_ELEMENTS = {"cpu": 2**18}  # logits worked on at a time: what a core's cache holds

Entropies = Literal["none", "value", "gradient"]
"""Of a distribution: not asked for, asked for, or asked for with a gradient."""


def output_logits(model: Any, temperature: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Hidden states → fp32 logits over the temperature, as the model's own forward makes them.

    Its scaling and capping are included. Where nothing stands between, hidden states are scaled in place of
    logits: they are narrower by far.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    has_bias = getattr(head, "bias", None) is not None or any(getattr(head, "lora_bias", {}).values())
    is_linear = cap is None and not has_bias

    def logits(hidden_ND: Tensor) -> Tensor:
        is_mixed = hidden_ND.dtype != torch.float32 or torch.is_autocast_enabled(hidden_ND.device.type)
        if is_linear and not is_mixed:  # half precision would round what is scaled
            return head(_scaled(hidden_ND, factor / temperature))  # type: ignore[no-any-return]
        logits_NV = _scaled(head(hidden_ND).float(), factor)
        return _scaled(logits_NV if cap is None else cap * torch.tanh(logits_NV / cap), 1 / temperature)

    return logits


def _scaled(values: Tensor, factor: float) -> Tensor:
    return values if factor == 1 else values * factor


def token_logprobs(
    hidden_ND: Tensor,
    targets_N: Tensor,
    logits: Callable[[Tensor], Tensor],
    chunk: int,
    entropies: Entropies,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target, and entropy where it is asked for; both [N].

    More than `chunk` tokens are taken chunk by chunk, their logits made again in the backward pass.
    """

    def of_chunk(hidden_CD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor | None]:
        return of_logits(logits(hidden_CD), targets_C, entropies)

    if len(hidden_ND) <= chunk:
        return of_chunk(hidden_ND, targets_N)
    parts = [
        checkpoint(of_chunk, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(torch.split(hidden_ND, chunk), torch.split(targets_N, chunk), strict=True)
    ]
    logprobs_N = torch.cat([logprobs for logprobs, _ in parts])
    return logprobs_N, None if entropies == "none" else torch.cat([entropy for _, entropy in parts])


def of_logits(logits_NV: Tensor, targets_N: Tensor, entropies: Entropies) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target, and the entropy where it is asked for, in nats; both [N].

    logits_NV: fp32; of -inf, a token is of probability zero. log p = z - log sum e^z; H = -sum p log p.
    """
    logprobs_N, entropies_N = _OfLogits.apply(logits_NV, targets_N, entropies)  # type: ignore[no-untyped-call]
    return logprobs_N, None if entropies == "none" else entropies_N


class _OfLogits(torch.autograd.Function):
    """In blocks of rows that stay in a CPU's cache; nothing as wide as the vocabulary is kept but the logits.

    Gradients, for token i and target t: of log p_t, [i = t] - p_i; of H, -p_i (log p_i + H).
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets_N: Tensor, entropies: Entropies
    ) -> tuple[Tensor, Tensor]:
        logprobs_N, entropies_N = (logits_NV.new_empty(len(logits_NV)) for _ in range(2))
        for block in _blocks(logits_NV):
            logprobs_CV = logits_NV[block].log_softmax(-1)
            logprobs_N[block] = logprobs_CV.gather(-1, targets_N[block, None]).squeeze(-1)
            if entropies != "none":
                entropies_N[block] = _entropy(logprobs_CV)
        ctx.save_for_backward(logits_NV, targets_N, entropies_N)
        ctx.has_gradient = entropies == "gradient"
        if not ctx.has_gradient:
            ctx.mark_non_differentiable(entropies_N)
        return logprobs_N, entropies_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprobs_N: Tensor, of_entropies_N: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, targets_N, entropies_N = ctx.saved_tensors
        gradient_NV = torch.empty_like(logits_NV)
        for block in _blocks(logits_NV):
            of_logprobs_C1 = of_logprobs_N[block, None]
            logprobs_CV = logits_NV[block].log_softmax(-1)
            gradient_CV = torch.exp(logprobs_CV, out=gradient_NV[block])
            if ctx.has_gradient:
                surprise_CV = _finite(logprobs_CV).add_(entropies_N[block, None])
                gradient_CV.mul_(surprise_CV.mul_(of_entropies_N[block, None]).add_(of_logprobs_C1).neg_())
            else:
                gradient_CV.mul_(-of_logprobs_C1)
            gradient_CV.scatter_add_(-1, targets_N[block, None], of_logprobs_C1)
        return gradient_NV, None, None


def _blocks(logits_NV: Tensor) -> list[slice]:
    rows, vocabulary = logits_NV.shape
    size = max(1, _BLOCK_ELEMENTS.get(logits_NV.device.type, CHUNK_ELEMENTS) // vocabulary)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _entropy(logprobs_NV: Tensor) -> Tensor:
    """A token of probability zero adds nothing."""
    return logprobs_NV.exp().mul_(_finite(logprobs_NV)).sum(-1).neg_()


def _finite(logprobs_NV: Tensor) -> Tensor:
    return logprobs_NV.clamp(min=_LEAST)
