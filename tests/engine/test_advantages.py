"""KL, rewards, advantages, whitening: numbers worked by hand, and what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ppo_engine.advantages import (
    KLEstimator,
    RunningMoments,
    adapted_kl_coef,
    discounted_returns,
    gae,
    grpo,
    kl,
    kl_rewards,
    missing_stop,
    moments,
    rloo,
    shaped_scores,
    token_rewards,
    whiten,
)

NAN = float("nan")


def tensor(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def mask(*values: int) -> Tensor:
    return torch.tensor([values], dtype=torch.bool)


# KL ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # The policy gives a token 1/2, the reference 1/4: r = 1/2, log r = -0.693147.
        ("k1", 0.693147),
        ("k2", 0.240227),  # 0.693147^2 / 2
        ("k3", 0.193147),  # 1/2 - 1 + 0.693147
        ("abs", 0.693147),
    ],
)
def test_kl_of_one_token(estimator: KLEstimator, expected: float) -> None:
    estimate = kl(tensor(1 / 2).log(), tensor(1 / 4).log(), estimator)
    torch.testing.assert_close(estimate, tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "expected"), [("k1", -0.693147), ("k2", 0.240227), ("k3", 0.306853), ("abs", 0.693147)]
)
def test_kl_of_a_token_the_reference_likes_more(estimator: KLEstimator, expected: float) -> None:
    estimate = kl(tensor(1 / 4).log(), tensor(1 / 2).log(), estimator)
    torch.testing.assert_close(estimate, tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators_average_to_the_divergence(estimator: KLEstimator) -> None:
    policy, reference = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.2, 0.6)
    exact = (policy * (policy / reference).log()).sum()
    torch.testing.assert_close((policy * kl(policy.log(), reference.log(), estimator)).sum(), exact)


def test_k3_keeps_the_digits_of_small_differences() -> None:
    # k3 is about (log r)^2 / 2 here; exp(x) - 1 - x in fp32 would leave noise of 1e-7.
    estimate = kl(torch.tensor([-2.0]), torch.tensor([-2.0 + 2**-12]), "k3")
    torch.testing.assert_close(estimate, torch.tensor([2.0**-25]), rtol=1e-2, atol=0)


def test_kl_of_half_precision_is_worked_out_in_fp32() -> None:
    half = torch.tensor([-1.0, -2.0], dtype=torch.bfloat16)
    assert kl(half, half, "k3").dtype == torch.float32


def gradient_in_expectation(estimator: KLEstimator, logits: Tensor, reference: Tensor) -> Tensor:
    """Of the estimate as a loss, over all tokens of a vocabulary by the policy's own probabilities."""
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    (gradient,) = torch.autograd.grad(
        (logprobs.exp().detach() * kl(logprobs, reference.log_softmax(-1), estimator)).sum(), logits
    )
    return gradient


def analytic_gradient(divergence: str, logits: Tensor, reference: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    policy, reference = logits.softmax(-1), reference.softmax(-1)
    exact = {
        "KL(policy || reference)": (policy * (policy / reference).log()).sum(),
        "KL(reference || policy)": (reference * (reference / policy).log()).sum(),
        "L1": (policy - reference).abs().sum(),
        "nothing": 0.0 * policy.sum(),
    }[divergence]
    (gradient,) = torch.autograd.grad(exact, logits)
    return gradient


@pytest.mark.parametrize(
    ("estimator", "divergence"),
    [
        ("k1", "nothing"),  # which is why it is refused there
        ("k2", "KL(policy || reference)"),
        ("k3", "KL(reference || policy)"),
        ("abs", "L1"),
    ],
)
@given(seed=st.integers(0, 2**31), vocabulary=st.integers(2, 9))
def test_what_an_estimator_differentiates_in_the_loss(
    estimator: KLEstimator, divergence: str, seed: int, vocabulary: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, reference = torch.randn(2, vocabulary, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        gradient_in_expectation(estimator, logits, reference),
        analytic_gradient(divergence, logits, reference),
        rtol=1e-9,
        atol=1e-12,
    )


# Adaptive KL ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * 1.01),  # a tenth above it, over a tenth of the horizon
        (5.4, 0.1 * 0.99),
        (60.0, 0.1 * 1.02),  # the error counts as a fifth at most
        (-60.0, 0.1 * 0.98),  # k1 may be negative
        (math.inf, 0.1 * 1.02),
        (math.nan, 0.1),  # not known: as it is
    ],
)
def test_the_kl_coefficient_is_steered(kl: float, expected: float) -> None:
    assert adapted_kl_coef(0.1, kl, target=6.0, horizon=10_000, episodes=1000) == pytest.approx(expected)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e3), st.integers(1, 10_000))
