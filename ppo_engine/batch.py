"""The records that flow through an update, and how rows are cut into micro-batches.

Shape letters, in the whole engine: B rows; P prompt positions; R response positions; T = P + R;
V vocabulary; D width of the trunk; N the response tokens of all rows, one row after the other.

A row knows its lengths: no mask is ever guessed from ids, so a pad id that equals the stop token, or that
stands in the text, changes nothing. This module does not know models, losses, or processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppo_engine.draws import Purpose, stream


@dataclass(frozen=True)
class Rollout:
    """What was sampled, as lists: one entry per row.

    rows: position of each row in the update's batch, over all processes; with the update's number it
        names the row's random numbers.
    prompts, responses: as text; a response without its stop token and without special tokens.
    response_ids: cut after the stop token, which is part of them; at least one.
    finished: whether the response ended with the stop token.
    columns: further columns of the row's prompt.
    """

    rows: list[int]
    prompts: list[str]
    prompt_ids: list[list[int]]
    responses: list[str]
    response_ids: list[list[int]]
    finished: list[bool]
    columns: list[dict[str, Any]]

    def __post_init__(self) -> None:
        assert len({len(entries) for entries in vars(self).values()}) == 1, "one entry per row"
        assert all(self.prompt_ids), "a prompt has tokens"
        assert all(self.response_ids), "a response has tokens"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def total_lengths(self) -> list[int]:
        """Tokens of prompt and response together, per row."""
        return [len(p) + len(r) for p, r in zip(self.prompt_ids, self.response_ids, strict=True)]


@dataclass(frozen=True)
class Experience:
    """All that the optimizer steps of an update need of its rows. What stands beyond a row's length is 0.

    prompt_ids, response_ids: as in `Rollout`. response_lengths_B: of the latter.
    logprobs_BR, ref_logprobs_BR: of each response token, by the policy that wrote it and by the reference.
    values_BR: of the state before each token. rewards_BR: of each token, KL and score, before whitening.
    advantages_BR, returns_BR: from `advantages.gae`.
    mask_BR: the tokens that are trained on: those the policy wrote.
    """

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    response_lengths_B: Tensor
    logprobs_BR: Tensor
    ref_logprobs_BR: Tensor
    values_BR: Tensor
    rewards_BR: Tensor
    advantages_BR: Tensor
    returns_BR: Tensor
    mask_BR: Tensor

    def __len__(self) -> int:
        return len(self.response_ids)

    @property
    def total_lengths(self) -> list[int]:
        """Tokens of prompt and response together, per row."""
        return [len(p) + len(r) for p, r in zip(self.prompt_ids, self.response_ids, strict=True)]

    def tokens(self, rows: Sequence[int]) -> TokenExperience:
        """The response tokens of some rows, in the order a forward of `collate(…, rows, …)` returns them.

        No rows: one token of weight zero, to match the row that `collate` makes up.
        """
        if not rows:
            zero_N = self.logprobs_BR.new_zeros(1)
            return TokenExperience(zero_N, zero_N, zero_N, zero_N, zero_N.bool())
        chosen = torch.as_tensor(rows, device=self.mask_BR.device)
        lengths_B = self.response_lengths_B[chosen]

        def flat(values_BR: Tensor) -> Tensor:
            return flatten_tokens(values_BR[chosen], lengths_B)

        return TokenExperience(
            logprobs_N=flat(self.logprobs_BR),
            values_N=flat(self.values_BR),
            advantages_N=flat(self.advantages_BR),
            returns_N=flat(self.returns_BR),
            mask_N=flat(self.mask_BR),
        )


@dataclass(frozen=True)
class TokenExperience:
    """The part of an experience that losses read, per response token; fields as in `Experience`."""

    logprobs_N: Tensor
    values_N: Tensor
    advantages_N: Tensor
    returns_N: Tensor
    mask_N: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward, right-padded: the prompt, then the response.

    rows: indices into the rollout or experience; none where a process only keeps step with the others.
        Then the tensors hold one made-up row, whose tokens weigh zero.
    input_ids_BT, attention_mask_BT: int64. prompt_lengths_B, response_lengths_B: int64.
    """

    rows: list[int]
    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    prompt_lengths_B: Tensor
    response_lengths_B: Tensor


def collate(
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    rows: Sequence[int],
    pad_token_id: int,
    device: torch.device | str = "cpu",
) -> MicroBatch:
    """The chosen rows as one right-padded batch, as wide as the longest of them."""
    prompts = [prompt_ids[row] for row in rows] or [[pad_token_id]]
    responses = [response_ids[row] for row in rows] or [[pad_token_id]]
    texts = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, texts))
    padded = [text + [pad_token_id] * (width - len(text)) for text in texts]
    lengths_B = torch.tensor([len(text) for text in texts])
    return MicroBatch(
        rows=list(rows),
        input_ids_BT=torch.tensor(padded, device=device),
        attention_mask_BT=response_mask(lengths_B, width).long().to(device),
        prompt_lengths_B=torch.tensor([len(prompt) for prompt in prompts], device=device),
        response_lengths_B=torch.tensor([len(response) for response in responses], device=device),
    )


def response_mask(lengths_B: Tensor | Sequence[int], width: int) -> Tensor:
    """Boolean [B, width]: which positions lie within each row's length."""
    lengths_B = torch.as_tensor(lengths_B)
    return torch.arange(width, device=lengths_B.device)[None] < lengths_B[:, None]


def flatten_tokens(values_BR: Tensor, lengths_B: Tensor) -> Tensor:
    """[B, R] → [N]: each row up to its length, one row after the other."""
    return values_BR[response_mask(lengths_B, values_BR.shape[1])]


def unflatten_tokens(values_N: Tensor, lengths_B: Tensor, width: int) -> Tensor:
    """[N] → [B, width]: the inverse of `flatten_tokens`, zero beyond each row's length."""
    values_BR = values_N.new_zeros(len(lengths_B), width)
    return values_BR.masked_scatter(response_mask(lengths_B, width), values_N)


def cut(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Bucket rows by length into micro-batches whose padded area, rows x longest, is at most `max_tokens`.

    Returns indices into `lengths`, longest rows first: what does not fit in memory fails at once. A row
    longer than the budget stands alone. Rows of equal length stay in order.
    """
    micro_batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        current = micro_batches[-1] if micro_batches else []
        if current and (len(current) + 1) * lengths[current[0]] <= max_tokens:
            current.append(row)
        else:
            micro_batches.append([row])
    return micro_batches


def shuffle(seed: int, update: int, epoch: int, n: int) -> list[int]:
    """The order in which a PPO epoch takes the n rows of an update: the same wherever it is asked for."""
    order: list[int] = stream(seed, Purpose.MINI_BATCHES, update, epoch).permutation(n).tolist()
    return order
