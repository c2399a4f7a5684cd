"""Every kind of reward on real text, real plug-ins, real models; and answers that are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from ppo_engine import spec
from ppo_engine.issues import SpecError
from ppo_engine.rewards import ModelReward, NamedReward, RewardBatch, RewardError, Scorer, build
from ppo_engine.rewards import model as model_rewards
from ppo_engine.rewards.regex import RegexReward
from ppo_engine.rewards.script import scorer_of
from tests.engine import tiny


def batch(
    *responses: str, columns: list[dict[str, Any]] | None = None, prompts: list[str] | None = None
) -> RewardBatch:
    """Responses of space-separated words, one id per word."""
    tokenizer = tiny.tokenizer(bos=False)
    prompts = prompts or [f"one two {row}" for row in range(len(responses))]
    return RewardBatch(
        prompts=prompts,
        responses=list(responses),
        response_ids=[tokenizer(response)["input_ids"] for response in responses],
        columns=columns or [{} for _ in responses],
        prompt_ids=[tokenizer(prompt)["input_ids"] for prompt in prompts],
    )


def built(*rewards: dict[str, Any], waits: list[float] | None = None) -> Scorer:
    """The rewards of a spec, through the spec's own parser."""
    run = spec.parse(
        {
            "version": 1,
            "model": {"type": "local", "path": "m"},
            "prompts": {"train": "p"},
            "rewards": [{"name": "r", **reward} for reward in rewards],
        }
    )
    return build(run.rewards, wait=(waits if waits is not None else []).append)


def scores(reward: dict[str, Any], rows: RewardBatch) -> list[float]:
    return built(reward)(rows).scores


# Rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "expected"),
    [("eq", [1, 0, 0, 0]), ("ne", [0, 1, 1, 1]), ("like", [1, 1, 0, 0]), ("ilike", [1, 1, 1, 0])],
)
def test_string_check(operation: str, expected: list[float]) -> None:
    rows = batch("Straße", "die Straße hier", "STRASSE", "Weg")
    reward = {"type": "string_check", "operation": operation, "reference": "Straße"}
    assert scores(reward, rows) == expected


def test_string_check_against_a_column() -> None:
    rows = batch("one", "two", "3", columns=[{"answer": "one"}, {"answer": "one"}, {"answer": 3}])
    assert scores({"type": "string_check", "column": "answer"}, rows) == [1, 0, 1]


@pytest.mark.parametrize("column", [{}, {"answer": None}, {"answer": ["one"]}, {"answer": True}])
def test_string_check_needs_a_reference_in_every_row(column: dict[str, Any]) -> None:
    rows = batch("one", "two", columns=[{"answer": "one"}, column])
    message = r'Reward "r" for row 1 \(prompt "one two 1"\) failed: the row has .* in the column "answer"'
    with pytest.raises(RewardError, match=message):
        scores({"type": "string_check", "column": "answer"}, rows)


def test_regex() -> None:
    rows = batch("the answer is 42.", "no idea", "4 2")
    reward = {"type": "regex", "pattern": r"\d{2}\.$", "match": 2.5, "no_match": -1.0}
    assert scores(reward, rows) == [2.5, -1, -1]


def test_a_regex_that_backtracks_without_end_is_stopped() -> None:
    endless = RegexReward(r"^(a|aa|a.a|\w+)+$", seconds_per_row=0.25)
    fine, stopped = endless(batch("fine", "a" * 200 + "!"))
    assert fine == 1
    assert isinstance(stopped, RewardError)
    assert "0.25 s; write it without nested repetitions" in str(stopped)


def test_length() -> None:
    rows = batch("one two", "one two three four", "", "one two three four five six")
    expected = [-0.5, 0, -1, -0.5]
    assert scores({"type": "length", "target": 4, "unit": "token"}, rows) == expected
    assert scores({"type": "length", "target": 7, "unit": "text"}, batch("one two", "one")) == [0, -4 / 7]


