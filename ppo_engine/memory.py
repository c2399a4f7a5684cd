"""What to do where memory ends: the work is done once more with fewer rows at a time, and so for the rest.

Rows can be cut in any way without changing what is computed, so less at a time costs time and nothing else.
This module does not know what the work is, how processes speak to each other, nor who is told.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, TypeVar, get_args

import torch

from ppo_engine.batch import packed_area

Work = Literal["rollout", "reward", "scoring", "update"]
Notice: TypeAlias = tuple[str, dict[str, int | str]]
"""A message, and its numbers."""

_T = TypeVar("_T")
_FIX = {
    "rollout": "shorten prompts or response_length, or take a smaller model",
    "reward": "shorten prompts or response_length, or take a smaller reward model",
    "scoring": "shorten prompts or response_length, or take a smaller model",
    "update": "shorten prompts or response_length, give gradient_checkpointing, adapters instead of full "
    "fine-tuning, or zero_stage",
}
_WITHOUT_A_CLASS = re.compile(
    r"DefaultCPUAllocator: can't allocate memory"
    r"|CUDA (driver )?error: out of memory"
    r"|CU[A-Z]+_STATUS_(INTERNAL_ERROR_(HOST|DEVICE)_)?ALLOC(ATION)?_FAILED"
)
"""What torch says of memory that ended where it raises a plain RuntimeError."""


class Processes(Protocol):
    """What is asked of the processes of a run. zero_stage: of DeepSpeed; None: without it."""

    zero_stage: int | None

    def gather(self, value: _T) -> list[_T]:
        """Every process's value, by rank."""
        ...


@dataclass(frozen=True)
class Cut:
    """How the rows of some work are cut when they may take so much at a time.

    rows, tokens: of the largest forward, padding included.
    """

    rows: int
    tokens: int

    @classmethod
    def of(
        cls, micro_batches: Iterable[Sequence[int]], lengths: Sequence[int], *, is_packed: bool = False
    ) -> Cut:
        """Of the forwards of these rows. lengths: of every row, in tokens. is_packed: by groups alone."""
        taken = [[lengths[row] for row in rows] for rows in micro_batches if rows]
        areas = [packed_area(rows) if is_packed else len(rows) * max(rows) for rows in taken]
        return cls(max(map(len, taken)), max(areas))


class OutOfMemory(RuntimeError):
    """Memory has ended. can_go_on: a run that is started once more, with fewer rows at a time, may do."""

    def __init__(self, message: str, *, can_go_on: bool = False) -> None:
        super().__init__(message)
        self.can_go_on = can_go_on


class Room:
    """How much work is done at a time: as much as was asked for, until that proves too much.

    halvings: by kind of work, how often the size asked for has been halved. on_less: hears of each time, with
    a message and its numbers.
    """

    def __init__(self, processes: Processes, on_less: Callable[[str, dict[str, int | str]], None]) -> None:
        self.processes, self.on_less = processes, on_less
        self.halvings: dict[str, int] = dict.fromkeys(get_args(Work), 0)
        self._untold: list[Notice] = []

    @property
    def can_begin_again(self) -> bool:
        """Whether all processes can; with DeepSpeed, those that have not failed wait within the work."""
        return self.processes.zero_stage is None

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
            failure = None
            try:
                done = attempt(self._size(work, size))
            except (MemoryError, RuntimeError) as error:
                failure = _failure(error)
            if self.can_begin_again:
                failures = [told for told in self.processes.gather(failure) if told is not None]
            else:
                failures = [] if failure is None else [failure]
            if not failures:
                return done
            undo()
            gc.collect()  # what is left of the attempt may hang in cycles
            message, numbers = self._take_less(work, size, cut, failures[0])
            if not self.can_begin_again:
                raise OutOfMemory(message, can_go_on=True)
            self.on_less(message, numbers)

    def do_alone(self, work: Work, size: int, attempt: Callable[[int], _T], cut: Callable[[int], Cut]) -> _T:
        """As `do`, but of work that each process does as often as it likes: `agree` has to follow on all.

        cut: what a size comes to on this process.

        Raises:
            OutOfMemory: one row does not fit.
        """
        while True:
            try:
                return attempt(self._size(work, size))
            except (MemoryError, RuntimeError) as error:
                failure = _failure(error)
            gc.collect()
            self._untold.append(self._take_less(work, size, cut, failure))

    def agree(self, work: Work) -> None:
        """After work that was done alone: all go on as the one that had to take least, and that is told."""
        found = self.processes.gather((self.halvings[work], self._untold))
        self.halvings[work], notices = max(found, key=lambda one: one[0])
        self._untold = []
        for message, numbers in notices:
            self.on_less(message, numbers)

    def _size(self, work: Work, size: int) -> int:
        return max(1, size >> self.halvings[work])

    def _take_less(self, work: Work, size: int, cut: Callable[[int], Cut], asked: str) -> Notice:
        tried = cut(self._size(work, size))
        what = f"{tried.rows} rows of {tried.tokens} tokens, padding included"
        if tried.rows == 1:
            raise OutOfMemory(
                f"Out of memory ({work}): a single row, of {tried.tokens} tokens, does not fit ({asked}); "
                f"{_FIX[work]}."
            )
        while (less := cut(self._size(work, size))).rows >= tried.rows:
            self.halvings[work] += 1
        message = f"Out of memory ({work}) with {what} ({asked}); from now on {less.rows} rows at a time."
        return message, {
            "work": work,
            "rows_tried": tried.rows,
            "tokens_tried": tried.tokens,
            "asked": asked,
            "rows": less.rows,
        }


def _failure(error: BaseException) -> str:
    """What was asked for; the error itself would keep all that the attempt has allocated.

    Raises what is no lack of memory.
    """
    if not is_out_of_memory(error):
        raise error
    return asked_for(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is why torch failed, or Python; often torch has no class of its own for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _WITHOUT_A_CLASS.search(str(error)) is not None


def asked_for(error: BaseException) -> str:
    """What was asked for when memory ended, as torch says it."""
    found = re.search(r"tried to allocate (\d[\d.]*) ?(bytes|[KMGT]iB)", str(error), re.IGNORECASE)
    return f"{found[1]} {found[2]} asked for" if found else "an unknown number of bytes asked for"
