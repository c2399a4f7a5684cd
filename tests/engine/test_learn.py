"""How rows become micro-batches: within the bounds of memory and device, and without a change in learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.training import trainer


def trained(tmp_path: Path, efficient_tokens: int | None) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """Rows and tokens of every forward of the actor-critic, and the weights after three updates."""
    made = trainer(tmp_path)
    made.parallel.efficient_tokens = efficient_tokens
    shapes: list[tuple[int, int]] = []

    def note(module: Any, args: tuple[Tensor, ...]) -> None:
        mask_BT = args[1]
        shapes.append((len(mask_BT), int(mask_BT.sum())))

    made.model.register_forward_pre_hook(note)
    made.train()
    return shapes, [parameter.detach() for parameter in made.model.parameters() if parameter.requires_grad]


def test_a_forward_holds_no_more_than_the_device_does_well_with(tmp_path: Path) -> None:
    bounded, weights = trained(tmp_path / "bounded", 25)
    free, expected = trained(tmp_path / "free", None)

    assert all(rows == 1 or tokens <= 25 for rows, tokens in bounded)
    assert any(rows > 1 and tokens > 25 for rows, tokens in free)
    assert sum(rows for rows, _ in bounded) == sum(rows for rows, _ in free)
    for own, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)


def test_memorys_bound_holds_where_the_device_has_none(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.parallel.efficient_tokens = None

    assert made.learner._budget(4, [3, 9, 5]) == 36


@pytest.mark.parametrize(("efficient", "expected"), [(20, 20), (1000, 36)])
def test_the_lesser_of_both_bounds_counts(tmp_path: Path, efficient: int, expected: int) -> None:
    made = trainer(tmp_path)
    made.parallel.efficient_tokens = efficient

    assert made.learner._budget(4, [3, 9, 5]) == expected
