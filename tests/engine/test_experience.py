"""From scores to experience: in which order things happen, and what must not change the outcome."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ppo_engine.advantages import RunningMoments
from ppo_engine.batch import Experience, Rollout, response_mask
from ppo_engine.experience import TokenScores, experience_of
from ppo_engine.hyperparameters import Hyperparameters
from ppo_engine.rewards import Scores

GROUP = 2
ESTIMATORS = {
    "gae": {"lam": 0.8, "gamma": 0.9},
    "rloo": {"num_return_sequences": GROUP},
    "grpo": {"num_return_sequences": GROUP},
    "reinforce++": {"gamma": 0.9},
}


def rollout_of(lengths: list[int], written: list[list[bool]] | None = None) -> Rollout:
    """Rows that end at these lengths; every other one has reached its stop token."""
    rows = len(lengths)
    return Rollout(
        rows=list(range(rows)),
        prompts=["p"] * rows,
        prompt_ids=[[1]] * rows,
        responses=["r"] * rows,
        response_ids=[[2] * length for length in lengths],
        finished=[row % 2 == 0 for row in range(rows)],
        columns=[{}] * rows,
        written=written,
    )


def seen(lengths: list[int], seed: int, width: int, *, critic: bool) -> TokenScores:
    """What models say of each token: zero beyond a row's length, as scoring leaves it."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(3, len(lengths), max(lengths), generator=generator)
    numbers = torch.nn.functional.pad(numbers, (0, width - max(lengths)))
    within = response_mask(lengths, width)
    logprobs, ref_logprobs, values = torch.where(within, numbers, 0.0).unbind()
    return TokenScores(logprobs, ref_logprobs, values if critic else None)


def made(
    estimator: str,
    lengths: list[int],
    tokens: TokenScores,
    scores: Scores,
    *,
    rollout: Rollout | None = None,
    moments: RunningMoments | None = None,
    **changes: Any,
) -> Experience:
    ppo = Hyperparameters(advantage_estimator=estimator, **{**ESTIMATORS[estimator], **changes})  # type: ignore[arg-type]
    return experience_of(rollout or rollout_of(lengths), scores, tokens, ppo, 0.1, moments)[0]


def scores_of(rows: int, seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed + 1)
    return Scores(torch.randn(rows, generator=generator).tolist(), None, {})


