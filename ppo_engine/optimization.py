"""Policy and critic learning at rates of their own: the groups of an optimizer, and when each begins to move.

This module does not know models or processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

_ROLE = "role"
_CRITIC = "critic"


def drop_empty_groups(optimizer: torch.optim.Optimizer) -> None:
    """Leave out groups without parameters, such as Trainer makes of biases where a LoRA has none.

    DeepSpeed would do so later, and the schedule have rates for groups that are gone.
    """
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def split_groups(
    optimizer: torch.optim.Optimizer, critic: Iterable[Tensor], critic_learning_rate: float
) -> None:
    """Give the critic's parameters groups of their own, after the policy's, with this learning rate."""
    of_critic = {id(parameter) for parameter in critic}
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for role in ("policy", _CRITIC):
        for group in groups:
            chosen = [
                parameter
                for parameter in group["params"]
                if (id(parameter) in of_critic) == (role == _CRITIC)
            ]
            if chosen:
                rate = critic_learning_rate if role == _CRITIC else group["lr"]
                optimizer.add_param_group({**group, "params": chosen, "lr": rate, _ROLE: role})


def policy_groups(optimizer: torch.optim.Optimizer) -> list[int]:
    """Which groups are the policy's, after `split_groups`."""
    return [index for index, group in enumerate(optimizer.param_groups) if group.get(_ROLE) != _CRITIC]


def critic_first(scheduler: LambdaLR, updates: int) -> LambdaLR:
    """A schedule as given, but for so many updates the policy's learning rate is 0."""

    def waiting(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda update: 0.0 if update < updates else factor(update)

    of_policy = policy_groups(scheduler.optimizer)
    factors = [
        waiting(factor) if index in of_policy else factor for index, factor in enumerate(scheduler.lr_lambdas)
    ]
    return LambdaLR(scheduler.optimizer, factors)
