"""What a reward is: a callable from a batch of responses to numbers.

    def reward(batch: RewardBatch) -> list[float]                 # one number per row, or
    def reward(batch: RewardBatch) -> list[list[float]]           # one per response token

The same for the built-in kinds, for an operator's plug-in, and for a function that a script hands to
`PPOTrainer`. This module knows no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

RewardValues: TypeAlias = Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True)
class RewardBatch:
    """Responses to be scored: one entry per row in each field.

    prompts: the prompt's text; a chat prompt as the policy's chat template renders it.
    responses: the response's text, without its stop token and without special tokens.
    response_ids: the response's token ids, of the policy's tokenizer, the stop token included.
    columns: the further columns of the prompt's row; `messages` among them, where the prompt is a chat.
    prompt_ids: the prompt's token ids; empty where only texts are known.
    """

    prompts: list[str]
    responses: list[str]
    response_ids: list[list[int]]
    columns: list[dict[str, Any]]
    prompt_ids: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        counts = {name: len(entries) for name, entries in vars(self).items() if name != "prompt_ids"}
        if len(set(counts.values())) != 1 or len(self.prompt_ids) not in (0, len(self)):
            raise ValueError(f"A RewardBatch needs one entry per row in each field; it has {counts}.")

    def __len__(self) -> int:
        return len(self.responses)


class Reward(Protocol):
    """Scores a batch; see the module's docstring. Called with at least one row, in any order of rows."""

    def __call__(self, batch: RewardBatch, /) -> RewardValues: ...


class RewardError(ValueError):
    """A reward that cannot score; the message names the reward, the row, and the fix."""
