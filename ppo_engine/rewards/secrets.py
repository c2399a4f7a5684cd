"""The values of the secrets that a spec names: variables of this process's environment. Knows no spec."""

from __future__ import annotations

import os

from ppo_engine.issues import shown
from ppo_engine.reward_kinds import SECRET_PREFIX
from ppo_engine.rewards.contract import RewardError


def reveal(name: str) -> str:
    """The value of a secret.

    Raises:
        RewardError: this machine has none of that name.
    """
    value = os.environ.get(SECRET_PREFIX + name)
    if value is None:
        raise RewardError(
            f"The secret {shown(name)} is named, which this machine has not; its operator sets "
            f"{SECRET_PREFIX}{name} for the worker."
        )
    return value