def test_a_spec_names_and_weighs_its_rewards() -> None:
    scorer = built(
        {"name": "short", "type": "length", "target": 1, "weight": 2.0},
        {"name": "two", "type": "regex", "pattern": "two", "weight": -10.0},
    )
    found = scorer(batch("one", "one two"))
    assert found.by_name == {"short": [0, -1], "two": [0, 1]}
    assert found.scores == [0, -12]


# Plug-ins ------------------------------------------------------------------------------------------------

PLUGIN = """
from ppo_engine.rewards import RewardBatch


def counts(word, weight=1.0):
    def reward(batch: RewardBatch) -> list[float]:
        return [weight * response.split().count(word) + row.get("bonus", 0)
                for response, row in zip(batch.responses, batch.columns)]
    return reward


def no_reward():
    return 3


def away():
    def reward(batch: RewardBatch) -> list[float]:
        raise OSError("away")
    return reward
"""


@pytest.fixture
def installed_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution on the path with two entry points, as pip lays it down."""
    (tmp_path / "counting_words.py").write_text(PLUGIN)
    info = tmp_path / "counting_words-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: counting-words\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[proxima.rewards]\n"
        "counts = counting_words:counts\n"
        "number = counting_words:no_reward\n"
        "away = counting_words:away\n"
        "absent = counting_words:gone\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("installed_plugin")
def test_plugin_with_options_and_columns() -> None:
    rows = batch("one two two", "one", columns=[{}, {"bonus": 5}])
    reward = {"type": "plugin", "plugin": "counts", "options": {"word": "two", "weight": 1.5}}
    assert scores(reward, rows) == [3, 5]


@pytest.mark.usefixtures("installed_plugin")
def test_a_plugin_is_given_the_secret_and_nobody_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROXIMA_SECRET_WORD", "two")
    options = {"word": {"secret": "WORD"}, "weight": 1.0}
    assert scores({"type": "plugin", "plugin": "counts", "options": options}, batch("one two two")) == [2]


@pytest.mark.usefixtures("installed_plugin")
@pytest.mark.parametrize(
    ("plugin", "options", "message"),
    [
        ("counts", {"word": {"secret": "NONE"}}, r'"NONE" is named.*PROXIMA_SECRET_NONE'),
        ("cheerful", {}, r'"cheerful" given; installed are .*"counts"'),
        ("counts", {"wrod": "two"}, "failed with options .*wrod.* TypeError"),
        ("absent", {}, "AttributeError"),
        ("number", {}, "made a int; it must make a callable"),
    ],
)
def test_plugins_that_cannot_be(plugin: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        scores({"type": "plugin", "plugin": plugin, "options": options}, batch("one"))
    assert caught.value.issues[0].loc == ("rewards", 0, "plugin")


@pytest.mark.usefixtures("installed_plugin")
def test_a_plugin_is_asked_again_and_has_its_fallback() -> None:
    waits: list[float] = []
    spec = {"type": "plugin", "plugin": "away"}
    found = built(spec | {"retries": 3, "fallback": -2.0}, waits=waits)(batch("one", "two"))
    assert (found.scores, found.retried, found.failed) == ([-2, -2], {"r": 2}, {"r": 2})
    assert len(waits) == 3
    with pytest.raises(RewardError, match=r'Reward "r" failed: OSError: away \(asked 3 times\)'):
        built(spec, waits=waits)(batch("one", "two"))
    assert len(waits) == 3 + 2  # without a word, twice


# Several, and their answers ------------------------------------------------------------------------------


def scorer(*answers: Any, weights: tuple[float, ...] = ()) -> Scorer:
    """Rewards that give these answers, named a, b, …"""

    def answering(answer: Any) -> Callable[[RewardBatch], Any]:
        return lambda batch: answer

    return Scorer(
        [
            NamedReward(name, answering(answer), weight)
            for name, answer, weight in zip("abc", answers, weights or (1.0,) * len(answers), strict=False)
        ]
    )


def test_weighted_sum() -> None:
    found = scorer([1.0, 2.0], [10.0, 20.0], weights=(2.0, -0.5))(batch("one", "two"))
    assert found.scores == found.totals == [-3, -6]
    assert found.dense is None
    assert found.by_name == {"a": [1, 2], "b": [10, 20]}


def test_scores_per_token_and_per_row_together() -> None:
    rows = batch("one two", "one")
    found = scorer([[1.0, 2.0], [3.0]], [10.0, 20.0], [[1.0, 1.0], [1.0]], weights=(2, 1, 10))(rows)
    assert found.scores == [10, 20]
    assert found.dense == [[12, 14], [16]]
    assert found.totals == [36, 36]
    assert found.by_name == {"a": [3, 3], "b": [10, 20], "c": [2, 1]}


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2],
        (1.0, 2.0),
        [True, 2],
        np.array([1, 2]),
        [np.float32(1), np.float64(2)],
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        [torch.tensor(1.0), torch.tensor(2.0)],
    ],
)
def test_numbers_of_every_make(answer: Any) -> None:
    found = scorer(answer)(batch("one", "two")).scores
    assert found == [1.0, 2.0]
    assert all(type(score) is float for score in found)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, r'Reward "a" gave a NoneType; give a list with one entry per row\.'),
        (1.0, "gave a float"),
        ("ab", "gave a str"),
        ([1.0], "gave 1 entries for 2 rows"),
        ([1.0, 2.0, 3.0], "gave 3 entries for 2 rows"),
        ([1.0, math.nan], r'Reward "a" for row 1 \(prompt "one two 1"\) gave NaN; .* finite number'),
        ([math.inf, 1.0], "for row 0 .* gave Infinity"),
        ([1.0, None], "for row 1 .* gave null"),
        ([1.0, "2"], 'for row 1 .* gave "2"'),
        ([1.0, {}], "for row 1 .* gave a dict"),
        ([1.0, [1.0]], r"for row 0 .* gave 1\.0, but lists for other rows"),
        ([[1.0, 2.0], 1.0], r"for row 1 .* gave 1\.0, but lists for other rows"),
        ([1.0, 10**400], "for row 1 .* gave 1000"),
        ([[1.0], [1.0]], "for row 0 .* gave 1 numbers for 2 response tokens"),
        ([[1.0, 2.0], [[1.0]]], "for row 1 .* gave a list"),
        ([[1.0, 2.0], [math.nan]], "for row 1 .* gave NaN"),
        (torch.tensor([1.0, math.nan]), "for row 1 .* gave NaN"),
    ],
)
def test_answers_that_are_refused(answer: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        scorer(answer)(batch("one two", "one"))


def test_a_reward_that_fails_is_named() -> None:
    def divide(rows: RewardBatch) -> list[float]:
        return [1 / len(row) for row in rows.columns]

    with pytest.raises(RewardError, match=r'Reward "divide" .*failed: ZeroDivisionError') as caught:
        scorer_of(divide, None, "cpu")(batch("one"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_batch_has_one_entry_per_row_in_each_field() -> None:
    with pytest.raises(ValueError, match="one entry per row"):
        RewardBatch(prompts=["a"], responses=["b", "c"], response_ids=[[1], [2]], columns=[{}, {}])


# A script's rewards --------------------------------------------------------------------------------------


def longer(rows: RewardBatch) -> list[float]:
    return [float(len(ids)) for ids in rows.response_ids]


def test_functions_get_their_own_names() -> None:
    found = scorer_of([longer, longer, RegexReward("two"), lambda rows: [0.0] * len(rows)], None, "cpu")
    assert found(batch("one two")).by_name == {
        "longer": [2],
        "longer_2": [2],
        "RegexReward": [1],
        "lambda": [0],
    }


def test_named_rewards_keep_their_names_and_weights() -> None:
    model = tiny.reward_model()
    found = scorer_of([longer, NamedReward("longer", longer, 0.5), model], tiny.tokenizer(), "cpu")
    assert [(reward.name, reward.weight) for reward in found.rewards] == [
        ("longer_2", 1),
        ("longer", 0.5),
        ("model", 1),
    ]


def test_a_model_of_a_script_scores_the_policys_ids() -> None:
    model, rows = tiny.reward_model(), batch("three </s>")
    expected = score_alone(model, rows.prompt_ids[0] + rows.response_ids[0])
    assert scorer_of(model, tiny.tokenizer(), "cpu")(rows).scores == pytest.approx([expected], rel=1e-5)


def test_a_scorer_is_taken_as_it_is() -> None:
    given = scorer([1.0])
    assert scorer_of(given, None, "cpu") is given


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ([], ValueError),
        ([longer, 3], TypeError),
        ("longer", TypeError),
        ([NamedReward("a", longer), NamedReward("a", longer)], ValueError),
    ],
)
def test_what_is_no_reward(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        scorer_of(given, None, "cpu")


# Models --------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_alone(model: nn.Module, ids: list[int]) -> float:
    """The score at the last token of one row without padding: no mask can go wrong."""
    hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
    return float(model.score(hidden[0, -1]))


def test_model_scores_the_last_token_whatever_the_pad_token_is() -> None:
    # </s> (id 1) is the model's pad token. It ends some responses and stands within others: the model's own
    # forward would score these at another token.
    model = tiny.reward_model()
    rows = batch("three </s>", "</s> one two three four", "five", "six </s> </s>")
    reward = ModelReward(model, tiny.tokenizer(), shares_ids=True)
    ids = [prompt + response for prompt, response in zip(rows.prompt_ids, rows.response_ids, strict=True)]
    expected = [score_alone(model, row) for row in ids]
    assert reward(rows) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert len({round(score, 6) for score in expected}) == 4


def test_model_scores_do_not_depend_on_the_batch() -> None:
    reward = ModelReward(tiny.reward_model(), tiny.tokenizer())
    responses = ["one", "two three four five six", "seven eight"]
    prompts = ["nine", "nine", "nine"]
    together = reward(batch(*responses, prompts=prompts))
    alone = [reward(batch(response, prompts=["nine"]))[0] for response in responses]
    assert together == pytest.approx(alone, rel=1e-5, abs=1e-7)


def test_a_pad_token_beyond_the_models_vocabulary_does_no_harm() -> None:
    words = [*tiny.WORDS, "<new>"]
    reward = ModelReward(tiny.reward_model(), tiny.tokenizer(words, pad="<new>"), shares_ids=True)
    assert len(reward(batch("one", "one two three"))) == 2


def test_model_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    # The same words under other ids: policy ids mean nothing to this model.
    words = [*tiny.WORDS[:4], *reversed(tiny.WORDS[4:])]
    own, model = tiny.tokenizer(words), tiny.reward_model()
    source = {"type": "local", "path": tiny.save(model, own, tmp_path)}
    rows = batch("three four", prompts=["one two "])
    expected = score_alone(model, own("one two three four")["input_ids"])
    assert scores({"type": "model", "source": source}, rows) == pytest.approx([expected], rel=1e-5)


def test_model_with_its_chat_template(tmp_path: Path) -> None:
    own, model = tiny.tokenizer(chat=True), tiny.reward_model()
    source = {"type": "local", "path": tiny.save(model, own, tmp_path)}
    messages = [{"role": "user", "content": "one"}]
    rows = batch(
        "two", "two", prompts=["as the policy renders it", "one"], columns=[{"messages": messages}, {}]
    )
    expected = score_alone(model, [0, 4, 6, 5, 7])  # <s> user one assistant two
    found = scores({"type": "model", "source": source, "chat_template": True}, rows)
    assert found == pytest.approx([expected, expected], rel=1e-5)


def test_an_encoder_pools_in_its_own_way() -> None:
    model, tokenizer = tiny.encoder_reward_model().eval(), tiny.tokenizer()
    rows = batch("one", "one two three four", prompts=["five ", "five "])
    with torch.no_grad():
        expected = [
            model(input_ids=torch.tensor([tokenizer(f"five {response}")["input_ids"]])).logits.item()
            for response in rows.responses
        ]
    assert ModelReward(model, tokenizer)(rows) == pytest.approx(expected, rel=1e-5)


def test_an_encoder_that_counts_positions_from_its_padding(tmp_path: Path) -> None:
    # Of RoBERTa's 32 positions, the first 3 are never a token's: 30 tokens would be out of its table.
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tiny.WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        num_labels=1,
        pad_token_id=2,
    )
    path = tiny.save(RobertaForSequenceClassification(config), tiny.tokenizer(), tmp_path)
    spec = {"type": "model", "source": {"type": "local", "path": path}, "fallback": -7.0}
    rows = batch("two " * 27, "two " * 28, prompts=["nine ", "nine "])  # and <s> before each
    found = built(spec)(rows)
    assert math.isfinite(found.scores[0])
    assert found.scores[0] != -7
    assert (found.scores[1], found.failed) == (-7, {"r": 1})


def test_rows_are_cut_by_a_budget_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = tiny.reward_model(), list[torch.Size]()
    reward = ModelReward(model, tiny.tokenizer())
    rows = batch("one", "two " * 20, "three", "four four", prompts=["nine "] * 4)
    at_once = reward(rows)
    monkeypatch.setattr(model_rewards, "_MAX_TOKENS", 24)
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    assert reward(rows) == pytest.approx(at_once, rel=1e-5, abs=1e-7)
    assert len(shapes) == 2
    assert all(shape.numel() <= 24 for shape in shapes)


def test_a_text_without_tokens_has_a_score() -> None:
    reward = ModelReward(tiny.reward_model(), tiny.tokenizer(bos=False))
    assert math.isfinite(reward(batch("", prompts=[" "]))[0])


def test_dropout_and_gradients_are_off() -> None:
    model = tiny.reward_model().train()
    reward = ModelReward(model, tiny.tokenizer())
    assert not model.training
    assert reward(batch("one")) == reward(batch("one"))
    assert all(parameter.requires_grad for parameter in model.parameters())  # not ours to change


def model_refusal(source: str, **options: Any) -> str:
    with pytest.raises(SpecError) as caught:
        scores({"type": "model", "source": {"type": "local", "path": source}, **options}, batch("one"))
    (issue,) = caught.value.issues
    assert issue.loc == ("rewards", 0, "source")
    return issue.msg


def test_a_model_with_several_labels(tmp_path: Path) -> None:
    path = tiny.save(tiny.reward_model(labels=2), tiny.tokenizer(), tmp_path)
    assert "A model with 2 labels given; a reward is one number" in model_refusal(path)


def test_a_model_without_a_padding_token(tmp_path: Path) -> None:
    path = tiny.save(tiny.reward_model(pad_token_id=None), tiny.tokenizer(pad=None), tmp_path)
    assert "without a padding token" in model_refusal(path)


def test_a_model_without_a_trained_head(tmp_path: Path) -> None:
    path = tiny.save(tiny.reward_model().model, tiny.tokenizer(), tmp_path)
    assert "lacks the weights" in model_refusal(path)
    assert "score.weight" in model_refusal(path)


def test_a_chat_template_that_is_not_there(tmp_path: Path) -> None:
    path = tiny.save(tiny.reward_model(), tiny.tokenizer(), tmp_path)
    assert "tokenizer has none" in model_refusal(path, chat_template=True)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    assert "cannot be loaded" in model_refusal(str(tmp_path / "nowhere"))


def test_a_text_beyond_the_models_context() -> None:
    reward = ModelReward(tiny.reward_model(), tiny.tokenizer())
    rows = batch("one", "two " * 40, prompts=["nine ", "nine "])
    fits, too_long = reward(rows)
    assert fits == pytest.approx(reward(rows.take([0]))[0], rel=1e-5)
    assert isinstance(too_long, RewardError)
    assert "has 42 tokens with its response; the reward model has 32 positions" in str(too_long)
