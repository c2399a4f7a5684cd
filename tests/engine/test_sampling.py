"""Uniform numbers that belong to rows, and the inversion of the distribution function."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ppo_engine.draws import Purpose
from ppo_engine.rollout.sampling import _invert, row_uniforms, sample

ALMOST_ONE = math.nextafter(1.0, 0.0)
MINUS_INF = -math.inf


def uniforms(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logits(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities).log()


# Uniform numbers -----------------------------------------------------------------------------------------


def test_uniforms_belong_to_rows() -> None:
    together = row_uniforms(7, 3, [0, 1, 2, 3], 5)
    assert together.shape == (4, 5)
    assert together.dtype == np.float64
    for row in range(4):
        assert np.array_equal(row_uniforms(7, 3, [row], 5)[0], together[row])
    assert np.array_equal(row_uniforms(7, 3, [3, 1], 5), together[[3, 1]])


def test_a_longer_response_begins_with_the_same_numbers() -> None:
    assert np.array_equal(row_uniforms(7, 3, [5], 9)[:, :4], row_uniforms(7, 3, [5], 4))


def test_no_two_streams_are_alike() -> None:
    keys = [
        (seed, update, row, purpose)
        for seed in range(3)
        for update in range(3)
        for row in range(3)
        for purpose in Purpose
    ]
    drawn = {row_uniforms(seed, update, [row], 1, purpose).item() for seed, update, row, purpose in keys}
    assert len(drawn) == len(keys)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10, written down from Salmon et al. 2011, section 4.3."""
    mask = 2**64 - 1
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [
            (right >> 64) ^ counter[1] ^ key[0],
            right & mask,
            (left >> 64) ^ counter[3] ^ key[1],
            left & mask,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    return counter


def test_uniforms_are_the_first_words_of_the_rows_own_counter() -> None:
    # A run resumed by a later release must see the numbers it began with.
    for row in (0, 31):
        words = philox([1, row, 6, 0], [42, Purpose.ROLLOUT]) + philox([2, row, 6, 0], [42, Purpose.ROLLOUT])
        expected = [(word >> 11) * 2.0**-53 for word in words]
        assert row_uniforms(42, 6, [row], 8).tolist() == [expected]


def test_uniforms_leave_the_global_state_alone() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    row_uniforms(1, 2, [3], 100)
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]


def test_uniforms_are_uniform() -> None:
    numbers = row_uniforms(1, 1, range(2000), 10)
    counts = np.bincount((numbers * 10).astype(int).ravel(), minlength=10)
    # 99.9 % of chi-square with 9 degrees of freedom.
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.88
    # Neither rows nor tokens of a row go together: four standard errors of a correlation.
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 4 / math.sqrt(2000)
    assert abs(np.corrcoef(numbers[:, 0], numbers[:, 1])[0, 1]) < 4 / math.sqrt(2000)


# Inversion -----------------------------------------------------------------------------------------------


def test_sample_inverts_the_distribution_function() -> None:
    # cdf: 0.5, 0.75, 1
    numbers = uniforms(0.0, 0.49, 0.51, 0.74, 0.76, ALMOST_ONE)
    assert sample(logits(0.5, 0.25, 0.25).expand(6, 3), numbers, 1.0).tolist() == [0, 0, 1, 1, 2, 2]


def test_tokens_of_probability_zero_are_never_taken() -> None:
    rows = logits(0, 0.5, 0, 0.5, 0).expand(5, 5)
    assert sample(rows, uniforms(0, 0.25, 0.5, 0.75, ALMOST_ONE), 1.0).tolist() == [1, 1, 3, 3, 3]


@given(
    st.lists(st.one_of(st.just(MINUS_INF), st.floats(-200, 200)), min_size=1, max_size=12).filter(
        lambda row: max(row) > MINUS_INF
    ),
    st.one_of(st.just(0.0), st.just(ALMOST_ONE), st.floats(0, 1, exclude_max=True)),
    st.sampled_from([0.1, 0.7, 1.0, 3.0]),
)
def test_whatever_is_drawn_is_possible(row: list[float], number: float, temperature: float) -> None:
    token = int(sample(torch.tensor([row]), uniforms(number), temperature))
    assert (torch.tensor(row) / temperature).softmax(-1)[token] > 0


def test_samples_follow_the_distribution() -> None:
    weights = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
    temperature = 0.7
    numbers = torch.from_numpy(row_uniforms(3, 1, range(20_000), 1)[:, 0])
    drawn = sample(weights.log().expand(20_000, 8), numbers, temperature)
    expected = 20_000 * (weights.log() / temperature).softmax(-1)
    statistic = ((drawn.bincount(minlength=8) - expected) ** 2 / expected).sum()
    assert statistic < 24.32  # 99.9 % of chi-square with 7 degrees of freedom


def test_rare_tokens_keep_their_share() -> None:
    # Near 1 the step of an fp32 sum is 6e-8: more than the probability, 1e-9, of the last two tokens.
    rows = torch.tensor([0.0, math.log(1e-9), math.log(1e-9)]).expand(3, 3)
    assert sample(rows, uniforms(1 - 2.5e-9, 1 - 1.5e-9, 1 - 0.5e-9), 1.0).tolist() == [0, 1, 2]


def test_a_sum_that_rises_where_nothing_is_added_misleads_nobody() -> None:
    # As a parallel sum on a GPU may come out: the second token has no probability, yet the sum rises.
    probabilities = torch.tensor([[0.5, 0.0, 0.5]] * 3)
    cdf = uniforms(0.5, math.nextafter(0.5, 1), 1.0).repeat(3, 1)
    assert _invert(probabilities, cdf, uniforms(0.2, 0.5, 0.7)).tolist() == [0, 0, 2]


def test_a_target_at_the_very_end_takes_the_last_possible_token() -> None:
    assert sample(logits(0.5, 0.5, 0)[None], uniforms(1.0), 1.0) == 1


def test_a_row_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, numbers = (
        torch.randn(64, 101, generator=generator),
        torch.from_numpy(row_uniforms(5, 1, range(64), 1)),
    )
    together = sample(rows, numbers[:, 0], 0.7).tolist()
    assert [sample(rows[i : i + 1], numbers[i], 0.7).item() for i in range(64)] == together
    order = torch.randperm(64, generator=generator)
    assert sample(rows[order], numbers[order, 0], 0.7).tolist() == [together[i] for i in order]


def test_temperature_zero_takes_the_most_likely() -> None:
    rows = torch.tensor([[1.0, 3, 2], [5, 5, 1]])
    assert sample(rows, uniforms(ALMOST_ONE, ALMOST_ONE), 0.0).tolist() == [1, 0]


def test_half_precision_logits() -> None:
    rows = logits(0.5, 0.5).bfloat16().expand(2, 2)
    assert sample(rows, uniforms(0.4, 0.6), 1.0).tolist() == [0, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [MINUS_INF, MINUS_INF]])
def test_logits_that_are_no_numbers_are_refused(bad: list[float], temperature: float) -> None:
    with pytest.raises(FloatingPointError, match="row 1"):
        sample(torch.tensor([[0.0, 0.0], bad]), uniforms(0.5, 0.5), temperature)
