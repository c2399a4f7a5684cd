"""KL rewards, GAE, whitening: numbers worked by hand, and what must not change them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ppo_engine.advantages import KLEstimator, gae, kl, missing_stop, moments, token_rewards, whiten

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
