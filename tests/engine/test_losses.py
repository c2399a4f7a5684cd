"""PPO's losses: numbers worked by hand, where gradients flow, and what must not change them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ppo_engine.losses import entropy, policy_loss, value_loss


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


def test_entropy() -> None:
    logprobs = torch.tensor([[0.25] * 4, [0.5, 0.5, 0, 0], [1, 0, 0, 0]], dtype=torch.float64).log()
    torch.testing.assert_close(entropy(logprobs), tensor(math.log(4), math.log(2), 0))
