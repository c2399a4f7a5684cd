"""Responses in several turns: the policy writes up to its stop token, an environment answers, it goes on.

What the environment answers is read by the policy, and is neither rewarded nor trained on. This module knows
no models and no processes: it keeps what each row has come to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ppo_engine.rewards import RewardBatch
from ppo_engine.rollout.generate import Response


class Environment(Protocol):
    """Answers a policy in the midst of its response: a tool, a game, a user who asks again.

    A function of what it is given alone, or a resumed run is another run.
    """

    def __call__(self, batch: RewardBatch, /) -> Sequence[str | Sequence[int] | None]:
        """For each row, whose response so far ends with the stop token: text or ids to go on after.

        None: the response is over.
        """


@dataclass
class Row:
    """One response in the making. written: of each of its tokens, whether the policy wrote it."""

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)
    finished: bool = False
    is_over: bool = False

    def write(self, turn: Response, room: int) -> None:
        """Add what the policy wrote, as far as there is room for it in the response."""
        ids = turn.ids[: room - len(self.ids)]
        self.finished = turn.finished and len(ids) == len(turn.ids)
        self._add(ids, written=True)
        self.is_over = not self.finished or len(self.ids) == room

    def read(self, answer: list[int] | None, room: int) -> None:
        """Add what the environment answered, and with it the row is open again if a token still fits."""
        self.is_over = answer is None
        if answer is not None:
            self.finished = False
            self._add(answer[: room - len(self.ids)], written=False)
            self.is_over = len(self.ids) == room

    def _add(self, ids: Sequence[int], *, written: bool) -> None:
        self.ids += ids
        self.written += [written] * len(ids)


def answers(
    environment: Environment, batch: RewardBatch, tokenizer: Any, vocab_size: int
) -> list[list[int] | None]:
    """What the environment answers, as ids below the policy's `vocab_size`.

    Raises:
        ValueError: there is not one for each row, or one is neither text, nor such ids, nor None.
    """
    given = environment(batch)
    if len(given) != len(batch):
        raise ValueError(
            f"environment returned {len(given)} answers to {len(batch)} rows; return one for each."
        )
    return [_ids(answer, tokenizer, vocab_size) for answer in given]


def _ids(answer: str | Sequence[int] | None, tokenizer: Any, vocab_size: int) -> list[int] | None:
    if answer is None:
        return None
    is_text = isinstance(answer, str)
    ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"] if is_text else answer)
    if not all(isinstance(token, int) and 0 <= token < vocab_size for token in ids):
        raise ValueError(
            f"environment returned {ids[:8]} ...; an answer is text, None, or ids from 0 to {vocab_size - 1}."
        )
    return ids
