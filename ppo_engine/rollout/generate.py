"""Sampling responses from a policy, with a key-value cache and random numbers that belong to rows.

Prompts are padded on the left to the longest of their batch; rows that have ended leave the batch. This
module knows no rewards, no training, and no processes but through `any_running`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ppo_engine.actor_critic import trunk
from ppo_engine.logprobs import output_logits
from ppo_engine.rollout.cache import growing_cache
from ppo_engine.rollout.sampling import logprobs_of, sample

_SHRINK_AT = 0.75  # rows leave the cache, which copies it, once no more than this share still runs


@dataclass(frozen=True)
class Response:
    """Token ids up to and including the stop token; `finished`: the stop token was reached.

    logprobs: of each token, by the distribution it was drawn from. values: of the state before each token;
    None: no value was asked for.
    """

    ids: list[int]
    finished: bool
    logprobs: list[float]
    values: list[float] | None = None


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    uniforms_BR: NDArray[np.float64],
    *,
    temperature: float,
    stop_token_id: int | None,
    batch_rows: int,
    device: torch.device,
    any_running: Callable[[bool], bool] | None = None,
    value_head: nn.Module | None = None,
    limits: Sequence[int] | None = None,
) -> list[Response]:
    """One response per prompt, of at most `uniforms_BR.shape[1]` tokens.

    model: a causal language model. uniforms_BR: a number in [0, 1) per row and token; temperature 0 takes
    the most likely token and ignores them. batch_rows: most rows at a time. any_running: where every process
    must take part in every forward (sharded weights), whether any of them still has a row running.
    value_head: on the model's trunk, from [B, D] to [B]. limits: most tokens of each response, if fewer.

    Raises:
        FloatingPointError: the model's logits are not numbers. It comes after the last forward, so that other
            processes do not wait for forwards of this one.
    """
    by_length = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row))
    most = [uniforms_BR.shape[1]] * len(prompts) if limits is None else limits
    responses: dict[int, Response] = {}
    failures: list[FloatingPointError] = []
    for start in range(0, len(by_length), batch_rows):
        rows = by_length[start : start + batch_rows]
        batch = _Batch(
            model,
            value_head,
            [prompts[row] for row in rows],
            [most[row] for row in rows],
            uniforms_BR[rows],
            temperature,
            stop_token_id,
            device,
        )
        batch.run(any_running)
        responses.update(zip(rows, batch.responses(), strict=True))
        failures += batch.failures
    if failures:
        raise failures[0]
    return [responses[row] for row in range(len(prompts))]


class _Batch:
    """Rows that decode together. `self.rows` maps the rows still in the cache to those it began with."""

    def __init__(
        self,
        model: Any,
        value_head: nn.Module | None,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        uniforms_BR: NDArray[np.float64],
        temperature: float,
        stop_token_id: int | None,
        device: torch.device,
    ) -> None:
        self.trunk, self.logits, self.value_head = trunk(model), output_logits(model), value_head
        self.temperature, self.stop_token_id = temperature, stop_token_id
        self.uniforms_BR = torch.from_numpy(uniforms_BR).to(device)
        self.inputs_BT, self.mask_BT = _left_padded(prompts, device)
        self.cache = growing_cache(model.config)
        self.last_position = (
            getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        ) - 1
        self.limits_B = torch.tensor(limits, device=device)
        self.rows = torch.arange(len(prompts), device=device)
        self.running_B = torch.ones(len(prompts), dtype=torch.bool, device=device)
        self.tokens_BR = torch.zeros(uniforms_BR.shape, dtype=torch.long, device=device)
        self.logprobs_BR = torch.zeros(uniforms_BR.shape, device=device)
        self.values_BR = torch.zeros_like(self.logprobs_BR)
        self.lengths_B = torch.zeros(len(prompts), dtype=torch.long, device=device)
        self.finished_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        self.failures: list[FloatingPointError] = []

    def run(self, any_running: Callable[[bool], bool] | None) -> None:
        for step in range(self.uniforms_BR.shape[1]):
            hidden_BD = self._forward()
            tokens_B, logprobs_B = self._sample(self.logits(hidden_BD), step)
            rows = self.rows[self.running_B]
            self.logprobs_BR[rows, step] = logprobs_B[self.running_B]
            if self.value_head is not None:
                self.values_BR[rows, step] = self.value_head(hidden_BD)[self.running_B]
            self._record(tokens_B, step)
            is_running = bool(self.running_B.any())
            if not (is_running if any_running is None else any_running(is_running)):
                return
            self._shrink()

    def _forward(self) -> Tensor:
        """Hidden states [B, D] that predict the next token; rows that have ended compute in vain."""
        width = self.inputs_BT.shape[1]
        # Rows that have ended may stand past the last position there is.
        positions_BT = (self.mask_BT.cumsum(-1) - 1).clamp(min=0, max=self.last_position)[:, -width:]
        output = self.trunk(
            input_ids=self.inputs_BT,
            attention_mask=self.mask_BT,
            position_ids=positions_BT,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]  # type: ignore[no-any-return]

    def _sample(self, logits_BV: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """A token per row, and its log-probability. Where that cannot be, the batch has ended."""
        try:
            tokens_B = sample(logits_BV, self.uniforms_BR[self.rows, step], self.temperature)
        except FloatingPointError as error:
            self.failures.append(error)
            self.running_B = torch.zeros_like(self.running_B)
            tokens_B = torch.zeros_like(self.rows)
        return tokens_B, logprobs_of(tokens_B, logits_BV, self.temperature)

    def _record(self, tokens_B: Tensor, step: int) -> None:
        rows = self.rows[self.running_B]
        self.tokens_BR[rows, step] = tokens_B[self.running_B]
        self.lengths_B[rows] = step + 1
        if self.stop_token_id is not None:
            stopped_B = self.running_B & (tokens_B == self.stop_token_id)
            self.finished_B[self.rows[stopped_B]] = True
            self.running_B = self.running_B & ~stopped_B
        self.running_B = self.running_B & (self.limits_B[self.rows] > step + 1)
        self.inputs_BT = tokens_B[:, None]
        self.mask_BT = torch.cat([self.mask_BT, torch.ones_like(self.inputs_BT)], dim=1)

    def _shrink(self) -> None:
        kept = self.running_B.nonzero().squeeze(-1)
        if len(kept) == 0 or len(kept) > _SHRINK_AT * len(self.running_B):
            return
        self.cache.reorder_cache(kept)  # type: ignore[arg-type]  # which all kinds of layers have
        self.inputs_BT, self.mask_BT = self.inputs_BT[kept], self.mask_BT[kept]
        self.rows, self.running_B = self.rows[kept], self.running_B[kept]

    def responses(self) -> list[Response]:
        lengths, finished = self.lengths_B.tolist(), self.finished_B.tolist()
        logprobs, values = self.logprobs_BR.tolist(), self.values_BR.tolist()
        return [
            Response(
                ids=ids[:length],
                finished=finished[row],
                logprobs=logprobs[row][:length],
                values=None if self.value_head is None else values[row][:length],
            )
            for row, (ids, length) in enumerate(zip(self.tokens_BR.tolist(), lengths, strict=True))
        ]


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, longest prompt]. What stands in the padding is never looked at."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
