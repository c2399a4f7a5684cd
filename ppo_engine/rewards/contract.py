"""What a reward is: a callable from a batch of responses to numbers.

    def reward(batch: RewardBatch) -> list[float]                 # one number per row, or
    def reward(batch: RewardBatch) -> list[list[float]]           # one per response token

The same for the built-in kinds, for an operator's plug-in, and for a function that a script hands to
`PPOTrainer`. This module knows no torch.

What a response is, for all of them:

- It ends at its first stop token, or after `response_length` tokens: then it was truncated, and is scored as
  far as it goes. That it did not finish costs it `missing_eos_penalty`, whatever the rewards say.
- Its text is what the policy wrote before the stop token, without special tokens. It may be empty.
- Its ids are all the policy wrote, the stop token included: at least one.
- A length in tokens counts the ids; a length in text counts the characters of the text.

A row that cannot be scored has a `RewardError` in place of its number: the others keep theirs. A reward that
raises fails all rows of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias


@dataclass(frozen=True)
class RewardBatch:
    """Responses to be scored: one entry per row in each field.

    prompts: the prompt's text; a chat prompt as the policy's chat template renders it. Of a prompt that
        was truncated, what the policy read.
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

    def take(self, rows: Sequence[int]) -> RewardBatch:
        """These rows alone, in this order."""
        return RewardBatch(
            **{
                name: [entries[row] for row in rows] if entries else []
                for name, entries in vars(self).items()
            }
        )


class RewardError(ValueError):
    """A reward that cannot score, or a row that cannot be scored; the message says why, and the fix.

    lasting: asking again would give the same. retry_after: seconds after which to ask again, at the earliest.
    """

    def __init__(self, message: str, *, lasting: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.lasting, self.retry_after = lasting, retry_after


RewardValues: TypeAlias = Sequence[float | RewardError] | Sequence[Sequence[float] | RewardError]


class Reward(Protocol):
    """Scores a batch; see the module's docstring. Called with at least one row, in any order of rows."""

    def __call__(self, batch: RewardBatch, /) -> RewardValues: ...


def row_by_row(batch: RewardBatch, score: Callable[[int], float]) -> list[float | RewardError]:
    """The score of each row by its index; where that raises a RewardError, the error."""
    values: list[float | RewardError] = []
    for row in range(len(batch)):
        try:
            values.append(score(row))
        except RewardError as error:
            values.append(error)
    return values
