"""Masks from lengths, micro-batches, and the order of tokens between batch, model, and losses."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ppo_engine.actor_critic import response_slots
from ppo_engine.batch import (
    FORWARD_TOKENS,
    Experience,
    Rollout,
    collate,
    cut,
    flatten_tokens,
    response_mask,
    shuffle,
    unflatten_tokens,
)

PAD = 0
# The pad id stands in prompts and responses, and ends one of each.
PROMPTS = [[5, PAD], [7], [PAD, 8, 9]]
RESPONSES = [[1, 2, 3], [PAD, PAD], [4, PAD]]

Lengths = st.lists(st.integers(1, 60), max_size=40)


def test_collate_pads_on_the_right_and_masks_by_length() -> None:
    batch = collate(PROMPTS, RESPONSES, [2, 0, 1], PAD)
    assert batch.rows == [2, 0, 1]
    assert batch.input_ids_BT.tolist() == [[0, 8, 9, 4, 0], [5, 0, 1, 2, 3], [7, 0, 0, 0, 0]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.prompt_lengths_B.tolist() == [3, 2, 1]
    assert batch.response_lengths_B.tolist() == [2, 3, 2]


def test_another_pad_id_changes_no_mask() -> None:
    one, other = collate(PROMPTS, RESPONSES, [0, 1, 2], PAD), collate(PROMPTS, RESPONSES, [0, 1, 2], 99)
    assert torch.equal(one.attention_mask_BT, other.attention_mask_BT)
    is_text = one.attention_mask_BT.bool()
    assert torch.equal(one.input_ids_BT[is_text], other.input_ids_BT[is_text])


def test_collate_is_as_wide_as_its_longest_row() -> None:
    assert collate(PROMPTS, RESPONSES, [1], PAD).input_ids_BT.shape == (1, 3)


def test_response_mask() -> None:
    assert response_mask([2, 0, 3], 3).int().tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 3))
def test_unflatten_is_the_inverse_of_flatten(lengths: list[int], more: int) -> None:
    lengths_B, width = torch.tensor(lengths), max(lengths) + more
    values_N = torch.arange(1.0, sum(lengths) + 1)
    values_BR = unflatten_tokens(values_N, lengths_B, width)
    assert values_BR.shape == (len(lengths), width)
    assert torch.equal(flatten_tokens(values_BR, lengths_B), values_N)
    assert not values_BR[~response_mask(lengths_B, width)].any()


def experience() -> Experience:
    """Each number names its row and token: 21 is token 1 of row 2."""
    lengths_B = torch.tensor([len(ids) for ids in RESPONSES])
    mask_BR = response_mask(lengths_B, 4)
    names_BR = torch.where(mask_BR, torch.arange(3)[:, None] * 10.0 + torch.arange(4), 0.0)
    return Experience(
        prompt_ids=PROMPTS,
        response_ids=RESPONSES,
        response_lengths_B=lengths_B,
        logprobs_BR=names_BR,
        ref_logprobs_BR=names_BR + 0.1,
        values_BR=names_BR + 0.2,
        rewards_BR=names_BR + 0.3,
        advantages_BR=names_BR + 0.4,
        returns_BR=names_BR + 0.5,
        mask_BR=mask_BR,
        weights_BR=names_BR + 0.6,
    )


def written_ids(rows: list[int]) -> Tensor:
    """The response ids of rows, as the forward of `ActorCritic` finds them."""
    batch = collate(PROMPTS, RESPONSES, rows, PAD)
    width = batch.input_ids_BT.shape[1]
    slots_BT = response_slots(batch.prompt_lengths_B, batch.response_lengths_B, width)
    return batch.input_ids_BT[:, 1:][slots_BT[:, :-1]]


def test_tokens_come_in_the_order_of_the_forward() -> None:
    rows = [2, 0]
    tokens = experience().tokens(rows)
    assert written_ids(rows).tolist() == [4, PAD, 1, 2, 3]
    expected = torch.tensor([20.0, 21, 0, 1, 2])
    torch.testing.assert_close(tokens.logprobs_N, expected)
    torch.testing.assert_close(tokens.ref_logprobs_N, expected + 0.1)
    torch.testing.assert_close(tokens.values_N, expected + 0.2)
    torch.testing.assert_close(tokens.advantages_N, expected + 0.4)
    torch.testing.assert_close(tokens.returns_N, expected + 0.5)
    torch.testing.assert_close(tokens.weights_N, expected + 0.6)
    assert tokens.mask_N.all()


def test_tokens_that_the_policy_did_not_write_are_left_out() -> None:
    whole = experience()
    whole.mask_BR[0, 1] = False
    tokens = whole.tokens([2, 0])
    assert tokens.mask_N.tolist() == [True, True, True, False, True]
    assert tokens.logprobs_N.tolist() == [20, 21, 0, 2]
    torch.testing.assert_close(tokens.weights_N, torch.tensor([20.6, 21.6, 0.6, 2.6]))


def test_without_a_critic_tokens_have_no_values() -> None:
    tokens = replace(experience(), values_BR=None, returns_BR=None).tokens([2, 0])
    assert tokens.values_N is tokens.returns_N is None


def test_a_process_without_rows_runs_a_forward_of_one_token() -> None:
    batch = collate(PROMPTS, RESPONSES, [], PAD)
    assert batch.rows == []
    assert batch.input_ids_BT.shape == batch.attention_mask_BT.shape == (1, 2)
    slots_BT = response_slots(batch.prompt_lengths_B, batch.response_lengths_B, 2)
    assert int(slots_BT.sum()) == 1


def test_rollout_knows_its_lengths() -> None:
    rollout = Rollout(
        rows=[0, 1, 2],
        prompts=["a", "b", "c"],
        prompt_ids=PROMPTS,
        responses=["x", "y", "z"],
        response_ids=RESPONSES,
        finished=[True, False, True],
        columns=[{}, {}, {}],
    )
    assert len(rollout) == 3
    assert rollout.total_lengths == experience().total_lengths == [5, 3, 5]


@pytest.mark.parametrize(
    ("response_ids", "written"),
    [
        ([[1], [2]], None),
        ([[1, 2]], [[True]]),
        ([[1, 2]], [[True, False], [True]]),
    ],
)
def test_rollout_refuses_ragged_fields(
    response_ids: list[list[int]], written: list[list[bool]] | None
) -> None:
    with pytest.raises(AssertionError):
        Rollout([0], ["a"], [[1]], ["x"], response_ids, [True], [{}], written)


# Micro-batches -------------------------------------------------------------------------------------------


def test_cut_by_hand() -> None:
    # Longest first: 9 alone (budget 8); 4 + 4 = 8; 3, 3; 1.
    assert cut([3, 9, 4, 1, 3, 4], max_tokens=8) == [[1], [2, 5], [0, 4], [3]]
    assert cut([], max_tokens=8) == []


@given(Lengths, st.integers(1, 200))
def test_cut_takes_every_row_once_and_keeps_the_budget(lengths: list[int], max_tokens: int) -> None:
    parts = cut(lengths, max_tokens)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(lengths[row] for row in part) <= max_tokens


def test_cut_splits_where_padding_costs_more_than_a_forward() -> None:
    # Together: 5 x 400 = 2000. Apart: 2 x 400 + 3 x 10 + a second forward.
    assert cut([400, 10, 400, 10, 10], max_tokens=4000) == [[0, 2], [1, 3, 4]]
    # Together: 3 x 40 = 120. Apart: 40 + 2 x 30 = 100, and a second forward.
    assert cut([40, 30, 30], max_tokens=4000) == [[0, 1, 2]]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=7), st.integers(1, 1500))
def test_cut_costs_least_of_all_ways_to_cut(lengths: list[int], max_tokens: int) -> None:
    """Against every way to cut the rows, longest first, that keeps the budget."""

    def cost(parts: list[list[int]]) -> int:
        return sum(len(part) * max(part) + FORWARD_TOKENS for part in parts)

    ordered = sorted(lengths, reverse=True)
    ways = []
    for walls in product([False, True], repeat=len(ordered) - 1):
        edges = [0, *(index + 1 for index, is_wall in enumerate(walls) if is_wall), len(ordered)]
        parts = [ordered[start:end] for start, end in pairwise(edges)]
        if all(len(part) == 1 or len(part) * part[0] <= max_tokens for part in parts):
            ways.append(cost(parts))

    own = [[lengths[row] for row in part] for part in cut(lengths, max_tokens)]
    assert cost(own) == min(ways)


@given(Lengths, st.integers(1, 200), st.randoms(use_true_random=False))
def test_cut_does_not_depend_on_the_order_of_rows(
    lengths: list[int], max_tokens: int, random: object
) -> None:
    shuffled = list(lengths)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    def shapes(of: list[int]) -> list[list[int]]:
        return [[of[row] for row in part] for part in cut(of, max_tokens)]

    assert shapes(shuffled) == shapes(lengths)


# Shuffling -----------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31 - 1), st.integers(0, 1000), st.integers(0, 10), st.integers(0, 50))
def test_shuffle_is_a_permutation_and_a_pure_function(seed: int, update: int, epoch: int, n: int) -> None:
    order = shuffle(seed, update, epoch, n)
    assert sorted(order) == list(range(n))
    assert shuffle(seed, update, epoch, n) == order


def test_every_seed_update_and_epoch_has_its_own_order() -> None:
    orders = {tuple(shuffle(*key, 20)) for key in np.ndindex(4, 4, 4)}
    assert len(orders) == 4**3


def test_shuffle_leaves_the_global_state_alone() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    shuffle(1, 2, 3, 100)
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]
