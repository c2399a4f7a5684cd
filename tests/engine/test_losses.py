"""PPO's losses: numbers worked by hand, where gradients flow, and what must not change them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ppo_engine.batch import response_mask
from ppo_engine.losses import policy_loss, token_weights, value_loss


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# (probability when written, probability now, advantage), clips 0.2 below and 0.3 above
POLICY_CASES = {
    "unchanged": (0.5, 0.5, 2.0, -2.0, 0.0),
    "up, within": (0.5, 0.6, 2.0, -2.4, 0.0),
    "up, clipped": (0.5, 0.75, 2.0, -2.6, 1.0),  # ratio 1.5 counts as 1.3
    "up, though bad": (0.5, 0.75, -2.0, 3.0, 0.0),  # the larger loss is the plain one: no clip
    "down, within": (0.5, 0.45, -2.0, 1.8, 0.0),
    "down, clipped": (0.5, 0.25, -2.0, 1.6, 1.0),  # ratio 0.5 counts as 0.8
    "down, though good": (0.5, 0.25, 2.0, -1.0, 0.0),
}


@pytest.mark.parametrize("case", POLICY_CASES.values(), ids=POLICY_CASES)
def test_policy_loss_by_hand(case: tuple[float, ...]) -> None:
    old, new, advantage, expected, clipped = case
    logprobs = tensor(new).log().requires_grad_()
    found = policy_loss(logprobs, tensor(old).log(), tensor(advantage), clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(found.loss.detach(), tensor(expected))
    torch.testing.assert_close(found.clipped, tensor(clipped))
    torch.testing.assert_close(found.ratio, tensor(new / old))
    torch.testing.assert_close(found.approxkl, tensor(math.log(new / old) ** 2 / 2))
    (gradient,) = torch.autograd.grad(found.loss.sum(), logprobs)
    # d(-A rho)/d logprob = -A rho, unless the clipped term is a constant.
    torch.testing.assert_close(gradient, tensor(0.0 if clipped else -advantage * new / old))


# (ratio, advantage), clips 0.2 and 0.3, dual clip 3
DUAL_CASES = {
    "good, far up": (5.0, 1.0, -1.3, 1.0),  # as without
    "bad, up": (2.0, -1.0, 2.0, 0.0),  # within the bound
    "bad, far up": (5.0, -1.0, 3.0, 1.0),  # 5 counts as 3
    "bad, far up, twice as bad": (5.0, -2.0, 6.0, 1.0),
    "bad, down": (0.5, -1.0, 0.8, 1.0),  # the lower clip
    "indifferent": (5.0, 0.0, 0.0, 0.0),
}


@pytest.mark.parametrize("case", DUAL_CASES.values(), ids=DUAL_CASES)
def test_dual_clip_by_hand(case: tuple[float, ...]) -> None:
    ratio, advantage, expected, clipped = case
    logprobs = tensor(ratio).log().requires_grad_()
    found = policy_loss(logprobs, tensor(0), tensor(advantage), 0.2, 0.3, dual_clip=3.0)
    torch.testing.assert_close(found.loss.detach(), tensor(expected))
    torch.testing.assert_close(found.clipped, tensor(clipped))
    (gradient,) = torch.autograd.grad(found.loss.sum(), logprobs)
    torch.testing.assert_close(gradient, tensor(0.0 if clipped else -advantage * ratio))


@given(st.floats(-3, 3), st.floats(-5, 5), st.floats(0.05, 0.9), st.floats(0.05, 0.9), st.floats(1.1, 9))
def test_a_dual_clip_bounds_the_loss_of_bad_tokens_alone(
    log_ratio: float, advantage: float, low: float, high: float, dual: float
) -> None:
    asked = (tensor(log_ratio), tensor(0), tensor(advantage), low, high)
    free, bounded = policy_loss(*asked).loss, policy_loss(*asked, dual_clip=dual).loss
    if advantage < 0:
        assert float(bounded) == pytest.approx(min(float(free), -dual * advantage))
    else:
        assert torch.equal(free, bounded)


def test_statistics_carry_no_gradient() -> None:
    logprobs = tensor(-1, -2).requires_grad_()
    policy = policy_loss(logprobs, tensor(-1.5, -1.5), tensor(1, -1), 0.2, 0.2)
    value = value_loss(logprobs, tensor(0, 0), tensor(1, 1), 0.2)
    assert not any(part.requires_grad for part in (*policy[1:], *value[1:]))


# (value now, value when written, return), clip 0.5
VALUE_CASES = {
    "unchanged": (1.0, 1.0, 3.0, 2.0, 0.0, -2.0),
    "nearer, within": (1.4, 1.0, 3.0, 1.28, 0.0, -1.6),
    "nearer, clipped": (2.0, 1.0, 3.0, 1.125, 1.0, 0.0),  # 2 counts as 1.5: 1.5^2 / 2
    "further away": (0.0, 1.0, 3.0, 4.5, 0.0, -3.0),  # 0 counts as 0.5, but 3^2 is larger
    "beyond": (3.0, 1.0, 3.0, 1.125, 1.0, 0.0),
}


@pytest.mark.parametrize("case", VALUE_CASES.values(), ids=VALUE_CASES)
def test_value_loss_by_hand(case: tuple[float, ...]) -> None:
    new, old, target, expected, clipped, slope = case
    values = tensor(new).requires_grad_()
    found = value_loss(values, tensor(old), tensor(target), clip=0.5)
    torch.testing.assert_close(found.loss.detach(), tensor(expected))
    torch.testing.assert_close(found.clipped, tensor(clipped))
    (gradient,) = torch.autograd.grad(found.loss.sum(), values)
    torch.testing.assert_close(gradient, tensor(slope))


@st.composite
def tokens_and_cut(draw: st.DrawFn) -> tuple[Tensor, list[int]]:
    """Five numbers per token, and how the tokens are cut into micro-batches."""
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randn(5, sum(sizes), generator=generator, dtype=torch.float64), sizes


def gradients(numbers: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Of the step's mean loss, summed over micro-batches, by policy and value parameters."""
    weight, bias = tensor(0.7).requires_grad_(), tensor(-0.3).requires_grad_()
    tokens = numbers.shape[1]
    for logprobs, old, advantages, values, returns in (part.unbind() for part in numbers.split(sizes, dim=1)):
        policy = policy_loss(weight * logprobs, old, advantages, 0.2, 0.2).loss
        value = value_loss(values + bias, values, returns, 0.2).loss
        ((policy + 0.1 * value).sum() / tokens).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    return weight.grad, bias.grad


