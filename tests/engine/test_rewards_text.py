"""Likeness to a text, and JSON of a schema, on real responses."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_engine.rewards import RewardError
from ppo_engine.rewards.json_schema import JsonSchemaReward
from ppo_engine.rewards.reference import Reference
from ppo_engine.rewards.text_similarity import Metric, TextSimilarityReward, fuzzy_match, rouge_l, rouge_n
from tests.engine.test_rewards import batch, built, scores

METRICS: tuple[Metric, ...] = ("fuzzy_match", "bleu", "rouge_1", "rouge_2", "rouge_l")
MAT = "The cat sat on the mat."
TEXTS = st.text("ab cé.", max_size=12)

# Likeness ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "response", "expected"),
    [
        # 2 * 5 characters in order, of 6 + 6.
        ("fuzzy_match", "abXdef", 2 * 5 / 12),
        # ("the" twice, "cat", "on", "mat": 5 of 6 and 6 words.)
        ("rouge_1", "the cat lay on THE mat", 5 / 6),
        # (the cat, on the, the mat: 3 of 5 and 5 pairs.)
        ("rouge_2", "the cat lay on THE mat", 3 / 5),
        # "the cat … on the mat" in order: 5 of 6 and 6.
        ("rouge_l", "the cat lay on THE mat", 5 / 6),
        # In another order: "the" twice and one of the others.
        ("rouge_l", "mat the on cat the sat", 2 * 3 / 12),
        # As often as in the one with fewer: one "cat" of 3 and 6 words.
        ("rouge_1", "cat cat cat", 2 * 1 / 9),
        ("rouge_2", "cat", 0),
        ("rouge_l", "", 0),
        # Precisions 7/7 of words and the point, 6/6, 5/5, 4/4.
        ("bleu", "The cat sat on the mat.", 1),
        # 6/7, 4/6, 2/5, and none of 4, which is smoothed to a half; the fourth root of their product.
        ("bleu", "The cat sat in the mat.", (6 / 7 * 4 / 6 * 2 / 5 * 0.5 / 4) ** 0.25),
        # All of it is there, and there are no orders beyond 2; brevity: 2 tokens for 7.
        ("bleu", "The cat", math.exp(1 - 7 / 2)),
        ("bleu", "", 0),
    ],
)
def test_worked_by_hand(metric: Metric, response: str, expected: float) -> None:
    reference = "abcdef" if metric == "fuzzy_match" else MAT
    reward = TextSimilarityReward(metric, Reference(reference))
    assert reward.similarity(response, reference) == pytest.approx(expected)


@given(TEXTS, TEXTS)
def test_likeness_lies_between_nothing_and_all(one: str, other: str) -> None:
    for metric in METRICS:
        reward = TextSimilarityReward(metric, Reference(""))
        assert 0 <= reward.similarity(one, other) <= 1
        assert reward.similarity(one, one) == 1


@given(TEXTS, TEXTS)
def test_f1_does_not_ask_which_is_the_response(one: str, other: str) -> None:
    assert rouge_l(one, other) == rouge_l(other, one)
    assert rouge_n(one, other, 2) == rouge_n(other, one, 2)
    assert fuzzy_match(one, other) == pytest.approx(fuzzy_match(other, one), abs=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_likeness_through_the_spec(metric: Metric) -> None:
    rows = batch("one two", "three", "3", columns=[{"a": "one two"}, {"a": "one two"}, {"a": 3}])
    assert scores({"type": "text_similarity", "metric": metric, "column": "a"}, rows)[::2] == [1, 1]
    found = scores({"type": "text_similarity", "metric": metric, "reference": "one two"}, rows)
    assert found[0] == 1 > found[1]


def test_a_row_without_a_reference_has_the_fallback() -> None:
    rows = batch("one", "two", columns=[{}, {"a": "two"}])
    for kind in ("text_similarity", "string_check"):
        spec = {"type": kind, "column": "a"}
        with pytest.raises(RewardError, match=r'Reward "r" for row 0 .* has null in the column "a"'):
            built(spec)(rows)
        found = built(spec | {"fallback": -1.0})(rows)
        assert (found.scores, found.failed, found.retried) == ([-1, 1], {"r": 1}, {})


# JSON ----------------------------------------------------------------------------------------------------

CITY: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$id": "https://example.com/city",
    "type": "object",
    "required": ["city"],
    "properties": {"city": {"$ref": "#/$defs/name"}, "people": {"type": "integer", "minimum": 0}},
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "pattern": "^[A-Z]"}},
}


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ('{"city": "Ulm", "people": 126000}', 2),
        (' {"city": "Ulm"}\n', 2),
        ('{"city": "ulm"}', -1),
        ('{"city": "Ulm", "people": -1}', -1),
        ('{"city": "Ulm", "river": "Donau"}', -1),
        ("{}", -1),
        ('Here it is: {"city": "Ulm"}', -1),
        ('{"city": "Ulm"', -1),
        ("", -1),
        ("null", -1),
        ('{"city": "Ulm", "people": NaN}', -1),
    ],
)
def test_json_of_a_schema(response: str, expected: float) -> None:
    spec = {"type": "json_schema", "schema": CITY, "match": 2.0, "no_match": -1.0}
    assert scores(spec, batch(response)) == [expected]


def test_a_schema_that_hangs_stops_at_that_row() -> None:
    reward = JsonSchemaReward({"pattern": r"^(a|aa|a.a|\w+)+$"}, seconds_per_row=0.2)
    fine, stopped = reward(batch('"fine"', '"' + "a" * 200 + '!"'))
    assert fine == 1
    assert isinstance(stopped, RewardError)
    assert "it took more than 0.2 s" in str(stopped)
    assert stopped.lasting
