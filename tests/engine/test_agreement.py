"""What sampling computed serves as what training computes, where the two agree; else a forward is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppo_engine.actor_critic import causal_lm, trunk
from ppo_engine.batch import padded
from ppo_engine.draws import Purpose
from ppo_engine.rollout.agreement import samples_as_it_trains
from ppo_engine.trainer import PPOTrainer
from tests.engine import tiny
from tests.engine.training import logged, trainer, value_model

CPU = torch.device("cpu")


def sampled(made: PPOTrainer) -> Any:
    return made._sample(made.prompts[:6], 1, Purpose.ROLLOUT, made.ppo.temperature)


def moved(made: PPOTrainer) -> PPOTrainer:
    """With values that are not all zero."""
    with torch.no_grad():
        for parameter in made.model.critic_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 10)
    return made


def test_log_probabilities_and_values_of_sampling_are_those_of_the_training_forward(tmp_path: Path) -> None:
    made = moved(trainer(tmp_path, lora=True, changes={"temperature": 0.7}))
    rollout = sampled(made)
    logprobs_BR, values_BR = made.learner.score(made.model_wrapped, rollout, with_value=True)

    assert len({len(ids) for ids in rollout.response_ids}) > 1
    assert torch.allclose(padded(rollout.logprobs, CPU), logprobs_BR, atol=1e-5)
    assert values_BR is not None
    assert values_BR.abs().max() > 0.01
    assert torch.allclose(padded(rollout.values, CPU), values_BR, atol=1e-5)


@pytest.mark.parametrize("critic", ["adapter", "model"])
def test_a_critic_with_a_forward_of_its_own_makes_it_alone(tmp_path: Path, critic: str) -> None:
    own: dict[str, Any] = (
        {"changes": {"value_adapter": True}} if critic == "adapter" else {"value_model": value_model()}
    )
    made = moved(trainer(tmp_path, lora=True, **own))
    assert made.model.critic == critic
    rollout = sampled(made)
    _, values_BR = made.learner.score(made.model_wrapped, rollout, with_value=True)

    assert rollout.values is None
    assert values_BR is not None
    assert values_BR.abs().max() > 0.01
    assert torch.equal(made._policy_scores(rollout)[1], values_BR)


def test_a_model_whose_cache_computes_something_else_is_scored_by_a_forward(tmp_path: Path) -> None:
    model = tiny.policy()

    def stray(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if kwargs["input_ids"].shape[1] == 1:  # a step with a cache
            turned: Tensor = output.last_hidden_state.roll(1, -1)
            output.last_hidden_state = turned
        return output

    trunk(causal_lm(model)).register_forward_hook(stray, with_kwargs=True)
    one_step = {"num_ppo_epochs": 1, "num_mini_batches": 1, "total_episodes": 16}
    made = trainer(tmp_path, model=model, changes=one_step)
    assert not made.samples_as_it_trains
    assert sampled(made).logprobs is None
    made.train()
    assert logged(made, "val/ratio") == [pytest.approx(1.0, abs=1e-6)]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_change_with_the_length_are_scored_by_a_forward(tmp_path: Path, kind: str) -> None:
    made = trainer(tmp_path)
    assert made.samples_as_it_trains
    made.model.config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0}
    assert not samples_as_it_trains(made.model)


def test_in_half_precision_a_forward_scores(tmp_path: Path) -> None:
    made = trainer(tmp_path, changes={"bf16": True})
    assert sampled(made).logprobs is None
