"""What each choice of the algorithm does to a run, seen in weights, gradients, and metrics of trainers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_engine import PPOTrainer
from ppo_engine import trainer as trainer_module
from ppo_engine.advantages import adapted_kl_coef
from ppo_engine.batch import Rollout
from ppo_engine.rewards import NamedReward, RewardBatch
from tests.engine import ranks
from tests.engine.recording import Recorder
from tests.engine.training import GOOD, PROMPTS, config, likes_seven, logged, trainer

LONG = {"total_episodes": 16 * 25, "learning_rate": 1e-2, "kl_coef": 0.0, "stop_token_id": None}
ONE_STEP = {"num_ppo_epochs": 1, "num_mini_batches": 1, "total_episodes": 16}
GROUPS = {"num_return_sequences": 4}
WITHOUT_CRITIC: dict[str, dict[str, Any]] = {
    "rloo": {"advantage_estimator": "rloo", **GROUPS},
    "grpo": {"advantage_estimator": "grpo", **GROUPS},
    "reinforce++": {"advantage_estimator": "reinforce++"},
}


def run(directory: Path, changes: dict[str, Any] | None = None, **given: Any) -> PPOTrainer:
    trained = trainer(directory, changes=changes, **given)
    trained.train()
    return trained


# KL ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_in_the_loss_holds_the_policy_and_is_not_paid(tmp_path: Path, estimator: str) -> None:
    free = run(tmp_path / "a", LONG)
    changes = {"kl_placement": "loss", "kl_estimator": estimator, "kl_coef": 0.5}
    held = run(tmp_path / "b", {**LONG, **changes})

    assert logged(held, "objective/kl")[-1] < logged(free, "objective/kl")[-1] / 2
    assert logged(held, "objective/non_score_reward") == [0.0] * 25
    assert logged(held, "objective/rlhf_reward") == pytest.approx(logged(held, "objective/scores"), abs=1e-6)


ADAPTING = {
    "kl_coef": 0.3,
    "adaptive_kl_target": 0.5,
    "adaptive_kl_horizon": 64.0,
    "normalize_scores": True,
    "total_episodes": 64,
}


def test_the_kl_coefficient_follows_the_divergence(tmp_path: Path) -> None:
    made = run(tmp_path, ADAPTING)

    coefficients, divergences = logged(made, "objective/kl_coef"), logged(made, "objective/kl")
    assert coefficients[0] == 0.3
    for (now, following), kl in zip(itertools.pairwise(coefficients), divergences, strict=False):
        assert following == adapted_kl_coef(now, kl, 0.5, 64.0, 16)
    assert len(set(coefficients)) == 4
    for paid, coefficient, kl in zip(
        logged(made, "objective/non_score_reward"), coefficients, divergences, strict=True
    ):
        assert paid == pytest.approx(-coefficient * kl)


@pytest.mark.parametrize("lora", [True, False])
def test_what_adapts_survives_a_resume(tmp_path: Path, lora: bool) -> None:
    """The KL coefficient, the scores' moments, and where the warm-up stands."""
    changes = {**ADAPTING, "critic_warmup": 2, "save_strategy": "steps", "save_steps": 1}
    whole = run(tmp_path / "whole", changes, lora=lora)
    for update in (1, 2, 3):
        resumed = trainer(tmp_path / "resumed", lora=lora, changes=changes)
        resumed.train(resume_from_checkpoint=tmp_path / "whole" / f"checkpoint-{update}")

        assert resumed.kl_coef == whole.kl_coef
        assert resumed.score_moments == whole.score_moments
        assert logged(resumed, "objective/kl_coef") == logged(whole, "objective/kl_coef")
        assert ranks.same(whole.model.state_dict(), resumed.model.state_dict())


@pytest.mark.parametrize(("limit", "steps", "stopped"), [(1e-9, 2, 1.0), (1e9, 4, 0.0), (None, 4, None)])
def test_an_update_ends_early_where_the_policy_has_moved_too_far(
    tmp_path: Path, limit: float | None, steps: int, stopped: float | None
) -> None:
    """The first step of an update sees the policy that wrote the responses; the second the first's doing."""
    made = run(tmp_path, {"early_stop_kl": limit})

    assert logged(made, "optimizer_steps") == [steps] * 3
    assert logged(made, "policy/stopped_early") == ([] if stopped is None else [stopped] * 3)


