"""Keeps what a trainer's updates work with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ppo_engine.batch import Experience, Rollout
from ppo_engine.experience import TokenScores, experience_of


class Recorder:
    """Stands where the trainer works out experience, and keeps what goes in and comes out."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []
        self.tokens: list[TokenScores] = []
        self.moments: list[Any] = []
        self.experiences: list[Experience] = []

    def __call__(
        self, rollout: Rollout, scores: Any, tokens: TokenScores, ppo: Any, kl_coef: float, moments: Any
    ) -> tuple[Experience, Tensor]:
        experience, kl_BR = experience_of(rollout, scores, tokens, ppo, kl_coef, moments)
        self.rollouts.append(rollout)
        self.tokens.append(tokens)
        self.moments.append(moments)
        self.experiences.append(experience)
        return experience, kl_BR
