"""The records that flow through an update, and how rows are cut into micro-batches.

Shape letters, in the whole engine: B rows; P prompt positions; R response positions; T = P + R;
V vocabulary; D width of the trunk; N the response tokens of all rows, one row after the other.

A row knows its lengths: no mask is ever guessed from ids, so a pad id that equals the stop token, or that
stands in the text, changes nothing. This module does not know models, losses, or processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo_engine.draws import Purpose, stream

FORWARD_TOKENS = 64  # a forward and backward more costs about as much as so many tokens of padding
GROUP_TOKENS = 16  # so does attention of one group of rows more


@dataclass(frozen=True)
class Rollout:
    """What was sampled, as lists: one entry per row.

    rows: position of each row in the update's batch, over all processes; with the update's number it
        names the row's random numbers.
    prompts, responses: as text; a response without its stop token and without special tokens.
    response_ids: cut after the stop token, which is part of them; at least one.
    finished: whether the response has the stop token, with which it ends; in a run without one, whether the
        tokenizer's eos is somewhere in it.
    columns: further columns of the row's prompt.
    written: of each response token, whether the policy wrote it; those it did not (a tool's answer) are read,
        and neither rewarded, nor discounted through, nor trained on. None: it wrote all.
    logprobs, values: of each response token, and of the state before it, as sampling computed them. None:
        it did not.
    """

    rows: list[int]
    prompts: list[str]
    prompt_ids: list[list[int]]
    responses: list[str]
    response_ids: list[list[int]]
    finished: list[bool]
    columns: list[dict[str, Any]]
    written: list[list[bool]] | None = None
    logprobs: list[list[float]] | None = None
    values: list[list[float]] | None = None

    def __post_init__(self) -> None:
        given = [entries for entries in vars(self).values() if entries is not None]
        assert len({len(entries) for entries in given}) == 1, "one entry per row"
        assert all(self.prompt_ids), "a prompt has tokens"
        assert all(self.response_ids), "a response has tokens"
        lengths = [len(ids) for ids in self.response_ids]
        for per_token in (self.written, self.logprobs, self.values):
            assert per_token is None or [len(row) for row in per_token] == lengths, "one entry per token"

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
    rewards_BR: of each token, KL and score, before whitening. advantages_BR: whitened, where they are.
    values_BR: of the state before each token. returns_BR: what they should have been. None without a critic.
    mask_BR: the tokens that are trained on: those the policy wrote. weights_BR: what each weighs in a loss.
    """

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    response_lengths_B: Tensor
    logprobs_BR: Tensor
    ref_logprobs_BR: Tensor
    rewards_BR: Tensor
    advantages_BR: Tensor
    values_BR: Tensor | None
    returns_BR: Tensor | None
    mask_BR: Tensor
    weights_BR: Tensor

    def __len__(self) -> int:
        return len(self.response_ids)

    @property
    def total_lengths(self) -> list[int]:
        """Tokens of prompt and response together, per row."""
        return [len(p) + len(r) for p, r in zip(self.prompt_ids, self.response_ids, strict=True)]

    def tokens(self, rows: Sequence[int]) -> TokenExperience:
        """The response tokens of some rows, in the order a forward of `collate(…, rows, …)` returns them.

        Those the policy did not write are left out; `mask_N` tells which of the forward's are kept.
        """
        chosen = torch.as_tensor(rows, device=self.mask_BR.device)
        lengths_B = self.response_lengths_B[chosen]
        mask_N = flatten_tokens(self.mask_BR[chosen], lengths_B)

        def flat(values_BR: Tensor) -> Tensor:
            return flatten_tokens(values_BR[chosen], lengths_B)[mask_N]

        return TokenExperience(
            logprobs_N=flat(self.logprobs_BR),
            ref_logprobs_N=flat(self.ref_logprobs_BR),
            advantages_N=flat(self.advantages_BR),
            values_N=None if self.values_BR is None else flat(self.values_BR),
            returns_N=None if self.returns_BR is None else flat(self.returns_BR),
            weights_N=flat(self.weights_BR),
            mask_N=mask_N,
        )


@dataclass(frozen=True)
class TokenExperience:
    """The part of an experience that losses read, per token that is trained on; fields as in `Experience`.

    mask_N: longer: of all response tokens of the forward, those that are trained on.
    """

    logprobs_N: Tensor
    ref_logprobs_N: Tensor
    advantages_N: Tensor
    values_N: Tensor | None
    returns_N: Tensor | None
    weights_N: Tensor
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

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a forward is given, in its order."""
        return self.input_ids_BT, self.attention_mask_BT, self.prompt_lengths_B, self.response_lengths_B


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


def padded(rows: Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """[B, longest], fp32: a number per token, zero beyond each row's length."""
    lengths_B = torch.tensor([len(row) for row in rows], device=device)
    values_N = torch.tensor([value for row in rows for value in row], device=device)
    return unflatten_tokens(values_N, lengths_B, max(map(len, rows)))


def cut(lengths: Sequence[int], max_tokens: float, part_tokens: int = FORWARD_TOKENS) -> list[list[int]]:
    """Bucket rows by length into micro-batches, so that padding and forwards together cost least.

    The padded area of each, rows x longest, is at most `max_tokens`; a row longer than that stands alone.
    Returns indices into `lengths`, longest rows first: what does not fit in memory fails at once. Rows of
    equal length stay in order. part_tokens: what one more costs, beside its area.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    longest = np.array([lengths[row] for row in order], dtype=np.int64)
    # Least cost of the first n rows, and where the last of their micro-batches begins.
    costs, starts = np.zeros(len(order) + 1, dtype=np.int64), [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        areas = (end - np.arange(end)) * longest[:end]
        allowed = np.flatnonzero((areas <= max_tokens) | (np.arange(end) == end - 1))
        totals = costs[allowed] + areas[allowed] + part_tokens
        best = int(totals.argmin())
        costs[end], starts[end] = totals[best], int(allowed[best])
    micro_batches: list[list[int]] = []
    end = len(order)
    while end:
        micro_batches.append(order[starts[end] : end])
        end = starts[end]
    return micro_batches[::-1]


def rectangles(lengths: Sequence[int]) -> list[list[int]]:
    """Groups of rows of like length, the longest first, for attention; all padding is within these."""
    return cut(lengths, math.inf, GROUP_TOKENS)


def packed_area(lengths: Sequence[int]) -> int:
    """Tokens of rows that are read without padding between groups, with the padding within them."""
    return sum(len(group) * lengths[group[0]] for group in rectangles(lengths))


def cut_packed(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Few micro-batches of rows that are read without padding, each of about as many tokens.

    Each has at most `max_tokens` of text (the padding within groups comes on top of it); a row longer than
    that stands alone. Returns indices into `lengths`, longest rows first. Rows of equal length stay in order.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    share = sum(lengths) / max(1, -(-sum(lengths) // max_tokens))
    micro_batches: list[list[int]] = []
    tokens = math.inf
    for row in order:
        if tokens >= share or tokens + lengths[row] > max_tokens:
            micro_batches.append([])
            tokens = 0
        micro_batches[-1].append(row)
        tokens += lengths[row]
    return micro_batches


def shuffle(seed: int, update: int, epoch: int, n: int) -> list[int]:
    """The order in which a PPO epoch takes the n rows of an update: the same wherever it is asked for."""
    order: list[int] = stream(seed, Purpose.MINI_BATCHES, update, epoch).permutation(n).tolist()
    return order
