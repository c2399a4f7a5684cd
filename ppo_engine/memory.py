"""What to do where memory ends: the work is done once more with fewer rows at a time, and so for the rest.

Rows can be cut in any way without changing what is computed, so less at a time costs time and nothing else.
This module does not know what the work is, nor who is told.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from ppo_engine.parallel import Parallel

Work = Literal["rollout", "scoring", "update"]
_T = TypeVar("_T")
_FIX = {
    "rollout": "shorten prompts or response_length, or take a smaller model",
    "scoring": "shorten prompts or response_length, or take a smaller model",
    "update": "shorten prompts or response_length, give gradient_checkpointing, adapters instead of full "
    "fine-tuning, or zero_stage",
}


@dataclass(frozen=True)
class Cut:
    """How the rows of some work are cut when they may take so much at a time.

    rows, tokens: of the largest forward, padding included.
    """

    rows: int
    tokens: int


class OutOfMemory(RuntimeError):
    """Memory has ended. can_go_on: a run that is started once more, with fewer rows at a time, may do."""

    def __init__(self, message: str, *, can_go_on: bool) -> None:
        super().__init__(message)
        self.can_go_on = can_go_on


class Room:
    """How much work is done at a time: as much as was asked for, until that proves too much.

    halvings: by kind of work, how often the size asked for has been halved. on_less: hears of each time, with
    a message and its numbers.
    """

    def __init__(self, parallel: Parallel, on_less: Callable[[str, dict[str, int | str]], None]) -> None:
        self.parallel, self.on_less = parallel, on_less
        self.halvings: dict[str, int] = {"rollout": 0, "scoring": 0, "update": 0}

    @property
    def can_begin_again(self) -> bool:
        """Whether all processes can; with DeepSpeed, those that have not failed wait within the work."""
        return self.parallel.zero_stage is None

    def at_least(self, halvings: Mapping[str, int]) -> None:
        """Take over what another part of this run has found out."""
        for work, times in halvings.items():
            self.halvings[work] = max(self.halvings[work], times)

    def do(
        self,
        work: Work,
        size: int,
        attempt: Callable[[int], _T],
        cut: Callable[[int], Cut],
        undo: Callable[[], None],
    ) -> _T:
        """What `attempt` returns for the greatest size that fits; all processes go on with the same one.

        size: what was asked for, in any unit. attempt: does this process's part, without waiting for others.
        cut: what a size comes to, over all processes. undo: drops what a failed attempt has left.

        Raises:
            OutOfMemory: one row does not fit; or processes wait for each other within the work (ZeRO), so
                that those that have not failed cannot be asked to begin again.
        """
        while True:
            now = max(1, size >> self.halvings[work])
            failure = None
            try:
                done = attempt(now)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = asked_for(error)  # the error itself would keep all that the attempt has allocated
            if self.can_begin_again:
                failures = [told for told in self.parallel.gather(failure) if told is not None]
            else:
                failures = [] if failure is None else [failure]
            if not failures:
                return done
            undo()
            gc.collect()  # what is left of the attempt may hang in cycles
            self._take_less(work, size, cut, failures[0])

    def _take_less(self, work: Work, size: int, cut: Callable[[int], Cut], asked: str) -> None:
        tried = cut(max(1, size >> self.halvings[work]))
        what = f"{tried.rows} rows of {tried.tokens} tokens, padding included"
        if tried.rows == 1:
            raise OutOfMemory(
                f"Out of memory ({work}): a single row, of {tried.tokens} tokens, does not fit ({asked}); "
                f"{_FIX[work]}.",
                can_go_on=False,
            )
        while (less := cut(max(1, size >> self.halvings[work]))).rows >= tried.rows:
            self.halvings[work] += 1
        message = f"Out of memory ({work}) with {what} ({asked}); from now on {less.rows} rows at a time."
        if not self.can_begin_again:
            raise OutOfMemory(message, can_go_on=True)
        numbers: dict[str, int | str] = {
            "work": work,
            "rows_tried": tried.rows,
            "tokens_tried": tried.tokens,
            "asked": asked,
            "rows": less.rows,
        }
        self.on_less(message, numbers)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is why torch failed; on a CPU it has no class of its own for it."""
    is_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return is_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def asked_for(error: BaseException) -> str:
    """What was asked for when memory ended, as torch says it."""
    found = re.search(r"tried to allocate (\d[\d.]*) ?(bytes|[KMGT]iB)", str(error), re.IGNORECASE)
    return f"{found[1]} {found[2]} asked for" if found else "an unknown number of bytes asked for"
