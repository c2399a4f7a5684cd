"""Memory that ends at a number of rows, with the error that torch itself raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ppo_engine import PPOTrainer

HUGE = 2**60  # bytes that no machine has


@contextmanager
def scarce(made: PPOTrainer, rows: int, *, where: str) -> Iterator[None]:
    """Inside, memory ends, with torch's own error, where more rows than these are in one pass.

    where: `rollout`, `scoring`, `forward`, or `backward`.
    """

    def too_much(module: nn.Module, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        if rows_read(keywords) <= rows:
            return
        kind = "rollout" if keywords.get("use_cache") else "forward" if torch.is_grad_enabled() else "scoring"
        if kind == where:
            torch.empty(HUGE, dtype=torch.uint8)
        if kind == "forward" and where == "backward":
            output[0].register_hook(lambda gradient: torch.empty(HUGE, dtype=torch.uint8))

    trunk = made.model.policy.get_base_model().model if made.is_peft_model else made.model.policy.model
    hook = trunk.register_forward_hook(too_much, with_kwargs=True)
    yield
    hook.remove()


def rows_read(keywords: dict[str, Any]) -> int:
    """By a trunk that was called with these."""
    if (groups := keywords.get("groups")) is not None:
        return sum(rows for rows, _ in groups)
    return len(keywords["attention_mask"])


@contextmanager
def scarce_reward(model: nn.Module, rows: int) -> Iterator[None]:
    """Inside, memory ends in a reward model's forward of more rows than these."""

    def too_much(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        if len(keywords["input_ids"]) > rows:
            torch.empty(HUGE, dtype=torch.uint8)

    hook = model.model.register_forward_pre_hook(too_much, with_kwargs=True)
    yield
    hook.remove()


def told_of_memory(made: PPOTrainer) -> list[dict[str, Any]]:
    """Keep what the trainer is going to warn of."""
    heard: list[dict[str, Any]] = []
    made.room.on_less = lambda message, numbers: heard.append({"message": message, **numbers})
    return heard
