"""The text that a response is compared with: the same for every row, or a column's.

Knows no spec and no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from ppo_engine.issues import shown
from ppo_engine.rewards.contract import RewardBatch, RewardError


@dataclass(frozen=True)
class Reference:
    """Exactly one of text (the same for every row) and column (the row's column that holds it)."""

    text: str | None = None
    column: str | None = None

    def of(self, batch: RewardBatch, row: int) -> str:
        """A row's reference; a number is written as JSON writes it.

        Raises:
            RewardError: the row has neither a text nor a number in the column.
        """
        if self.column is None:
            assert self.text is not None, "the spec's rule: a reference or a column"
            return self.text
        value = batch.columns[row].get(self.column)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RewardError(
                f"the row has {shown(value)} in the column {shown(self.column)}; it needs a text or a number "
                "there.",
                lasting=True,
            )
        return str(value)