def test_a_last_step_beyond_the_limit_leaves_nothing_out(tmp_path: Path) -> None:
    made = run(tmp_path, {"early_stop_kl": 1e-9, "num_ppo_epochs": 2, "num_mini_batches": 1})

    assert logged(made, "optimizer_steps") == [2.0] * 3
    assert logged(made, "policy/stopped_early") == [0.0] * 3


# Scores ------------------------------------------------------------------------------------------------


def test_scores_are_normalised_by_all_scores_so_far(tmp_path: Path, recorder: Recorder) -> None:
    made = run(tmp_path, {"normalize_scores": True, "kl_coef": 0.0})
    seen: list[float] = []
    for rollout, moments, experience in zip(
        recorder.rollouts, recorder.moments, recorder.experiences, strict=True
    ):
        scores = likes_seven(
            RewardBatch(rollout.prompts, rollout.responses, rollout.response_ids, rollout.columns)
        )
        seen += scores
        so_far = torch.tensor(seen, dtype=torch.float64)
        assert moments is not None
        assert moments.count == len(seen)
        assert moments.std == pytest.approx(float(so_far.std()))
        expected = (torch.tensor(scores, dtype=torch.float64) - so_far.mean()) / so_far.std()
        torch.testing.assert_close(experience.rewards_BR.sum(-1).double(), expected, rtol=1e-4, atol=1e-5)
    # What is told is what the reward gave.
    assert logged(made, "objective/scores") == pytest.approx(logged(made, "reward/likes_seven"))


def test_each_of_several_rewards_is_told_without_its_weight(tmp_path: Path) -> None:
    def length(batch: RewardBatch) -> list[float]:
        return [float(len(ids)) for ids in batch.response_ids]

    rewards = [NamedReward("seven", likes_seven, 3.0), NamedReward("length", length, -0.5)]
    made = run(tmp_path, {"score_scale": 10.0, "score_clip": 1.0}, reward_model=rewards)

    for entry in made.state.log_history[:3]:
        assert entry["reward/length"] == pytest.approx(entry["response/length"])
        total = 3 * entry["reward/seven"] - 0.5 * entry["reward/length"]
        assert entry["objective/scores"] == pytest.approx(total)
        assert entry["objective/rlhf_reward"] - entry["objective/non_score_reward"] == pytest.approx(
            -1.0, abs=0.3
        )  # nearly all totals are below -1/10


# Losses ------------------------------------------------------------------------------------------------


def policy_loss_of(directory: Path, changes: dict[str, Any], ratio: float, advantage: float) -> float:
    """The mean policy loss of a batch whose tokens are all so much likelier now, and so good."""
    recorder = Recorder()
    made = trainer(directory, changes={**ONE_STEP, "learning_rate": 1e-9, **changes})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "experience_of", recorder)
        made.train()
    (seen,) = recorder.experiences
    shifted = replace(
        seen,
        logprobs_BR=seen.logprobs_BR - torch.tensor(ratio).log(),
        advantages_BR=torch.full_like(seen.advantages_BR, advantage),
    )
    rows = range(len(seen))
    _, sums = made.learner._losses(shifted, rows, 0.0, False)
    return float(sums[0]) / float(seen.weights_BR.sum())


@pytest.mark.parametrize(
    ("changes", "ratio", "advantage", "expected"),
    [
        ({}, 5.0, 1.0, -1.2),
        ({"cliprange": 0.1}, 5.0, 1.0, -1.1),
        ({"cliprange": 0.1}, 0.5, -1.0, 0.9),
        ({"cliprange_high": 0.5}, 5.0, 1.0, -1.5),
        ({"cliprange_high": 0.5}, 0.5, -1.0, 0.8),
        ({}, 5.0, -1.0, 5.0),
        ({"dual_clip": 3.0}, 5.0, -1.0, 3.0),
        ({"dual_clip": 3.0}, 5.0, 1.0, -1.2),
    ],
)
def test_clips_reach_the_loss(
    tmp_path: Path, changes: dict[str, Any], ratio: float, advantage: float, expected: float
) -> None:
    assert policy_loss_of(tmp_path, changes, ratio, advantage) == pytest.approx(expected, abs=1e-4)


