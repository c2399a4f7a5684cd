"""What one training run leaves: a curve. Knows no task and no trainer."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


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

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Curve":
        return cls(**json.loads(path.read_text()))


def of_log(log: list[dict[str, float]], name: str) -> list[float]:
    """The values of one metric in a trainer's log, in order."""
    return [entry[name] for entry in log if name in entry]
