"""Random numbers that belong to rows: each stream is a pure function of what it is for.

Streams come from Philox, a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3"): a key and a counter give the numbers, and nothing is carried from one draw to the next. So no
draw depends on a rank, a batch, an earlier draw, or a resume. This module knows no torch.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is for. The numbers are part of every stream: never change or reuse one."""

    ROLLOUT = 1
    EVALUATION = 2
    SAMPLES = 3
    MINI_BATCHES = 4
    PROMPT_ORDER = 5


def stream(seed: int, purpose: Purpose, major: int, minor: int = 0) -> np.random.Generator:
    """A generator of its own for (seed, purpose, major, minor); all numbers are at least 0.

    The lowest word of the counter is left to the generator, so streams cannot run into each other.
    """
    return np.random.Generator(np.random.Philox(key=[seed, int(purpose)], counter=[0, minor, major, 0]))