def test_an_entropy_bonus_raises_entropy(tmp_path: Path) -> None:
    def indifferent(batch: RewardBatch) -> list[float]:
        return [0.0] * len(batch)

    changes = {"kl_coef": 0.0, "total_episodes": 16 * 6, "stop_token_id": None}
    plain = run(tmp_path / "a", changes, reward_model=indifferent)
    mixed = run(tmp_path / "b", {**changes, "entropy_coef": 0.1}, reward_model=indifferent)

    entropies = logged(mixed, "policy/entropy_avg")
    assert entropies[-1] > entropies[0] + 0.1
    assert abs(logged(plain, "policy/entropy_avg")[-1] - entropies[0]) < 0.05


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_the_gradient_is_that_of_the_mean_it_says(
    tmp_path: Path, recorder: Recorder, aggregation: str, rows: int
) -> None:
    """Against plain autograd, row by row and without padding; whatever the cut into micro-batches."""
    cut = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": -(-16 // rows)}
    made = trainer(
        tmp_path, changes={**ONE_STEP, "total_episodes": 18, "loss_aggregation": aggregation, **cut}
    )
    before = copy.deepcopy(made.model)
    made.train()
    seen, losses = recorder.experiences[0], []
    for row, (prompt, response) in enumerate(zip(seen.prompt_ids, seen.response_ids, strict=True)):
        own = slice(0, len(response))
        logits = before.policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1)[range(len(response)), response]
        # The ratio is 1 and no clip is reached; values are 0, so their loss is (0 - R)^2 / 2.
        ratio = (logprobs - logprobs.detach()).exp()
        hidden = before.policy(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states[-1]
        assert before.value_head is not None
        assert seen.returns_BR is not None
        values = before.value_head(hidden[0, len(prompt) - 1 : -1])
        value_loss = (values - seen.returns_BR[row, own]).square() / 2
        losses.append(-seen.advantages_BR[row, own] * ratio + 0.1 * value_loss)
    means = torch.stack([loss.mean() for loss in losses])
    loss = torch.cat(losses).mean() if aggregation == "token_mean" else means.mean()
    gradients = torch.autograd.grad(loss, [p for p in before.parameters() if p.requires_grad])
    norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())

    assert logged(made, "policy/grad_norm")[0] == pytest.approx(norm, rel=1e-4)


# The critic --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, False])
def test_the_critic_learns_first_and_alone(tmp_path: Path, lora: bool) -> None:
    seen = ranks.warmup(tmp_path, lora=lora)

    assert seen["policy moved"] == [False, False, False, True]
    assert seen["critic moved"] == [True] * 4
    # A fresh AdamW's first step is as long as the learning rate, in every direction.
    assert seen["first step"] == pytest.approx(1.0, abs=1e-3)
    assert seen["lr"] == [0.0, 0.0, 0.0, 3e-3]
    assert seen["lr/critic"] == [3e-3] * 4


def test_an_overflowing_divergence_does_not_spoil_the_critics_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"critic_warmup": 1, "kl_placement": "loss", "kl_estimator": "k3", "total_episodes": 32}
    made = trainer(tmp_path, changes={**changes, "num_ppo_epochs": 1, "num_mini_batches": 1})
    monkeypatch.setattr(made, "_reference_logprobs", lambda rollout: torch.full((16, 8), 200.0))
    made.train()

    assert logged(made, "optimizer_steps_skipped") == [0.0, 1.0]


