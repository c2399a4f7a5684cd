"""One contract for every kind of reward: what a response's text and its ids are, however it ended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from accelerate import Accelerator

from ppo_engine import reward_kinds
from ppo_engine.batch import Rollout
from ppo_engine.hyperparameters import Hyperparameters
from ppo_engine.memory import Room
from ppo_engine.parallel import Parallel
from ppo_engine.prompts import Prompt
from ppo_engine.rewards import NamedReward, RewardBatch, Scorer, Scores
from ppo_engine.rollout.collect import Collector, _joined
from ppo_engine.rollout.generate import Response
from tests.engine import tiny
from tests.engine.reward_server import Asked, Exchange, serving
from tests.engine.test_rewards import built, score_alone

TOKENIZER = tiny.tokenizer(bos=False)
STOPS = {"</s>": 1, "ten": tiny.WORDS.index("ten")}
"""A special token, and a word like any other."""
PROMPT = "nine"

ENDS: dict[str, tuple[str, bool, str]] = {
    "finished": ("one two STOP", True, "one two"),
    "truncated": ("one two three", False, "one two three"),
    "truncated at once": ("one", False, "one"),
    "stop token only": ("STOP", True, ""),
    "special tokens only": ("<pad> <s>", False, ""),
    "special token inside": ("one <pad> two STOP", True, "one two"),
}
"""What was written, whether it finished, and its text."""


def kinds() -> set[str]:
    union = get_args(reward_kinds.Reward)[0]
    return {member.model_fields["type"].default for member in get_args(union)}


def rollout_of(stop: str, scorer: Scorer) -> tuple[Collector, Rollout]:
    """The responses above as a run has them."""
    accelerator = Accelerator(cpu=True)
    parallel = Parallel(accelerator, 1.0)
    room = Room(parallel, lambda *_: None)
    collector = Collector(parallel, TOKENIZER, Hyperparameters(), STOPS[stop], scorer, room)
    written = [TOKENIZER(text.replace("STOP", stop))["input_ids"] for text, _, _ in ENDS.values()]
    finished = [ends for _, ends, _ in ENDS.values()]
    prompts = [Prompt(PROMPT, TOKENIZER(PROMPT)["input_ids"], {"answer": "one two"}) for _ in ENDS]
    responses = [Response(ids, end, []) for ids, end in zip(written, finished, strict=True)]
    return collector, collector._rollout(prompts, responses)


def per_row(exchange: Exchange) -> None:
    """Characters and tokens of each row, as the server sees them."""
    rows = zip(exchange.rows["responses"], exchange.rows["response_ids"], strict=True)
    scores = [100 * len(text) + len(ids) for text, ids in rows]
    exchange.answer(json.dumps({"scores": scores}).encode())


PLUGIN = """
def measures():
    return lambda batch: [
        100 * len(text) + len(ids) for text, ids in zip(batch.responses, batch.response_ids, strict=True)
    ]
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    monkeypatch.setenv("PROXIMA_HTTP_ALLOW_PRIVATE", "1")
    with serving(per_row) as asked:
        yield asked


@pytest.fixture
def specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Asked) -> dict[str, dict[str, Any]]:
    """A reward of each kind."""
    (tmp_path / "measuring.py").write_text(PLUGIN)
    info = tmp_path / "measuring-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: measuring\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[proxima.rewards]\nmeasures = measuring:measures\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = tiny.save(tiny.reward_model(), tiny.tokenizer(), tmp_path / "model")
    return {
        "model": {"source": {"type": "local", "path": model}},
        "string_check": {"operation": "eq", "column": "answer"},
        "text_similarity": {"metric": "rouge_1", "column": "answer"},
        "json_schema": {"schema": {}},
        "regex": {"pattern": "^$"},
        "length": {"target": 1, "unit": "text"},
        "plugin": {"plugin": "measures"},
        "http": {"url": server.url()},
    }


@pytest.mark.parametrize("stop", STOPS)
def test_each_kind_sees_the_same_responses(specs: dict[str, dict[str, Any]], stop: str) -> None:
    scorer = built(*({"type": kind, "name": kind, **fields} for kind, fields in specs.items()))
    collector, rollout = rollout_of(stop, scorer)
    found = collector.score(rollout).by_name

    texts = [text for _, _, text in ENDS.values()]
    tokens = [len(written.split()) for written, _, _ in ENDS.values()]
    assert rollout.responses == texts
    model = tiny.reward_model()
    of_model = [score_alone(model, tiny.tokenizer()(PROMPT + text)["input_ids"]) for text in texts]
    common = [len({"one", "two"} & set(text.split())) for text in texts]
    measured = [100 * len(text) + count for text, count in zip(texts, tokens, strict=True)]
    expected = {
        "model": pytest.approx(of_model, rel=1e-5),
        "string_check": [float(text == "one two") for text in texts],
        "text_similarity": [
            2 * count / (2 + len(text.split())) for count, text in zip(common, texts, strict=True)
        ],
        "json_schema": [0.0] * len(texts),
        "regex": [float(text == "") for text in texts],
        "length": [-abs(len(text) - 1.0) for text in texts],
        "plugin": measured,
        "http": measured,
    }
    assert found == expected
    assert set(found) == kinds() - {"adapter"}  # which reads the policy's own ids


@pytest.mark.parametrize("stop", STOPS)
def test_a_length_in_tokens_counts_all_that_was_written(stop: str) -> None:
    scorer = built({"type": "length", "target": 1, "unit": "token"})
    collector, rollout = rollout_of(stop, scorer)
    written = [len(text.split()) for text, _, _ in ENDS.values()]
    assert collector.score(rollout).scores == [1 - count for count in written]


def test_counts_of_all_processes_are_summed() -> None:
    def fails_at_two(batch: RewardBatch) -> list[float | None]:
        return [None if text == "two" else 1.0 for text in batch.responses]

    named = NamedReward("r", fails_at_two, retries=1, fallback=-1.0)
    scorer = Scorer([named], wait=lambda seconds: None)
    _, rollout = rollout_of("ten", scorer)
    both: list[Scores] = [
        scorer(RewardBatch(["p"] * len(texts), texts, [[6]] * len(texts), [{}] * len(texts)))
        for texts in (["one", "two"], ["two", "two", "three", "four"])
    ]
    joined = _joined(both, rollout)
    assert joined.scores == [1, -1, -1, -1, 1, 1]
    assert (joined.retried, joined.failed) == ({"r": 3}, {"r": 3})
