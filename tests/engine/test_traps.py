"""Traps of TRL's last trainer that the whole trainer must not fall into, each in numbers that show it.

Those of one function are tested with it: whitening, losses, sampling, saving.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppo_engine.actor_critic import causal_lm
from ppo_engine.batch import Rollout
from ppo_engine.draws import Purpose
from ppo_engine.learn import StepStats, UpdateStats
from ppo_engine.logprobs import token_logprobs
from ppo_engine.prompts import rows_of_update
from ppo_engine.rewards import RewardBatch
from tests.engine import tiny
from tests.engine.recording import Recorder
from tests.engine.training import likes_seven, logged, trainer

ONE_STEP = {"num_ppo_epochs": 1, "num_mini_batches": 1, "total_episodes": 16}


def first_rollout(made: Any) -> Rollout:
    """What the first update samples."""
    rows = rows_of_update(0, made.plan.batch_size, len(made.prompts), made.ppo.seed)
    rollout: Rollout = made._sample([made.prompts[row] for row in rows], 1, Purpose.ROLLOUT, 1.0)
    return rollout


def test_2_adam_takes_epochs_times_mini_batches_steps_per_update(tmp_path: Path) -> None:
    changes = {"num_ppo_epochs": 3, "num_mini_batches": 2, "gradient_accumulation_steps": 4}
    made = trainer(tmp_path, changes={**changes, "total_episodes": 32})
    made.train()

    assert {int(state["step"]) for state in made.optimizer.state.values()} == {2 * 3 * 2}


def test_3_statistics_are_means_over_what_was_computed() -> None:
    """Two steps of 2 and 4 tokens; sums in the order of `learn._STATS`."""
    first = StepStats(torch.tensor([1.0, 3.0, 1.0, 5.0, 2.0, 8.0, 2.0, 0.0]), weight=2, grad_norm=3.0)
    second = StepStats(torch.tensor([6.0, 2.0, 4.0, 6.0, 6.0, 4.0, 4.0, 2.0]), weight=4, grad_norm=None)

    assert UpdateStats([first, second]).metrics(with_critic=True) == {
        "loss/policy_avg": (0.5 + 1.5) / 2,
        "loss/value_avg": (1.0 + 1.0) / 2,
        "policy/approxkl_avg": (1.5 + 0.5) / 2,
        "policy/clipfrac_avg": (0.5 + 1.0) / 2,
        "policy/entropy_avg": (2.5 + 1.5) / 2,
        "policy/grad_norm": 3.0,
        "val/clipfrac_avg": (0.0 + 0.5) / 2,
        "val/ratio": (1.0 + 1.5) / 2,
        "val/ratio_var": 0.125,
        "optimizer_steps": 1.0,
        "optimizer_steps_skipped": 1.0,
    }


def test_13_entropy_and_value_loss_are_means_over_response_tokens(tmp_path: Path) -> None:
    """By hand, row by row and without padding; rows end at different lengths."""
    made = trainer(tmp_path, changes={**ONE_STEP, "kl_coef": 0.0})
    rollout = first_rollout(made)
    assert len({len(ids) for ids in rollout.response_ids}) > 2
    entropies: list[Tensor] = []
    for prompt, response in zip(rollout.prompt_ids, rollout.response_ids, strict=True):
        with torch.no_grad():
            logits = causal_lm(made.model.policy)(torch.tensor([prompt + response])).logits[0].float()
        logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
        entropies.append(-(logprobs.exp() * logprobs).sum(-1))
    made.train()

    assert logged(made, "policy/entropy_avg") == [pytest.approx(float(torch.cat(entropies).mean()), rel=1e-5)]
    # Values start at zero, and lambda-returns of one score at the end are that score, discounted by lambda.
    squares = [
        (0.95 ** (len(ids) - 1 - t) * score) ** 2
        for ids, score in zip(rollout.response_ids, likes_seven_of(rollout), strict=True)
        for t in range(len(ids))
    ]
    assert logged(made, "loss/value_avg") == [pytest.approx(sum(squares) / len(squares) / 2, rel=1e-5)]


def likes_seven_of(rollout: Rollout) -> list[float]:
    return likes_seven(RewardBatch(rollout.prompts, rollout.responses, rollout.response_ids, rollout.columns))


def test_8_the_token_of_id_0_stops(tmp_path: Path) -> None:
    made = trainer(tmp_path, changes={**ONE_STEP, "stop_token_id": 0, "missing_eos_penalty": 5.0})
    rollout = first_rollout(made)
    made.train()

    assert 0 < sum(rollout.finished) < 16
    for ids, finished in zip(rollout.response_ids, rollout.finished, strict=True):
        assert finished == (ids[-1] == 0)
        assert 0 not in ids[:-1]
        assert finished or len(ids) == 8
    fines = 5 * (1 - sum(rollout.finished) / 16)
    expected = sum(likes_seven_of(rollout)) / 16 - fines
    assert logged(made, "objective/scores") == [pytest.approx(expected)]


def test_10_which_token_pads_changes_no_number(tmp_path: Path) -> None:
    """The eos as pad, where it is the stop token and is scored; and a word that stands in the prompts."""
    runs = {}
    for pad in ("<pad>", "</s>", "three"):
        made = trainer(
            tmp_path / pad.strip("</>"),
            processing_class=tiny.tokenizer(pad=pad),
            reward_model=tiny.reward_model(),
            changes={"stop_token_id": None, "stop_token": "eos", "missing_eos_penalty": 1.0},
        )
        made.train()
        timeless = [
            {name: value for name, value in entry.items() if not name.startswith(("time/", "eps"))}
            for entry in made.state.log_history
        ]
        assert 0 < logged(made, "response/finished")[0] < 1
        runs[pad] = timeless

    assert runs["<pad>"] == runs["</s>"] == runs["three"]


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_14_logits_in_chunks_give_the_same_values_and_gradients(chunk: int) -> None:
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(7, 5), nn.Linear(5, 11), torch.randint(11, (7,))
    weights = torch.randn(7)

    def run(chunk: int) -> tuple[Tensor, ...]:
        inputs = hidden.clone().requires_grad_()
        head.zero_grad()
        logprobs, entropies = token_logprobs(inputs, targets, head, chunk, "value")
        assert entropies is not None
        (logprobs * weights).sum().backward()
        assert inputs.grad is not None
        assert head.weight.grad is not None
        return logprobs.detach(), entropies, inputs.grad, head.weight.grad.clone()

    for whole, chunked in zip(run(100), run(chunk), strict=True):
        assert torch.allclose(whole, chunked, atol=1e-6)


def test_rewards_are_whitened_over_the_batch_and_keep_their_mean(tmp_path: Path, recorder: Recorder) -> None:
    """Values are zero and gamma and lambda one, so what a return gains from token to token is the reward."""
    trainer(tmp_path, changes={**ONE_STEP, "whiten_rewards": True, "lam": 1.0}).train()
    (experience,) = recorder.experiences
    assert experience.returns_BR is not None
    following = torch.cat([experience.returns_BR[:, 1:], torch.zeros(16, 1)], dim=1)
    whitened = (experience.returns_BR - following)[experience.mask_BR]
    raw = experience.rewards_BR[experience.mask_BR]

    assert float(raw.std()) < 0.5
    assert float(whitened.std()) == pytest.approx(1, abs=1e-4)
    assert float(whitened.mean()) == pytest.approx(float(raw.mean()), abs=1e-5)


def test_k3_is_what_the_reward_pays_and_the_metric_shows(tmp_path: Path, recorder: Recorder) -> None:
    made = trainer(tmp_path, changes={"kl_estimator": "k3", "kl_coef": 0.5})
    made.train()

    assert logged(made, "objective/kl")[-1] > 0
    for update, (tokens, experience) in enumerate(zip(recorder.tokens, recorder.experiences, strict=True)):
        log_ratio = (tokens.ref_logprobs_BR - tokens.logprobs_BR).double()
        kl_BR = (log_ratio.exp() - 1 - log_ratio) * experience.mask_BR
        mean = float(kl_BR.sum()) / 16
        assert logged(made, "objective/kl")[update] == pytest.approx(mean, abs=1e-5)
        assert logged(made, "objective/non_score_reward")[update] == pytest.approx(-0.5 * mean, abs=1e-5)
        first = experience.rewards_BR[experience.response_lengths_B > 1, 0].double()
        assert torch.allclose(first, -0.5 * kl_BR[experience.response_lengths_B > 1, 0], atol=1e-5)


def test_an_estimate_that_overflows_pays_nothing_where_its_weight_is_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """k3 of a token that the reference holds for far likelier than the policy."""
    made = trainer(tmp_path, changes={**ONE_STEP, "kl_estimator": "k3", "kl_coef": 0.0})
    monkeypatch.setattr(made, "_reference_logprobs", lambda rollout: torch.full((16, 8), 200.0))
    made.train()

    assert logged(made, "objective/kl") == [float("inf")]
    assert logged(made, "objective/non_score_reward") == [0.0]
    assert logged(made, "objective/rlhf_reward") == [pytest.approx(logged(made, "objective/scores")[0])]
    assert logged(made, "optimizer_steps_skipped") == [0.0]
