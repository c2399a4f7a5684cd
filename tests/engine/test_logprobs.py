"""From logits to log-probabilities and entropies: numbers by hand, and gradients against plain autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ppo_engine import logprobs
from ppo_engine.logprobs import Entropies, of_logits


def test_log_probabilities_and_entropies_by_hand() -> None:
    logits = torch.tensor([[0.25] * 4, [0.5, 0.5, 0, 0], [1, 0, 0, 0]], dtype=torch.float64).log() + 7
    chosen, entropies = of_logits(logits, torch.tensor([2, 0, 0]), "value")
    assert entropies is not None
    torch.testing.assert_close(chosen, torch.tensor([0.25, 0.5, 1]).double().log())
    torch.testing.assert_close(entropies, torch.tensor([math.log(4), math.log(2), 0]).double())


def plain(logits: Tensor, targets: Tensor, possible: Tensor) -> tuple[Tensor, Tensor]:
    """log_softmax of the possible tokens alone, and -sum of p log p."""
    logprobs = logits[:, possible].log_softmax(-1)
    places = possible.cumsum(0) - 1
    return logprobs.gather(-1, places[targets][:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@given(
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.integers(2, 9),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.4]),
)
def test_gradients_are_exact_and_finite_where_a_token_is_impossible(
    seed: int, rows: int, vocabulary: int, impossible: int, entropy_coef: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * 3
    possible = torch.arange(vocabulary) >= min(impossible, vocabulary - 1)
    targets = torch.randint(int(possible.int().argmax()), vocabulary, (rows,), generator=generator)
    weights = torch.randn(rows, generator=generator).double()
    asked = torch.where(possible, logits, -math.inf).float().requires_grad_()
    wanted: Entropies = "gradient" if entropy_coef else "value"
    own, own_entropies = of_logits(asked, targets, wanted)
    exact = logits.float().double().requires_grad_()
    theirs, their_entropies = plain(exact, targets, possible)

    assert own_entropies is not None
    assert own_entropies.requires_grad == (wanted == "gradient")
    torch.testing.assert_close(own.double(), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own_entropies.double(), their_entropies, rtol=1e-4, atol=1e-5)
    (own * weights).sum().add(entropy_coef * (own_entropies * weights).sum()).backward()
    (theirs * weights).sum().add(entropy_coef * (their_entropies * weights).sum()).backward()
    assert asked.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(asked.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("elements", [1, 12, 10**6])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    logits, targets = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)), torch.arange(7) % 5

    def run() -> list[Tensor]:
        asked = logits.clone().requires_grad_()
        chosen, entropies = of_logits(asked, targets, "gradient")
        assert entropies is not None
        (chosen * torch.arange(7)).sum().add(entropies.sum()).backward()
        assert asked.grad is not None
        return [chosen.detach(), entropies.detach(), asked.grad]

    whole = run()
    monkeypatch.setitem(logprobs._BLOCK_ELEMENTS, "cpu", elements)
    for one, other in zip(whole, run(), strict=True):
        assert torch.equal(one, other)


def test_they_are_fp32_under_autocast() -> None:
    logits = torch.tensor([[0.6, 0.3, 0.1, 0.0]]).log().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        chosen, entropies = of_logits(logits, torch.tensor([1]), "gradient")
        assert entropies is not None
        (chosen + entropies).sum().backward()

    assert chosen.dtype == entropies.dtype == torch.float32
    assert chosen.item() == pytest.approx(math.log(0.3), rel=1e-6)
    assert entropies.item() == pytest.approx(-sum(p * math.log(p) for p in (0.6, 0.3, 0.1)), rel=1e-6)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_a_forward_without_entropies_has_none() -> None:
    assert of_logits(torch.zeros(2, 3), torch.tensor([0, 1]), "none")[1] is None
