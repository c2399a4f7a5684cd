"""Proxima's PPO engine: a trainer to import, and a program that turns a run directory into a policy.

Names are resolved when asked for, so that importing this package loads no torch: the service and the
worker read specs, plans, and events without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppo_engine.config import PPOConfig
    from ppo_engine.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]

_HOME = {"PPOConfig": "ppo_engine.config", "PPOTrainer": "ppo_engine.trainer"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
