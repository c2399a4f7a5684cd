"""Policy and value as one module with one forward: the only thing that is prepared for training.

The forward computes what PPO needs of a micro-batch, for response tokens only: the log-probability and
entropy of each token, and the value before it. Logits are made in chunks, so the peak of memory does not
grow with vocabulary x length x batch. Shape letters as in `batch.py`; N: response tokens of all rows.
This module does not know adapters' roles, what is learned, or processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from ppo_engine.adapters import REWARD_HEADS, Switch, parameters_of
from ppo_engine.logprobs import CHUNK_ELEMENTS, Entropies, output_logits, token_logprobs
from ppo_engine.packing import Packed, Padded, pack


@dataclass(frozen=True)
class TokenOutputs:
    """Per response token, rows one after the other, fp32.

    logprobs_N, entropies_N: of the distribution sampled from (temperature applied). values_N: of the state
    before the token. None: what was not asked for.
    """

    logprobs_N: Tensor
    entropies_N: Tensor | None
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


class ScalarHead(nn.Linear):
    """A linear map from hidden state to one number that starts at zero.

    It computes in fp32, whatever it holds.
    """

    def __init__(self, width: int, *, bias: bool = True) -> None:
        super().__init__(width, 1, bias=bias)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(hidden_ND.float(), self.weight.float(), bias).squeeze(-1)


class ActorCritic(nn.Module):
    """A policy and, if asked for, its value, and a reward on the policy's own base.

    policy: a causal language model, or a peft model around one.
    value_model: a sequence-classification model with a `score` head and a trunk of its own, or None.
    value_head: with no value_model, put a head on the policy's trunk.
    value_adapter: the policy's adapter with which the trunk computes for that head; None: the policy's own.
    reward_adapter: the policy's adapter whose score is a reward; its head lies on the policy.
    """

    def __init__(
        self,
        policy: nn.Module,
        value_model: nn.Module | None,
        *,
        value_head: bool,
        value_adapter: str | None = None,
        reward_adapter: str | None = None,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        width = causal_lm(policy).config.get_text_config().hidden_size
        self.value_head = ScalarHead(width) if value_head and value_model is None else None
        self.value_adapter = value_adapter
        self.reward_adapter = reward_adapter
        self.is_packed = False
        self._switch = Switch(policy)

    def pack(self) -> bool:
        """Read rows without their padding from now on, if all trunks can; returns whether they do."""
        models = [causal_lm(self.policy), *([] if self.value_model is None else [self.value_model])]
        self.is_packed = all(pack(model) for model in models)
        return self.is_packed

    def unpack(self) -> None:
        """Read padded rows from now on; without groups, attention is PyTorch's own."""
        self.is_packed = False

    def critic_parameters(self) -> list[nn.Parameter]:
        """What the value alone is made of: its head and adapter, or its model."""
        parts = [part for part in (self.value_head, self.value_model) if part is not None]
        found = [parameter for part in parts for parameter in part.parameters()]
        if self.value_adapter is not None:
            found += parameters_of(self.policy, self.value_adapter).values()
        return found

    @property
    def critic(self) -> str | None:
        """What gives the values: "head", "adapter", or "model"; None: nothing does."""
        if self.value_model is not None:
            return "model"
        if self.value_head is None:
            return None
        return "head" if self.value_adapter is None else "adapter"

    @property
    def config(self) -> Any:
        return causal_lm(self.policy).config

    def forward(self, *rows: Tensor, **asked: Any) -> TokenOutputs | Tensor:
        """`token_outputs` of right-padded rows; or with `of_reward=True` the `reward_scores`, or with
        `of_value=True` the `values`.

        What is prepared for several processes has this one entrance.
        """
        if asked.pop("of_reward", False):
            return self.reward_scores(*rows, **asked)
        if asked.pop("of_value", False):
            return self.values(*rows, **asked)
        return self.token_outputs(*rows, **asked)

    def token_outputs(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        prompt_lengths_B: Tensor,
        response_lengths_B: Tensor,
        *,
        temperature: float,
        with_value: bool = True,
        critic_only: bool = False,
        entropies: Entropies = "none",
    ) -> TokenOutputs:
        """Log-probabilities, entropies, and values of the response tokens of right-padded rows.

        critic_only: the values' gradient stops at a trunk that is the policy's.
        """
        slots_BT = response_slots(prompt_lengths_B, response_lengths_B, input_ids_BT.shape[1])
        targets_N = input_ids_BT[:, 1:][slots_BT[:, :-1]]
        model = causal_lm(self.policy)
        rows = self._rows(input_ids_BT, attention_mask_BT)
        hidden_ND = rows.read(trunk(model), slots_BT)
        chunk = max(1, CHUNK_ELEMENTS // model.config.get_text_config().vocab_size)
        logprobs_N, entropies_N = token_logprobs(
            hidden_ND, targets_N, output_logits(model, temperature), chunk, entropies
        )
        trunk_ND = hidden_ND.detach() if critic_only else hidden_ND
        values_N = self._values(trunk_ND, slots_BT, rows) if with_value else None
        return TokenOutputs(logprobs_N, entropies_N, values_N)

    def values(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        prompt_lengths_B: Tensor,
        response_lengths_B: Tensor,
    ) -> Tensor:
        """The values [N] alone, by a critic that has a forward of its own."""
        assert self.critic in ("adapter", "model"), "the policy's own forward has the values, or none has"
        slots_BT = response_slots(prompt_lengths_B, response_lengths_B, input_ids_BT.shape[1])
        values_N = self._values(None, slots_BT, self._rows(input_ids_BT, attention_mask_BT))
        assert values_N is not None
        return values_N

    def reward_scores(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        prompt_lengths_B: Tensor,
        response_lengths_B: Tensor,
    ) -> Tensor:
        """The reward adapter's score [B] of each row, fp32, read at its last token."""
        assert self.reward_adapter is not None, "asked of what has no reward adapter"
        rows = self._rows(input_ids_BT, attention_mask_BT)
        last_B1 = (prompt_lengths_B + response_lengths_B - 1)[:, None]
        is_last_BT = torch.arange(input_ids_BT.shape[1], device=last_B1.device) == last_B1
        with self._switch.computing_with(self.reward_adapter):
            last_BD = rows.read(trunk(causal_lm(self.policy)), is_last_BT)
        heads: Any = getattr(self.policy, REWARD_HEADS)
        return heads[self.reward_adapter](last_BD)  # type: ignore[no-any-return]

    def _rows(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Packed | Padded:
        if not self.is_packed:
            return Padded(input_ids_BT, attention_mask_BT)
        return Packed.of(input_ids_BT, attention_mask_BT.sum(1).tolist())

    def _values(self, hidden_ND: Tensor | None, slots_BT: Tensor, rows: Packed | Padded) -> Tensor | None:
        """hidden_ND: the policy's, for a head on them."""
        if self.value_adapter is not None:
            with self._switch.computing_with(self.value_adapter):
                hidden_ND = rows.read(trunk(causal_lm(self.policy)), slots_BT)
        if self.value_head is not None:
            return self.value_head(hidden_ND)  # type: ignore[no-any-return]
        if self.value_model is None:
            return None
        hidden_ND = rows.read(trunk(self.value_model), slots_BT)
        score: Any = self.value_model.score
        with torch.autocast(hidden_ND.device.type, enabled=False):  # values are not rounded to half precision
            values_N1 = score(hidden_ND.to(score.weight.dtype))
        return values_N1.float().squeeze(-1)  # type: ignore[no-any-return]
