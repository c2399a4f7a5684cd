"""What an update is told by: TRL's metric names, and more beside them.

Sums over a row's tokens are averaged over rows; `time/...` and `eps` are the only ones that a repeated run
does not repeat. This module does not know where metrics go.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ppo_engine.advantages import kl_rewards, missing_stop
from ppo_engine.batch import Experience, Rollout
from ppo_engine.rewards import Scores
from ppo_engine.spec import Hyperparameters


class Clock:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return self._last - self._start


def update_metrics(
    rollout: Rollout, scores: Scores, experience: Experience, kl_BR: Tensor, ppo: Hyperparameters
) -> dict[str, float]:
    """What the rollout of an update shows, before its optimizer steps."""
    rows = len(rollout)
    scores_B = final_scores(rollout, scores, ppo)
    non_score = float(kl_rewards(kl_BR.double(), ppo.kl_coef).sum()) / rows
    return {
        "objective/kl": float(kl_BR.double().sum()) / rows,
        "objective/entropy": -float(experience.logprobs_BR.double().sum()) / rows,
        "objective/non_score_reward": non_score,
        "objective/scores": float(scores_B.mean()),
        "objective/scores_std": float(scores_B.std(correction=0)),
        "objective/rlhf_reward": float(scores_B.mean()) + non_score,
        **reward_means(scores, "reward"),
        "val/num_eos_tokens": float(sum(rollout.finished)),
        **response_metrics(rollout, "response"),
    }


def evaluation_metrics(
    rollout: Rollout, scores: Scores, ppo: Hyperparameters, prefix: str
) -> dict[str, float]:
    """What the rollout of an evaluation shows."""
    return {
        f"{prefix}/scores": float(final_scores(rollout, scores, ppo).mean()),
        **reward_means(scores, f"{prefix}/reward"),
        **response_metrics(rollout, prefix),
    }


def final_scores(rollout: Rollout, scores: Scores, ppo: Hyperparameters) -> Tensor:
    """The score of each row as it is trained on, with the penalty (as in TRL), float64 [B]."""
    totals_B = torch.tensor(scores.totals, dtype=torch.float64)
    return missing_stop(totals_B, torch.tensor(rollout.finished), ppo.missing_eos_penalty)


def reward_means(scores: Scores, prefix: str) -> dict[str, float]:
    """The mean of each reward of the run, without its weight."""
    return {f"{prefix}/{name}": sum(rows) / len(rows) for name, rows in scores.by_name.items()}


def response_metrics(rollout: Rollout, prefix: str) -> dict[str, float]:
    """Mean tokens of a response, and the share that reached the stop token."""
    return {
        f"{prefix}/length": sum(map(len, rollout.response_ids)) / len(rollout),
        f"{prefix}/finished": sum(rollout.finished) / len(rollout),
    }


def time_metrics(rollout: Rollout, clock: Clock) -> dict[str, float]:
    """Seconds of each phase, and rates over the whole update."""
    return {
        "eps": len(rollout) / clock.total,
        "time/tokens_per_second": sum(map(len, rollout.response_ids)) / clock.total,
        **{f"time/{name}": seconds for name, seconds in clock.laps.items()},
    }


def samples_of(rollout: Rollout, scores: Scores, count: int) -> list[dict[str, Any]]:
    """The first rows, as prompt, response, and score."""
    rows = zip(rollout.prompts, rollout.responses, scores.totals, strict=True)
    return [
        {"prompt": prompt, "response": response, "score": score}
        for _, (prompt, response, score) in zip(range(count), rows, strict=False)
    ]
