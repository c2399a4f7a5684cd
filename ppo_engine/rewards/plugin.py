"""Rewards that an operator installs: Python entry points of the group `proxima.rewards`.

    [project.entry-points."proxima.rewards"]
    cheerful = "my_package:cheerful"        # cheerful(**options) -> a reward, see `contract.py`

The factory is called once per process of a run, with the options of the spec. Knows no spec and no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from ppo_engine.issues import shown
from ppo_engine.reward_kinds import secret_name
from ppo_engine.rewards.contract import Reward, RewardError
from ppo_engine.rewards.secrets import reveal

GROUP = "proxima.rewards"


def installed() -> list[str]:
    """Names of the plug-ins in this environment."""
    return sorted(entry_points(group=GROUP).names)


def load(plugin: str, options: Mapping[str, Any]) -> Reward:
    """Make the reward of a plug-in.

    options: as in the spec; secrets are put in place of their names here.

    Raises:
        RewardError: there is no such plug-in or secret, it cannot be imported, it refuses the options, or
            what it makes cannot be called.
    """
    found = list(entry_points(group=GROUP, name=plugin))
    if not found:
        raise RewardError(f"{shown(plugin)} given; installed are {shown(installed())}: choose one of these.")
    given = {name: _revealed(value) for name, value in options.items()}
    try:
        reward = found[0].load()(**given)
    except Exception as error:  # a plug-in is anybody's code; whatever it raises refuses the run, by name
        raise RewardError(
            f"The plug-in {shown(plugin)} failed with options {shown(dict(options))}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(reward):
        raise RewardError(
            f"The plug-in {shown(plugin)} made a {type(reward).__name__}; it must make a callable."
        )
    made: Reward = reward
    return made


def _revealed(option: Any) -> Any:
    name = secret_name(option)
    return option if name is None else reveal(name)
