"""Policy and value as one module with one forward: the only thing that is prepared for training.

The forward computes what PPO needs of a micro-batch, for response tokens only: the log-probability and
entropy of each token, and the value before it. Logits are made in chunks, so the peak of memory does not
grow with vocabulary x length x batch. Shape letters as in `batch.py`; N: response tokens of all rows.
This module does not know adapters' roles, what is learned, or processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ppo_engine.losses import entropy

_CHUNK_ELEMENTS = 2**24  # logits held at a time: 64 MiB in fp32


@dataclass(frozen=True)
class TokenOutputs:
    """Per response token, rows one after the other, fp32.

    logprobs_N, entropies_N: of the distribution sampled from (temperature applied). values_N: of the state
    before the token; None where the module has no value. Entropies carry no gradient.
    """

    logprobs_N: Tensor
    entropies_N: Tensor
    values_N: Tensor | None


def causal_lm(policy: nn.Module) -> Any:
    """The language model itself, inside peft's wrapper where there is one; adapters stay in place."""
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def trunk(model: nn.Module) -> Any:
    """The part of a transformers model that ends in hidden states."""
    return getattr(model, str(model.base_model_prefix))


def response_slots(prompt_lengths_B: Tensor, response_lengths_B: Tensor, width: int) -> Tensor:
    """Mask [B, width] of the positions whose hidden state predicts a response token."""
    position_1T = torch.arange(width, device=prompt_lengths_B.device)[None]
    first_B1 = prompt_lengths_B[:, None] - 1
    return (position_1T >= first_B1) & (position_1T < first_B1 + response_lengths_B[:, None])


class ValueHead(nn.Linear):
    """A linear map from hidden state to value that starts at zero and computes in fp32, whatever it holds."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return F.linear(hidden_ND.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class ActorCritic(nn.Module):
    """A policy and, if asked for, its value.

    policy: a causal language model, or a peft model around one.
    value_model: a sequence-classification model with a `score` head and a trunk of its own, or None.
    value_head: with no value_model, put a head on the policy's trunk.
    """

    def __init__(self, policy: nn.Module, value_model: nn.Module | None, *, value_head: bool) -> None:
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        width = causal_lm(policy).config.get_text_config().hidden_size
        self.value_head = ValueHead(width) if value_head and value_model is None else None

    @property
    def config(self) -> Any:
        return causal_lm(self.policy).config

    def forward(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        prompt_lengths_B: Tensor,
        response_lengths_B: Tensor,
        *,
        temperature: float,
        with_value: bool = True,
    ) -> TokenOutputs:
        """Log-probabilities, entropies, and values of the response tokens of right-padded rows."""
        slots_BT = response_slots(prompt_lengths_B, response_lengths_B, input_ids_BT.shape[1])
        targets_N = input_ids_BT[:, 1:][slots_BT[:, :-1]]
        model = causal_lm(self.policy)
        inputs = {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "use_cache": False}
        hidden_ND = trunk(model)(**inputs).last_hidden_state[slots_BT]
        chunk = max(1, _CHUNK_ELEMENTS // model.config.get_text_config().vocab_size)
        logprobs_N, entropies_N = token_logprobs(
            hidden_ND, targets_N, output_logits(model), temperature, chunk
        )
        values_N = self._values(hidden_ND, slots_BT, inputs) if with_value else None
        return TokenOutputs(logprobs_N, entropies_N, values_N)

    def _values(self, hidden_ND: Tensor, slots_BT: Tensor, inputs: dict[str, Any]) -> Tensor | None:
        if self.value_head is not None:
            return self.value_head(hidden_ND)  # type: ignore[no-any-return]
        if self.value_model is None:
            return None
        hidden_ND = trunk(self.value_model)(**inputs).last_hidden_state[slots_BT]
        score: Any = self.value_model.score
        return score(hidden_ND).float().squeeze(-1)  # type: ignore[no-any-return]


def output_logits(model: Any) -> Callable[[Tensor], Tensor]:
    """Hidden states → fp32 logits as the model's own forward makes them, its scaling and capping included."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden_ND: Tensor) -> Tensor:
        logits_NV: Tensor = head(hidden_ND).float() * (scale / divisor)
        return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)

    return logits


def token_logprobs(
    hidden_ND: Tensor,
    targets_N: Tensor,
    logits: Callable[[Tensor], Tensor],
    temperature: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and entropy, at a temperature; both [N].

    More than `chunk` tokens are taken chunk by chunk, their logits made again in the backward pass.
    """

    def of_chunk(hidden_CD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        logprobs_CV = (logits(hidden_CD) / temperature).log_softmax(-1)
        with torch.no_grad():
            entropies_C = entropy(logprobs_CV)
        return logprobs_CV.gather(-1, targets_C[:, None]).squeeze(-1), entropies_C

    if len(hidden_ND) <= chunk:
        return of_chunk(hidden_ND, targets_N)
    parts = [
        checkpoint(of_chunk, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(torch.split(hidden_ND, chunk), torch.split(targets_N, chunk), strict=True)
    ]
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropies for _, entropies in parts])
