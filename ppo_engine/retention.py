"""Which checkpoints of a run stay: one rule for the engine's disk and a worker's storage. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def kept(
    checkpoints: Mapping[int, float | None], limit: int | None, *, greater_is_better: bool = True
) -> set[int]:
    """Of all updates with a checkpoint, those to keep: the last ones, and the best one.

    checkpoints: whole ones of one run, with what the metric was at each; None: not known. limit: so many of
    the last ones; None: all.
    """
    updates = sorted(checkpoints)
    if limit is None:
        return set(updates)
    best = best_of(checkpoints, greater_is_better=greater_is_better)
    return {*updates[-limit:], *([] if best is None else [best])}


def best_of(checkpoints: Mapping[int, float | None], *, greater_is_better: bool) -> int | None:
    """The update whose metric is the best; None: none has it as a number. Of equals, the first."""
    sign = 1 if greater_is_better else -1
    numbers = {u: sign * v for u, v in checkpoints.items() if v is not None and math.isfinite(v)}
    return max(sorted(numbers), key=numbers.__getitem__, default=None)


def number(metrics: Mapping[str, Any], name: str | None) -> float | None:
    """A metric as a number; None: none is asked for, or it is not there, or it is no number."""
    value = metrics.get(name) if name is not None else None
    return float(value) if isinstance(value, int | float) else None
