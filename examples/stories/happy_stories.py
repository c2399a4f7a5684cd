"""A reward plug-in: how happy a response sounds, by the VADER sentiment lexicon.

An operator installs it beside the worker (`pip install ./examples/stories`); a job then asks for it by the
name of its entry point, `happiness`. A plug-in is a factory: it is called once per run with the options of
the spec, and returns the function that scores each batch.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


class Batch(Protocol):
    """What this reward reads of the batch that Proxima hands it."""

    @property
    def responses(self) -> Sequence[str]:
        """The text of every response, prompt and special tokens left out."""


def happiness() -> Callable[[Batch], list[float]]:
    """Score every response from -1 (as sad as can be) to 1 (as happy as can be)."""
    analyzer = SentimentIntensityAnalyzer()

    def score(batch: Batch) -> list[float]:
        return [analyzer.polarity_scores(text)["compound"] for text in batch.responses]

    return score
