"""The time below which an update cannot come: its matrix products, at this machine's rate for matrices.

Counted per weight in a matrix and token of real text, as is usual (Kaplan et al. 2020, arXiv 2001.08361,
section 2.1): 2 floating-point operations forward and 4 backward, 2 where the weight is frozen. Attention's
products, embeddings, padding, and all else are left out, so no trainer reaches the floor.
"""

import statistics
import time

import torch

from benchmarks.workload import Size

_SIDE = 2048
_TIMES = 10


def matrix_rate(threads: int) -> float:
    """Floating-point operations a second, fp32: the median of ten products of square matrices."""
    torch.set_num_threads(threads)
    left, right = torch.randn(2, _SIDE, _SIDE)
    seconds = []
    for _ in range(_TIMES + 1):
        began = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - began)
    return 2 * _SIDE**3 / statistics.median(seconds[1:])


def operations(size: Size, method: str, text_tokens: float, epochs: int) -> float:
    """Of an update whose prompts and responses have so many tokens.

    method: full, lora (both with a value model of their own, trained whole), or lora-head.
    """
    policy, trunk = size.trunk_weights + size.head_weights, size.trunk_weights
    critic = 0 if method == "lora-head" else trunk
    rollout, reward = 2 * policy, 2 * trunk
    scoring = 2 * policy + 2 * critic  # reference, critic; the policy has computed its own in the rollout
    trained = (6 if method == "full" else 4) * policy + 6 * critic
    return text_tokens * (rollout + reward + scoring + epochs * trained)
