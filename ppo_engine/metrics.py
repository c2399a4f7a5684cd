"""What an update is told by: TRL's metric names, and more beside them.

Sums over a row's tokens are averaged over rows; `time/...` and `eps` are the only ones that a repeated run
does not repeat. This module does not know where metrics go.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ppo_engine.advantages import kl_rewards, missing_stop
from ppo_engine.batch import Experience, Rollout
from ppo_engine.hyperparameters import Hyperparameters
from ppo_engine.rewards import Scores


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
    rollout: Rollout,
    scores: Scores,
    experience: Experience,
    kl_BR: Tensor,
    ppo: Hyperparameters,
    kl_coef: float,
    eos_token_id: int | None,
) -> dict[str, float]:
    """What the rollout of an update shows, before its optimizer steps. eos_token_id: the tokenizer's."""
    rows = len(rollout)
    scores_B = final_scores(rollout, scores, ppo)
    non_score = kl_rewards(kl_BR.double(), kl_coef if ppo.kl_placement == "reward" else 0.0)
    written_BR = torch.where(experience.mask_BR, experience.logprobs_BR.double(), 0.0)
    return {
        "objective/kl": mean_kl(kl_BR),
        "objective/kl_coef": kl_coef,
        "objective/entropy": -float(written_BR.sum()) / rows,
        "objective/non_score_reward": float(non_score.sum()) / rows,
        "objective/scores": float(scores_B.mean()),
        "objective/scores_std": float(scores_B.std(correction=0)),
        "objective/rlhf_reward": float(experience.rewards_BR.double().sum()) / rows,
        **reward_metrics(scores, "reward"),
        "val/num_eos_tokens": float(
            sum(token == eos_token_id for ids in rollout.response_ids for token in ids)
        ),
        **response_metrics(rollout, "response"),
    }


def mean_kl(kl_BR: Tensor) -> float:
    """Of a response, summed over its tokens."""
    return float(kl_BR.double().sum()) / len(kl_BR)


def evaluation_metrics(
    rollout: Rollout, scores: Scores, ppo: Hyperparameters, prefix: str
) -> dict[str, float]:
    """What the rollout of an evaluation shows; deviations are those of the rows themselves."""
    scores_B = final_scores(rollout, scores, ppo)
    return {
        f"{prefix}/scores": float(scores_B.mean()),
        f"{prefix}/scores_std": float(scores_B.std(correction=0)),
        **reward_metrics(scores, f"{prefix}/reward"),
        **{
            f"{prefix}/reward/{name}/std": float(torch.tensor(rows, dtype=torch.float64).std(correction=0))
            for name, rows in scores.by_name.items()
        },
        **response_metrics(rollout, prefix),
    }


def final_scores(rollout: Rollout, scores: Scores, ppo: Hyperparameters) -> Tensor:
    """The score of each row with the penalty (as in TRL), before it is shaped, float64 [B]."""
    totals_B = torch.tensor(scores.totals, dtype=torch.float64)
    return missing_stop(totals_B, torch.tensor(rollout.finished), ppo.missing_eos_penalty)


def reward_metrics(scores: Scores, prefix: str) -> dict[str, float]:
    """Of each reward of the run: its mean, without its weight; how many rows it was asked for again, where it
    has retries; for how many its fallback stands, where it has one."""
    return {
        **{f"{prefix}/{name}": sum(rows) / len(rows) for name, rows in scores.by_name.items()},
        **{f"{prefix}/{name}/retried": float(rows) for name, rows in scores.retried.items()},
        **{f"{prefix}/{name}/failed": float(rows) for name, rows in scores.failed.items()},
    }


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


def samples_of(rollout: Rollout, scores: Scores, kind: str, count: int) -> list[dict[str, Any]]:
    """The first `count` rows, each with its score and what every reward gave it, without weights.

    kind: "train", or what the metrics of the evaluation begin with, such as "eval/greedy".
    """
    return [
        {
            "kind": kind,
            "prompt": rollout.prompts[row],
            "response": rollout.responses[row],
            "score": scores.totals[row],
            "rewards": {name: rows[row] for name, rows in scores.by_name.items()},
        }
        for row in range(min(count, len(rollout)))
    ]


def first_of_each_kind(samples: Iterable[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Of samples, so many of each kind at most; those of a kind stand together."""
    kinds = groupby(samples, key=itemgetter("kind"))
    return [sample for _, own in kinds for sample in islice(own, count)]


def columns_of(samples: Sequence[Mapping[str, Any]], update: int) -> dict[str, list[Any]]:
    """Samples as a table with a row for each; what a reward gave has the name of its metric."""
    plain = ("kind", "prompt", "response", "score")
    return {
        "update": [update] * len(samples),
        **{name: [sample[name] for sample in samples] for name in plain},
        **{
            f"reward/{name}": [sample["rewards"][name] for sample in samples]
            for name in samples[0]["rewards"]
        },
    }
