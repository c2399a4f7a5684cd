"""Reward by how much the response resembles a text. Knows no spec and no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import regex
from rapidfuzz import fuzz
from rapidfuzz.distance import LCSseq
from sacrebleu.metrics.bleu import BLEU

from ppo_engine.rewards.contract import RewardBatch, RewardError, row_by_row
from ppo_engine.rewards.reference import Reference

Metric = Literal["fuzzy_match", "bleu", "rouge_1", "rouge_2", "rouge_l"]

_WORD = regex.compile(r"\w+")
_BLEU = BLEU(effective_order=True)


@dataclass(frozen=True)
class TextSimilarityReward:
    """From 0, nothing in common, to 1, the same."""

    metric: Metric
    reference: Reference

    def __call__(self, batch: RewardBatch) -> list[float | RewardError]:
        return row_by_row(
            batch, lambda row: self.similarity(batch.responses[row], self.reference.of(batch, row))
        )

    def similarity(self, response: str, reference: str) -> float:
        """Of two texts. What is the same is so without any words, too."""
        return 1.0 if response == reference else _METRICS[self.metric](response, reference)


def fuzzy_match(response: str, reference: str) -> float:
    """Twice the longest common subsequence of characters over the characters of both (rapidfuzz's ratio)."""
    return fuzz.ratio(response, reference) / 100


def bleu(response: str, reference: str) -> float:
    """Sentence BLEU up to 4-grams (Papineni et al. 2002), as sacrebleu has it: its tokens 13a, its smoothing
    exp, and orders beyond the response's length left out."""
    # The mean of logarithms may end a rounding above 100.
    return min(float(_BLEU.sentence_score(response, [reference]).score) / 100, 1.0)


def rouge_n(response: str, reference: str, n: int) -> float:
    """F1 of the n-grams of words that both have (Lin 2004); one that stands in them several
    times counts as often as in the one with fewer."""
    theirs, ours = _ngrams(_words(response), n), _ngrams(_words(reference), n)
    return _f1((theirs & ours).total(), theirs.total(), ours.total())


def rouge_l(response: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, for one sentence)."""
    theirs, ours = _words(response), _words(reference)
    return _f1(LCSseq.similarity(theirs, ours), len(theirs), len(ours))


def _words(text: str) -> list[str]:
    """Without case and punctuation, in any script; not stemmed."""
    return _WORD.findall(text.casefold())


def _ngrams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def _f1(common: int, responses: int, references: int) -> float:
    """Of precision common / responses and recall common / references."""
    return 2 * common / (responses + references) if common else 0.0


_METRICS: dict[Metric, Callable[[str, str], float]] = {
    "fuzzy_match": fuzzy_match,
    "bleu": bleu,
    "rouge_1": lambda response, reference: rouge_n(response, reference, 1),
    "rouge_2": lambda response, reference: rouge_n(response, reference, 2),
    "rouge_l": rouge_l,
}