def test_the_kl_coefficient_never_leaves_its_sign(kl: float, target: float, episodes: int) -> None:
    assert 0.8 <= adapted_kl_coef(1.0, kl, target, 10_000, episodes) <= 1.2


# Scores --------------------------------------------------------------------------------------------------


def test_running_moments_by_hand() -> None:
    # 1, 3: mean 2, squares 2. And 8: mean 4, squares 9 + 1 + 16 = 26, over 3 - 1.
    first = RunningMoments().including(tensor(1, 3))
    both = first.including(tensor(8))
    assert (first.count, first.mean, first.squares) == (2, 2, 2)
    assert (both.count, both.mean, both.squares, both.std) == (3, 4, 26, 13**0.5)


@given(
    st.lists(st.lists(st.floats(-1e3, 1e3), max_size=9), min_size=1, max_size=6).filter(any),
    st.floats(-1e4, 1e4),
)
def test_running_moments_are_those_of_all_values_however_they_were_cut(
    parts: list[list[float]], shift: float
) -> None:
    found = RunningMoments()
    for part in parts:
        found = found.including(torch.tensor(part, dtype=torch.float64) + shift)
    whole = np.concatenate(parts) + shift
    assert found.count == len(whole)
    assert found.mean == pytest.approx(whole.mean(), rel=1e-9, abs=1e-9)
    assert found.squares == pytest.approx(((whole - whole.mean()) ** 2).sum(), rel=1e-6, abs=1e-6)
    if len(whole) > 1 and whole.std() > 1e-4 * abs(shift) + 1e-3:
        assert found.std == pytest.approx(whole.std(ddof=1), rel=1e-5)


@pytest.mark.parametrize("values", [[], [5.0], [5.0, 5.0], [0.1] * 7, [0.0, 0.0]])
def test_values_without_spread_have_a_deviation_of_one(values: list[float]) -> None:
    assert RunningMoments().including(torch.tensor(values)).std == 1.0


def test_small_values_have_the_spread_they_have() -> None:
    assert RunningMoments().including(tensor(1e-7, 3e-7)).std == pytest.approx(2**0.5 * 1e-7)


def test_scores_are_normalised_then_scaled_then_clipped() -> None:
    # Mean 4 and deviation 2, of earlier scores; scale 3: (x - 4) / 2 x 3, within 5.
    scores, dense = shaped_scores(
        tensor(2, 5, 100), tensor([2, 1], [-6, 0], [0, 0]), RunningMoments(2, 4.0, 4.0), scale=3.0, clip=5.0
    )
    torch.testing.assert_close(scores, tensor(-3, 1.5, 5))
    torch.testing.assert_close(dense, tensor([3, 1.5], [-5, 0], [0, 0]))


def test_scores_that_nothing_shapes_stay() -> None:
    scores, dense = shaped_scores(tensor(2, 5), None, None, scale=1.0, clip=None)
    torch.testing.assert_close(scores, tensor(2, 5))
    assert dense is None


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20), st.floats(0.1, 10), st.floats(-50, 50))
def test_normalised_scores_do_not_depend_on_their_unit(values: list[float], unit: float, zero: float) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    if scores.std() < 0.1:
        return
    one, _ = shaped_scores(scores, None, RunningMoments().including(scores), 1.0, None)
    moved = unit * scores + zero
    other, _ = shaped_scores(moved, None, RunningMoments().including(moved), 1.0, None)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert float(one.mean()) == pytest.approx(0, abs=1e-6)
    assert float(one.std()) == pytest.approx(1, abs=1e-6)


# Rewards -------------------------------------------------------------------------------------------------


def test_score_comes_at_the_last_token_of_each_row() -> None:
    rewards = token_rewards(
        scores_B=tensor(10, 20),
        kl_BR=tensor([1, 2, 3], [4, 5, NAN]),
        mask_BR=torch.tensor([[True, True, True], [True, True, False]]),
        kl_coef=0.1,
    )
    torch.testing.assert_close(rewards, tensor([-0.1, -0.2, 9.7], [-0.4, 19.5, 0]))


def test_score_comes_at_the_last_token_that_the_policy_wrote() -> None:
    rewards = token_rewards(tensor(10), row(1, 1, 1, 1), mask(1, 0, 1, 0), kl_coef=0.5)
    torch.testing.assert_close(rewards, row(-0.5, 0, 9.5, 0))


def test_dense_scores_are_added_where_they_stand() -> None:
    rewards = token_rewards(tensor(10), row(0, 0, 0), mask(1, 1, 0), 0.1, dense_scores_BR=row(1, 2, 3))
    torch.testing.assert_close(rewards, row(1, 12, 0))


def test_a_row_that_the_policy_did_not_write_gets_no_reward() -> None:
    assert not token_rewards(tensor(10), row(1, NAN), mask(0, 0), 0.1).any()


