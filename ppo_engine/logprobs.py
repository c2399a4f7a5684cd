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
from torch.utils.checkpoint import checkpoint

from ppo_engine.losses import entropy

CHUNK_ELEMENTS = 2**24  # logits held at a time: 64 MiB in fp32

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
        logprobs_CV = logits(hidden_CD).log_softmax(-1)
        entropies_C = None
        if entropies != "none":
            with torch.set_grad_enabled(entropies == "gradient" and torch.is_grad_enabled()):
                entropies_C = entropy(logprobs_CV)
        return logprobs_CV.gather(-1, targets_C[:, None]).squeeze(-1), entropies_C

    if len(hidden_ND) <= chunk:
        return of_chunk(hidden_ND, targets_N)
    parts = [
        checkpoint(of_chunk, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(torch.split(hidden_ND, chunk), torch.split(targets_N, chunk), strict=True)
    ]
    logprobs_N = torch.cat([logprobs for logprobs, _ in parts])
    return logprobs_N, None if entropies == "none" else torch.cat([entropy for _, entropy in parts])
