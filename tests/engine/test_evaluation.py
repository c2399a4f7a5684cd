"""What an evaluation measures and shows: sampled and most likely responses, however they are batched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppo_engine.actor_critic import causal_lm
from ppo_engine.issues import SpecError
from ppo_engine.rewards import NamedReward, RewardBatch, Scorer
from ppo_engine.rollout.generate import generate
from tests.engine.training import GOOD, PROMPTS, STOP, likes_seven, logged, trainer

HELD_OUT = PROMPTS[:7]


def test_the_greedy_numbers_are_those_of_the_most_likely_responses(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset=HELD_OUT)
    metrics = made.evaluate()
    prompts = [prompt.ids for prompt in made.eval_prompts[""]]
    responses = generate(
        causal_lm(made.model.policy),
        prompts,
        np.zeros((len(prompts), 8)),
        temperature=0.0,
        stop_token_id=STOP,
        batch_rows=2,
        device=made.parallel.device,
    )
    shares = [response.ids.count(GOOD) / len(response.ids) for response in responses]
    assert metrics["eval/greedy/scores"] == pytest.approx(np.mean(shares))
    assert metrics["eval/greedy/scores_std"] == pytest.approx(np.std(shares))
    assert metrics["eval/greedy/length"] == np.mean([len(response.ids) for response in responses])
    assert metrics["eval/greedy/finished"] == np.mean([response.finished for response in responses])
    assert metrics["eval/length"] != metrics["eval/greedy/length"]


def test_each_reward_has_its_mean_and_deviation(tmp_path: Path) -> None:
    metrics = trainer(tmp_path, eval_dataset=HELD_OUT).evaluate()
    for prefix in ("eval", "eval/greedy"):
        assert metrics[f"{prefix}/reward/likes_seven"] == metrics[f"{prefix}/scores"]
        assert metrics[f"{prefix}/reward/likes_seven/std"] == metrics[f"{prefix}/scores_std"]
    assert metrics["eval/scores_std"] > 0


def test_batch_size_changes_no_number(tmp_path: Path) -> None:
    one, other = (
        trainer(tmp_path, eval_dataset=HELD_OUT, changes={"per_device_eval_batch_size": rows}).evaluate()
        for rows in (1, 7)
    )
    assert one == other


def test_several_data_sets_have_greedy_numbers_of_their_own(tmp_path: Path) -> None:
    several = {"first": HELD_OUT[:3], "second": HELD_OUT[3:]}
    metrics = trainer(tmp_path, eval_dataset=several).evaluate()
    assert {"eval/first/greedy/scores", "eval/second/greedy/scores"} <= metrics.keys()


def test_greedy_numbers_are_logged_at_every_evaluation_of_a_run(tmp_path: Path) -> None:
    steps = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    made = trainer(tmp_path, eval_dataset=HELD_OUT, changes=steps)
    made.train()
    assert len(logged(made, "eval/greedy/scores")) == len(logged(made, "eval/scores")) > 1


def test_the_last_update_is_evaluated_whatever_the_steps(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset=HELD_OUT, changes={"eval_strategy": "steps", "eval_steps": 2})
    made.train()
    assert [entry["step"] for entry in made.state.log_history if "eval/scores" in entry] == [2, 3]


@pytest.mark.parametrize("names", [("a", "a/greedy"), ("b/c", "b"), ("a", "b", "b/reward/likes_seven")])
def test_data_sets_whose_metrics_could_have_the_same_names_are_refused(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    with pytest.raises(SpecError, match="does not begin with another one and a slash") as caught:
        trainer(tmp_path, eval_dataset=dict.fromkeys(names, HELD_OUT))
    longer, shorter = sorted(names[-2:], key=len, reverse=True)
    assert caught.value.issues[0].loc == ("eval_dataset", longer)
    assert f'"{longer}" given beside "{shorter}"' in caught.value.issues[0].msg


def test_names_that_only_look_alike_are_taken(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset={"a": HELD_OUT[:2], "ab": HELD_OUT[:2], "c/greedy": HELD_OUT[:2]})
    metrics = made.evaluate()
    assert len([name for name in metrics if name.endswith("/scores")]) == 6


# Samples -----------------------------------------------------------------------------------------------


def length(batch: RewardBatch) -> list[float]:
    return [float(len(ids)) for ids in batch.response_ids]


def shown_by(made: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[dict[str, Any]]]]:
    """What is shown from now on: each time the update, and the samples."""
    shown: list[tuple[int, list[dict[str, Any]]]] = []
    monkeypatch.setattr(made, "log_samples", lambda samples, update: shown.append((update, samples)))
    return shown


def test_an_evaluation_shows_sampled_and_greedy_responses_with_each_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer([NamedReward("seven", likes_seven), NamedReward("long", length, weight=-0.5)])
    made = trainer(tmp_path, eval_dataset={"a": HELD_OUT, "b": PROMPTS[20:22]}, reward_model=scorer)
    shown = shown_by(made, monkeypatch)
    metrics = made.evaluate()

    ((update, samples),) = shown
    assert update == 0
    assert [sample["kind"] for sample in samples] == [
        *(["eval/a"] * 5),
        *(["eval/a/greedy"] * 5),
        *(["eval/b"] * 2),
        *(["eval/b/greedy"] * 2),
    ]
    for sample in samples:
        assert sample.keys() == {"kind", "prompt", "response", "score", "rewards"}
        assert sample["score"] == pytest.approx(sample["rewards"]["seven"] - 0.5 * sample["rewards"]["long"])
    for kind in ("eval/b", "eval/b/greedy"):  # of which all are shown
        own = [sample for sample in samples if sample["kind"] == kind]
        assert [sample["prompt"] for sample in own] == [row["prompt"] for row in PROMPTS[20:22]]
        assert np.mean([sample["rewards"]["long"] for sample in own]) == metrics[f"{kind}/reward/long"]


def test_an_update_shows_all_its_samples_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 2, "num_sample_generations": 3, "eval_on_start": True}
    made = trainer(tmp_path, eval_dataset=HELD_OUT, changes=changes)
    shown = shown_by(made, monkeypatch)
    made.train()

    kinds = {update: {sample["kind"] for sample in samples} for update, samples in shown}
    both = {"eval", "eval/greedy"}
    assert kinds == {0: both, 1: {"eval/greedy"}, 2: both, 3: both}
    assert [update for update, _ in shown] == [0, 1, 2, 3]