Lengths = st.lists(st.integers(1, 6), min_size=2, max_size=4).map(lambda few: few * GROUP)
Seeds = st.integers(0, 2**31)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(lengths=Lengths, seed=Seeds, more=st.integers(1, 4))
def test_padding_changes_nothing(estimator: str, lengths: list[int], seed: int, more: int) -> None:
    critic, scores, width = estimator == "gae", scores_of(len(lengths), seed), max(lengths)
    narrow = made(estimator, lengths, seen(lengths, seed, width, critic=critic), scores)
    wide = made(estimator, lengths, seen(lengths, seed, width + more, critic=critic), scores)
    for name in ("advantages_BR", "rewards_BR", "weights_BR"):
        assert torch.equal(getattr(wide, name)[:, :width], getattr(narrow, name)), name
        assert not getattr(wide, name)[:, width:].any(), name


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(lengths=Lengths, seed=Seeds, random=st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(
    estimator: str, lengths: list[int], seed: int, random: Any
) -> None:
    """Whole groups change places, and rows within them."""
    groups = torch.arange(len(lengths)).view(-1, GROUP).tolist()
    random.shuffle(groups)
    order = [row for group in groups for row in random.sample(group, GROUP)]
    critic, scores = estimator == "gae", scores_of(len(lengths), seed)
    tokens, rollout = seen(lengths, seed, max(lengths), critic=critic), rollout_of(lengths)
    straight = made(estimator, lengths, tokens, scores)

    def moved(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[order]

    shuffled = made(
        estimator,
        lengths,
        TokenScores(tokens.logprobs_BR[order], tokens.ref_logprobs_BR[order], moved(tokens.values_BR)),
        Scores([scores.scores[row] for row in order], None, {}),
        rollout=replace(
            rollout,
            response_ids=[rollout.response_ids[row] for row in order],
            finished=[rollout.finished[row] for row in order],
        ),
    )
    torch.testing.assert_close(shuffled.advantages_BR, straight.advantages_BR[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(seed=Seeds)
def test_tokens_of_somebody_elses_change_nothing(estimator: str, seed: int) -> None:
    """Tokens put in between get nothing, and what stands around them is as it was without them."""
    critic, scores = estimator == "gae", scores_of(4, seed)
    lengths, places = [3, 2, 3, 1], [[0, 2, 3], [0, 1], [1, 2, 4], [1]]
    longer = [5, 3, 5, 2]
    tokens = seen(lengths, seed, 3, critic=critic)

    def spread(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        spread_BR = torch.where(response_mask(longer, 5), 7.0, 0.0)
        for row, own in enumerate(places):
            spread_BR[row, own] = values[row, : len(own)]
        return spread_BR

    whole = made(estimator, lengths, tokens, scores)
    spread_tokens = TokenScores(
        *(spread(part) for part in (tokens.logprobs_BR, tokens.ref_logprobs_BR, tokens.values_BR))  # type: ignore[arg-type]
    )
    written = [[t in own for t in range(length)] for own, length in zip(places, longer, strict=True)]
    mixed = made(estimator, longer, spread_tokens, scores, rollout=rollout_of(longer, written))

    for row, own in enumerate(places):
        for name in ("advantages_BR", "rewards_BR", "weights_BR"):
            kept = getattr(mixed, name)[row]
            torch.testing.assert_close(kept[own], getattr(whole, name)[row, : len(own)], msg=name)
            others = [t for t in range(5) if t not in own]
            assert not kept[others].any(), name


def test_scores_are_shaped_and_then_the_penalty_comes_off() -> None:
    """Else a clip would swallow it, and the running deviation would grow by it."""
    tokens = TokenScores(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 1))
    found = made(
        "gae",
        [1, 1],
        tokens,
        Scores([40.0, 40.0], None, {}),
        moments=RunningMoments(2, 10.0, 100.0),  # the deviation is 10
        normalize_scores=True,
        score_scale=2.0,
        score_clip=5.0,
        missing_eos_penalty=3.0,
    )
    # (40 - 10) / 10 x 2 = 6, clipped to 5; the second row has no stop token.
    assert found.rewards_BR.tolist() == [[5.0], [2.0]]


def test_kl_in_the_loss_is_not_paid_in_rewards() -> None:
    tokens = TokenScores(torch.ones(2, 2), torch.zeros(2, 2), torch.zeros(2, 2))
    scores = Scores([1.0, 2.0], None, {})
    paid = made("gae", [2, 2], tokens, scores, kl_estimator="k2")
    free = made("gae", [2, 2], tokens, scores, kl_estimator="k2", kl_placement="loss")

    torch.testing.assert_close(paid.rewards_BR, torch.tensor([[-0.05, 0.95], [-0.05, 1.95]]))
    assert free.rewards_BR.tolist() == [[0.0, 1.0], [0.0, 2.0]]


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce++"])
def test_without_a_critic_there_is_nothing_of_it(estimator: str) -> None:
    found = made(estimator, [2, 1], seen([2, 1], 0, 2, critic=False), scores_of(2, 0))
    assert found.values_BR is None
    assert found.returns_BR is None


def test_rloo_and_grpo_give_every_token_of_a_row_its_advantage() -> None:
    tokens = TokenScores(torch.zeros(4, 2), torch.zeros(4, 2), None)
    scores = Scores([1.0, 3.0, 5.0, 5.0], None, {})
    rloo = made("rloo", [2, 1, 2, 2], tokens, scores)
    grpo = made("grpo", [2, 1, 2, 2], tokens, scores)

    assert rloo.advantages_BR.tolist() == [[-2, -2], [2, 0], [0, 0], [0, 0]]
    half = 0.5**0.5
    expected = torch.tensor([[-half, -half], [half, 0], [0, 0], [0, 0]])
    torch.testing.assert_close(grpo.advantages_BR, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "given", "expected"),
    [
        ("gae", None, True),
        ("reinforce++", None, True),
        ("rloo", None, False),
        ("grpo", None, False),
        ("gae", False, False),
        ("reinforce++", False, False),
        ("rloo", True, True),
        ("grpo", True, True),
    ],
)
def test_advantages_are_whitened_as_asked(estimator: str, given: bool | None, expected: bool) -> None:
    lengths = [3, 2, 4, 1]
    tokens = seen(lengths, 1, 4, critic=estimator == "gae")
    found = made(estimator, lengths, tokens, scores_of(4, 1), whiten_advantages=given)
    kept = found.advantages_BR[found.mask_BR]
    is_white = abs(float(kept.mean())) < 1e-5 and abs(float(kept.std()) - 1) < 1e-4
    assert is_white == expected