@given(tokens_and_cut())
def test_the_cut_into_micro_batches_changes_no_gradient(case: tuple[Tensor, list[int]]) -> None:
    numbers, sizes = case
    torch.testing.assert_close(gradients(numbers, sizes), gradients(numbers, [numbers.shape[1]]))


@given(tokens_and_cut())
def test_the_order_of_tokens_changes_no_gradient(case: tuple[Tensor, list[int]]) -> None:
    numbers, sizes = case
    torch.testing.assert_close(gradients(numbers.flip(1), sizes), gradients(numbers, sizes))


# Aggregation ---------------------------------------------------------------------------------------------


def test_token_weights_by_hand() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]]).bool()
    assert torch.equal(token_weights(mask, "token_mean"), mask.float())
    expected = [[0.25] * 4, [0, 0.5, 0, 0.5], [0] * 4]
    torch.testing.assert_close(token_weights(mask, "sequence_mean"), torch.tensor(expected))


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any), st.integers(0, 3))
def test_weighted_sums_are_the_means_they_are_called(lengths: list[int], more: int) -> None:
    """Of the tokens, and of the rows' means; padding and rows without tokens change neither."""
    mask = response_mask(lengths, max(lengths) + more)
    losses = torch.randn(mask.shape, generator=torch.Generator().manual_seed(sum(lengths)))
    rows = [losses[row, :length] for row, length in enumerate(lengths) if length]
    means = {
        "token_mean": torch.cat(rows).mean(),
        "sequence_mean": torch.stack([row.mean() for row in rows]).mean(),
    }
    for aggregation, mean in means.items():
        weights = token_weights(mask, aggregation)  # type: ignore[arg-type]
        torch.testing.assert_close((losses * weights).sum() / weights.sum(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("advantage", "dual_clip"), [(1.0, None), (-1.0, 3.0), (-1.0, None), (1.0, 3.0)])
def test_a_ratio_beyond_all_bounds_has_a_gradient_that_is_a_number(
    advantage: float, dual_clip: float | None
) -> None:
    logprobs = torch.tensor([100.0, -100.0], requires_grad=True)
    told = policy_loss(logprobs, torch.zeros(2), torch.full((2,), advantage), 0.2, 0.2, dual_clip)
    told.loss.sum().backward()

    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
    assert told.loss.isfinite().all()
    assert told.approxkl.tolist() == [5000.0, 5000.0]
