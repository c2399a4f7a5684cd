"""The masked statistics under TRL's names: masks of numbers, exact values, and what lies outside."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ppo_engine
from ppo_engine import trainer as where_trl_has_them
from ppo_engine.advantages import masked_mean, masked_var, masked_whiten, moments, whiten

VALUES = torch.tensor([9.0, 2.0, 3.0, -7.0])
MIDDLE = torch.tensor([0.0, 1.0, 1.0, 0.0])


def test_they_are_found_where_scripts_look() -> None:
    for name in ("masked_mean", "masked_var", "masked_whiten"):
        assert getattr(ppo_engine, name) is getattr(where_trl_has_them, name)


def test_mean_and_variance_are_exactly_those_of_what_is_within() -> None:
    within = VALUES[1:3]

    assert masked_mean(VALUES, MIDDLE) == torch.mean(within)
    assert masked_var(VALUES, MIDDLE) == torch.var(within)
    assert masked_var(VALUES, MIDDLE, unbiased=False) == torch.var(within, correction=0)


def test_a_mean_along_an_axis() -> None:
    values = torch.tensor([[1.0, 3.0, math.nan], [5.0, 7.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]])

    assert masked_mean(values, mask, axis=1).tolist() == [2.0, 9.0]
    assert masked_mean(values, mask.bool(), 0).tolist() == [1.0, 3.0, 9.0]


def test_what_is_left_out_is_moved_too_and_not_zeroed() -> None:
    shifted, kept = masked_whiten(VALUES, MIDDLE), masked_whiten(VALUES, MIDDLE, shift_mean=False)

    root = 0.5**0.5
    assert torch.allclose(shifted, torch.tensor([6.5, -0.5, 0.5, -9.5]) / root)
    assert torch.allclose(kept, shifted + 2.5)


@pytest.mark.parametrize(
    ("mask", "unbiased", "words"),
    [
        ([0.0, 0.0, 0.0, 0.0], True, "mask has 0 values within it; an unbiased variance needs 2 or more"),
        ([0.0, 1.0, 0.0, 0.0], True, "mask has 1 values within it; an unbiased variance needs 2 or more"),
        ([0.0, 0.0, 0.0, 0.0], False, "mask has 0 values within it; a variance needs 1 or more"),
    ],
)
def test_too_little_has_no_variance(mask: list[float], unbiased: bool, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        masked_var(VALUES, torch.tensor(mask), unbiased)


@given(st.lists(st.tuples(st.floats(-100, 100, width=32), st.booleans()), min_size=1, max_size=20))
def test_they_are_those_the_trainer_whitens_with(rows: list[tuple[float, bool]]) -> None:
    values = torch.tensor([value for value, _ in rows])
    mask: Tensor = torch.tensor([within for _, within in rows])
    of_all = moments(values, mask)
    if of_all.tokens < 2:
        return
    ours = whiten(values, mask, of_all.mean, of_all.var, shift_mean=True)

    assert float(masked_mean(values, mask.float())) == pytest.approx(of_all.mean, rel=1e-6, abs=1e-6)
    assert torch.equal(masked_whiten(values, mask.float())[mask], ours[mask])
    assert bool((ours[~mask] == 0).all())