@pytest.mark.parametrize("lora", [True, False])
def test_the_critic_has_a_learning_rate_of_its_own(tmp_path: Path, lora: bool) -> None:
    """AdamW's first step is as long as its rate."""
    changes = {**ONE_STEP, "critic_learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    made = trainer(tmp_path, lora=lora, changes=changes)
    before = ranks.weights(made)
    made.train()
    steps = {name: float((weight - before[name]).abs().max()) for name, weight in ranks.weights(made).items()}

    for is_critic, rate in ((True, 1e-2), (False, 3e-3)):
        longest = max(step for name, step in steps.items() if ranks.is_critic(name) == is_critic)
        assert longest == pytest.approx(rate, rel=1e-3)
    assert logged(made, "lr") == [3e-3]
    assert logged(made, "lr/critic") == [1e-2]


def test_one_rate_for_both_is_told_once(tmp_path: Path) -> None:
    assert logged(run(tmp_path, ONE_STEP), "lr/critic") == []


# Without a critic --------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", WITHOUT_CRITIC)
@pytest.mark.parametrize("lora", [True, False])
def test_without_a_critic_none_is_made_or_told(tmp_path: Path, estimator: str, lora: bool) -> None:
    made = run(tmp_path, {**WITHOUT_CRITIC[estimator], **ONE_STEP}, lora=lora, value_model=None)

    assert made.model.value_head is None
    assert made.model.value_model is None
    assert not any("value_" in name or "score" in name for name, _ in made.model.named_parameters())
    told = {name for entry in made.state.log_history for name in entry}
    assert "loss/policy_avg" in told
    assert not told & {"loss/value_avg", "val/clipfrac_avg", "lr/critic"}


@pytest.mark.parametrize("estimator", WITHOUT_CRITIC)
def test_without_a_critic_it_learns(tmp_path: Path, estimator: str) -> None:
    """Over three seeds: more than the spread of the first batches' means."""
    gains, firsts = [], []
    for seed in (1, 2, 3):
        changes = {**LONG, **WITHOUT_CRITIC[estimator], "seed": seed}
        scores = logged(run(tmp_path / str(seed), changes), "objective/scores")
        firsts.append(scores[0])
        gains.append(sum(scores[-3:]) / 3 - scores[0])
    noise = max(firsts) - min(firsts)
    assert min(gains) > max(0.15, 2 * noise), (gains, firsts)


@pytest.mark.parametrize("estimator", ["gae", "rloo"])
def test_a_group_shares_its_prompt_and_draws_different_responses(
    tmp_path: Path, recorder: Recorder, estimator: str
) -> None:
    made = run(
        tmp_path,
        {"advantage_estimator": estimator, **GROUPS, "total_episodes": None, "num_train_epochs": 1},
        train_dataset=PROMPTS[:12],
    )

    groups = [
        [rollout.prompts[row] for row in range(start, start + 4)]
        for rollout in recorder.rollouts
        for start in range(0, 16, 4)
    ]
    assert all(len(set(group)) == 1 for group in groups)
    assert sorted(group[0] for group in groups) == sorted(row["prompt"] for row in PROMPTS[:12])
    for rollout in recorder.rollouts:
        for start in range(0, 16, 4):
            assert len({tuple(ids) for ids in rollout.response_ids[start : start + 4]}) > 1
    assert made.state.epoch == 1.0
    assert logged(made, "episode")[-1] == 48


def test_evaluation_asks_each_prompt_once_and_scores_it_as_it_is(tmp_path: Path) -> None:
    seen: list[int] = []

    def counting(batch: RewardBatch) -> list[float]:
        seen.append(len(batch))
        return likes_seven(batch)

    shaping = {"normalize_scores": True, "score_scale": 7.0, "score_clip": 0.01}
    made = trainer(tmp_path, changes={**WITHOUT_CRITIC["rloo"], **shaping}, reward_model=counting)
    before = made.score_moments
    metrics = made.evaluate(PROMPTS[:6])

    assert seen == [6, 6]  # sampled, and the most likely
    assert metrics["eval/scores"] == metrics["eval/reward/counting"] > 0.01
    assert made.score_moments == before


# Tokens the policy did not write -----------------------------------------------------------------------


class WithTool(PPOTrainer):
    """After the second token of each response, a tool answers with two of its own."""

    answer: Sequence[int] = (GOOD, GOOD)
    spare: int | None = None  # of whose rows everything is somebody else's

    def _sample(self, *arguments: Any, **named: Any) -> Rollout:
        rollout = super()._sample(*arguments, **named)
        ids = [[*row[:2], *self.answer, *row[2:]] for row in rollout.response_ids]
        written = [
            [t < min(2, len(row)) or t >= min(2, len(row)) + 2 for t in range(len(row) + 2)]
            for row in rollout.response_ids
        ]
        if self.spare is not None:
            written = [[flag and row >= self.spare for flag in flags] for row, flags in enumerate(written)]
        return replace(rollout, response_ids=ids, written=written, logprobs=None, values=None)


def with_tool(directory: Path, changes: dict[str, Any], **attributes: Any) -> PPOTrainer:
    plain = trainer(directory)
    kind = type("Tool", (WithTool,), attributes)
    made: PPOTrainer = kind(
        args=config(directory, **changes),
        processing_class=plain.processing_class,
        model=plain.model.policy,
        ref_model=None,
        reward_model=dense,
        train_dataset=PROMPTS,
    )
    return made


def dense(batch: RewardBatch) -> list[list[float]]:
    return [[float(token == GOOD) for token in ids] for ids in batch.response_ids]


def test_what_a_tool_says_is_neither_rewarded_nor_learned(tmp_path: Path, recorder: Recorder) -> None:
    made = with_tool(tmp_path, {**ONE_STEP, "gamma": 0.5, "kl_coef": 0.1})
    made.train()
    (rollout,), (seen,) = recorder.rollouts, recorder.experiences
    assert seen.returns_BR is not None
    told = made.state.log_history[0]

    own = 0
    for row, (ids, flags) in enumerate(zip(rollout.response_ids, rollout.written or [], strict=True)):
        tool = [t for t, is_own in enumerate(flags) if not is_own]
        assert [ids[t] for t in tool] == [GOOD, GOOD]
        for values_BR in (seen.rewards_BR, seen.advantages_BR, seen.returns_BR, seen.weights_BR):
            assert not values_BR[row, tool].any()
        # The discounts of the tokens it wrote, as if nothing stood between them.
        kept = seen.rewards_BR[row, [t for t, is_own in enumerate(flags) if is_own]]
        own += sum(ids[t] == GOOD for t, is_own in enumerate(flags) if is_own)
        assert float(kept.sum()) == pytest.approx(
            sum(ids[t] == GOOD for t, is_own in enumerate(flags) if is_own), abs=0.05
        )
    assert told["objective/scores"] == pytest.approx(own / 16)
    assert told["response/length"] == sum(map(len, rollout.response_ids)) / 16


def test_the_gradient_of_a_tools_tokens_is_nothing(tmp_path: Path, recorder: Recorder) -> None:
    """Whatever stands at them in the experience changes no sum of the loss."""
    made = with_tool(tmp_path, {**ONE_STEP, "entropy_coef": 0.1, "learning_rate": 1e-9})
    made.train()
    (seen,) = recorder.experiences
    outside = ~seen.mask_BR
    wild = replace(
        seen,
        **{
            name: torch.where(outside, float("nan"), getattr(seen, name))
            for name in ("logprobs_BR", "ref_logprobs_BR", "advantages_BR", "values_BR", "returns_BR")
        },
    )
    losses = [made.learner._losses(one, range(16), 0.1, False) for one in (seen, wild)]
    gradients = [
        torch.autograd.grad(loss, [p for p in made.model.parameters() if p.requires_grad], allow_unused=True)
        for loss, _ in losses
    ]

    assert torch.equal(losses[0][1], losses[1][1])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # it counts updates
@pytest.mark.parametrize(("spare", "steps"), [(15, 1.0), (16, 0.0)])
def test_a_mini_batch_in_which_the_policy_wrote_nothing_takes_no_step(
    tmp_path: Path, spare: int, steps: float
) -> None:
    changes = {"num_ppo_epochs": 1, "num_mini_batches": 2, "total_episodes": 16}
    made = with_tool(tmp_path, changes, spare=spare)
    made.train()

    assert logged(made, "optimizer_steps") == [steps]
    assert logged(made, "optimizer_steps_skipped") == [0.0]
    if steps:
        assert logged(made, "val/ratio") == [pytest.approx(1.0, abs=1e-5)]
