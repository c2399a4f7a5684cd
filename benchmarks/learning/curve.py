"""What one training run leaves, a curve, and what all runs are given. Knows no task and no trainer."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PLAIN: dict[str, Any] = {
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "num_sample_generations": 0,
}
"""Arguments of every run: fp32 on a CPU, each update in the log, and nothing else written."""


@dataclass(frozen=True)
class Curve:
    """episodes, rewards: after each update, the responses sampled so far and their mean score. kl: of each
    update, the mean divergence of a response from the reference. final: mean score of the final policy.
    """

    task: str
    variant: str
    seed: int
    episodes: list[float]
    rewards: list[float]
    kl: list[float]
    final: float

    @classmethod
    def of_run(
        cls,
        task: str,
        variant: str,
        seed: int,
        batch: int,
        log: list[dict[str, float]],
        final: float | None = None,
    ) -> "Curve":
        """From a trainer's log. final: by default the mean of the last ten updates."""
        rewards = of_log(log, "objective/scores")
        return cls(
            task=task,
            variant=variant,
            seed=seed,
            episodes=[float(batch * update) for update in range(1, len(rewards) + 1)],
            rewards=rewards,
            kl=of_log(log, "objective/kl"),
            final=sum(rewards[-10:]) / len(rewards[-10:]) if final is None else final,
        )

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Curve":
        return cls(**json.loads(path.read_text()))


def of_log(log: list[dict[str, float]], name: str) -> list[float]:
    """The values of one metric in a trainer's log, in order."""
    return [entry[name] for entry in log if name in entry]
