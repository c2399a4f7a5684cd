"""The reward plug-in: the optimality of each sampled walk. Installed beside the worker by its operator."""

from collections.abc import Callable, Sequence
from typing import Protocol

from randomwalks.graph import random_walks


class Batch(Protocol):
    """What this reward reads of the batch that Proxima hands it: the texts, row by row."""

    @property
    def prompts(self) -> Sequence[str]: ...

    @property
    def responses(self) -> Sequence[str]: ...


def optimality() -> Callable[[Batch], list[float]]:
    """The factory that the entry point names: called once per run, it returns the scoring function."""
    graph, _ = random_walks()

    def score(batch: Batch) -> list[float]:
        walks = [prompt + response for prompt, response in zip(batch.prompts, batch.responses, strict=True)]
        return [graph.optimality(walk) for walk in walks]

    return score
