"""Proxima's PPO engine: a trainer to import, and a program that turns a run directory into a policy.

Names are resolved when asked for, so that importing this package loads no torch: the service and the
worker read specs, plans, and events without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppo_engine.advantages import masked_mean, masked_var, masked_whiten
    from ppo_engine.config import PPOConfig
    from ppo_engine.load import load_reward_adapter
    from ppo_engine.trainer import PPOTrainer

__all__ = [
    "PPOConfig",
    "PPOTrainer",
    "load_reward_adapter",
    "masked_mean",
    "masked_var",
    "masked_whiten",
]

_HOME = {
    "PPOConfig": "ppo_engine.config",
    "PPOTrainer": "ppo_engine.trainer",
    "load_reward_adapter": "ppo_engine.load",
    "masked_mean": "ppo_engine.advantages",
    "masked_var": "ppo_engine.advantages",
    "masked_whiten": "ppo_engine.advantages",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