def test_kl_costs_nothing_where_its_weight_is_zero() -> None:
    torch.testing.assert_close(kl_rewards(row(2, math.inf), 0.0), row(0, 0))
    torch.testing.assert_close(kl_rewards(row(2, -4), 0.5), row(-1, 2))


def test_missing_stop_takes_the_penalty_off() -> None:
    finished = torch.tensor([True, False])
    torch.testing.assert_close(missing_stop(tensor(3, 3), finished, 1.5), tensor(3, 1.5))
    torch.testing.assert_close(missing_stop(tensor(3, 3), finished, None), tensor(3, 3))


# GAE -----------------------------------------------------------------------------------------------------


def test_gae_by_hand() -> None:
    # gamma 1/2, lambda 1/2, so gamma lambda = 1/4:
    # delta_2 = 3 + 0       - 4 = -1;    A_2 = -1
    # delta_1 = 2 + 1/2 * 4 - 8 = -4;    A_1 = -4 - 1/4       = -4.25
    # delta_0 = 1 + 1/2 * 8 - 2 =  3;    A_0 =  3 - 4.25 / 4  =  1.9375
    advantages, returns = gae(row(1, 2, 3), row(2, 8, 4), mask(1, 1, 1), gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantages, row(1.9375, -4.25, -1))
    torch.testing.assert_close(returns, row(3.9375, 3.75, 3))


def test_gae_skips_tokens_the_policy_did_not_write() -> None:
    # The tokens of the test above, with two of somebody else's in between.
    advantages, returns = gae(
        row(1, 7, 2, NAN, 3), row(2, NAN, 8, 9, 4), mask(1, 0, 1, 0, 1), gamma=0.5, lam=0.5
    )
    torch.testing.assert_close(advantages, row(1.9375, 0, -4.25, 0, -1))
    torch.testing.assert_close(returns, row(3.9375, 0, 3.75, 0, 3))


def test_returns_without_discount_are_what_is_still_to_come() -> None:
    _, returns = gae(row(1, 2, 3), row(5, 6, 7), mask(1, 1, 1), gamma=1, lam=1)
    torch.testing.assert_close(returns, row(6, 5, 3))


def test_returns_with_lambda_zero_look_one_step_ahead() -> None:
    _, returns = gae(row(1, 2, 3), row(5, 6, 7), mask(1, 1, 1), gamma=0.5, lam=0)
    torch.testing.assert_close(returns, row(1 + 3, 2 + 3.5, 3))


# Without a critic ----------------------------------------------------------------------------------------


def test_rloo_by_hand() -> None:
    # 1, 2, 6: less (2 + 6) / 2, (1 + 6) / 2, (1 + 2) / 2; the other group's rewards are equal.
    torch.testing.assert_close(rloo(tensor(1, 2, 6, 5, 5, 5), 3), tensor(-3, -1.5, 4.5, 0, 0, 0))


def test_grpo_by_hand() -> None:
    # 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14 over 3 - 1, so the deviation is the root of 7.
    found = grpo(tensor(1, 2, 6, 5, 5, 5), 3)
    torch.testing.assert_close(found, tensor(-2, -1, 3, 0, 0, 0) / math.sqrt(7), rtol=1e-6, atol=1e-9)


def test_a_group_whose_rewards_differ_by_rounding_learns_next_to_nothing() -> None:
    assert float(grpo(tensor(0.3, 0.3 + 1e-9), 2).abs().max()) < 1e-3


def test_discounted_returns_by_hand() -> None:
    # 3; 2 + 3 / 2; 1 + 3.5 / 2
    torch.testing.assert_close(discounted_returns(row(1, 2, 3), mask(1, 1, 1), 0.5), row(2.75, 3.5, 3))
    # A token of somebody else's is not discounted through.
    torch.testing.assert_close(
        discounted_returns(row(1, NAN, 2, 3), mask(1, 0, 1, 1), 0.5), row(2.75, 0, 3.5, 3)
    )


@st.composite
def grouped(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Rewards of a few groups, whose spread is no rounding, and the size of each."""
    size, groups = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randn(groups * size, generator=generator, dtype=torch.float64), size


@given(grouped(), st.randoms(use_true_random=False))
def test_groups_are_judged_by_themselves(case: tuple[Tensor, int], random: object) -> None:
    """Their order changes nothing, nor the order of rows within one: each row keeps its advantage."""
    rewards, size = case
    rows = torch.arange(len(rewards)).view(-1, size).tolist()
    random.shuffle(rows)  # type: ignore[attr-defined]
    for group in rows:
        random.shuffle(group)  # type: ignore[attr-defined]
    order = [row for group in rows for row in group]
    for estimator in (rloo, grpo):
        torch.testing.assert_close(estimator(rewards[order], size), estimator(rewards, size)[order])


@given(grouped(), st.floats(0.1, 1e3), st.floats(-1e3, 1e3))
def test_a_group_is_compared_with_itself_alone(case: tuple[Tensor, int], unit: float, zero: float) -> None:
    """A shift changes nothing; grpo knows no unit either; either way a group's advantages cancel."""
    rewards, size = case
    torch.testing.assert_close(rloo(unit * rewards + zero, size), unit * rloo(rewards, size))
    if rewards.view(-1, size).std(-1).min() > 0.1:
        torch.testing.assert_close(
            grpo(unit * rewards + zero, size), grpo(rewards, size), rtol=2e-4, atol=1e-6
        )
    for estimator in (rloo, grpo):
        sums = estimator(rewards, size).view(-1, size).sum(-1)
        torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-9)


@st.composite
def ragged(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values, and lengths of a few rows."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    lengths = draw(st.lists(st.integers(1, width), min_size=rows, max_size=rows))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, width, generator=generator)
    return rewards, values, torch.tensor(lengths)


def advantages_of(rewards: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """The whole chain, whitening included; NaN put where nothing may look."""
    within = torch.arange(rewards.shape[1]) < lengths[:, None]
    rewards, values = (torch.where(within, numbers, NAN) for numbers in (rewards, values))
    kept = moments(rewards, within)
    rewards = whiten(rewards, within, kept.mean, kept.var, shift_mean=False)
    advantages, _ = gae(rewards, values, within, gamma=0.9, lam=0.8)
    kept = moments(advantages, within)
    return whiten(advantages, within, kept.mean, kept.var, shift_mean=True)


@given(ragged(), st.integers(1, 4))
def test_padding_changes_nothing(batch: tuple[Tensor, Tensor, Tensor], more: int) -> None:
    rewards, values, lengths = batch
    wider = [torch.nn.functional.pad(numbers, (0, more), value=7.0) for numbers in (rewards, values)]
    padded = advantages_of(*wider, lengths)
    torch.testing.assert_close(padded[:, :-more], advantages_of(rewards, values, lengths), rtol=0, atol=0)
    assert not padded[:, -more:].any()


@given(ragged(), st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(batch: tuple[Tensor, Tensor, Tensor], random: object) -> None:
    order = list(range(len(batch[0])))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = advantages_of(*(part[order] for part in batch))
    torch.testing.assert_close(shuffled, advantages_of(*batch)[order], rtol=1e-5, atol=1e-6)


# Whitening -----------------------------------------------------------------------------------------------


def test_moments_are_over_masked_tokens_of_all_rows_and_unbiased() -> None:
    found = moments(tensor([1, 2, NAN], [6, NAN, NAN]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool())
    # mean 9/3; squares 4 + 1 + 9 = 14, over 3 - 1.
    assert found == (3, 3.0, 7.0)


def test_variance_survives_a_large_mean() -> None:
    assert moments(tensor(1e9 + 1, 1e9 + 2, 1e9 + 3), torch.ones(3).bool()).var == 1.0


def test_whiten_by_hand() -> None:
    values, all_of_them = tensor(1, 2, 6), torch.ones(3).bool()
    _, mean, var = moments(values, all_of_them)
    scale = 1 / math.sqrt(7)
    torch.testing.assert_close(
        whiten(values, all_of_them, mean, var, shift_mean=True), tensor(-2 * scale, -scale, 3 * scale)
    )
    torch.testing.assert_close(
        whiten(values, all_of_them, mean, var, shift_mean=False),
        tensor(3 - 2 * scale, 3 - scale, 3 + 3 * scale),
    )


@pytest.mark.parametrize(("shift_mean", "expected"), [(True, 0.0), (False, 5.0)])
def test_whitening_one_token_moves_it_at_most(shift_mean: bool, expected: float) -> None:
    values, only = row(5, NAN), mask(1, 0)
    _, mean, var = moments(values, only)
    assert whiten(values, only, mean, var, shift_mean=shift_mean).tolist() == [[expected, 0.0]]


def test_whitening_no_tokens_gives_zeros() -> None:
    values, none = row(NAN, NAN), mask(0, 0)
    assert moments(values, none) == (0, 0.0, 1.0)
    assert whiten(values, none, 0.0, 1.0, shift_mean=True).tolist() == [[0.0, 0.0]]


def test_whitening_equal_tokens_gives_their_mean() -> None:
    values, all_of_them = row(4, 4, 4), mask(1, 1, 1)
    _, mean, var = moments(values, all_of_them)
    assert whiten(values, all_of_them, mean, var, shift_mean=False).tolist() == [[4.0, 4.0, 4.0]]
