"""LoRA fused into the matrix product: equal to peft's own, and peft's own where it is special."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from ppo_engine.lora import FusedLinear, fuse
from tests.engine import tiny


def gpt2() -> GPT2LMHeadModel:
    """Its linear layers are Conv1D, whose weights lie the other way round."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))


def adapted(model: nn.Module, **changes: Any) -> PeftModel:
    """A model with an adapter that does something: its B is not zero."""
    transposed = isinstance(model, GPT2LMHeadModel)
    shape = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "fan_in_fan_out": transposed}
    config = LoraConfig(**{**shape, **changes})
    policy = get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return policy.eval()


def logits_and_gradients(policy: PeftModel) -> list[Tensor]:
    ids = torch.tensor([[4, 5, 6, 7], [8, 9, 1, 2]])
    policy.zero_grad()
    logits = policy(input_ids=ids).logits
    logits.square().mean().backward()
    gradients = [parameter.grad for parameter in policy.parameters() if parameter.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    return [logits.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]


def is_fused(policy: PeftModel, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether any layer's forward leaves peft's own out."""
    asked: list[object] = []
    own = Linear.forward

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(self)
        return own(self, *args, **kwargs)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Linear, "forward", spy)
        policy(input_ids=torch.tensor([[4, 5]]))
    return not asked


@pytest.mark.parametrize("make", [tiny.policy, gpt2])
def test_values_and_gradients_are_pefts(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = adapted(make())
    peft_own = logits_and_gradients(policy)
    fuse(policy)
    fused = logits_and_gradients(policy)

    assert is_fused(policy, monkeypatch)
    for ours, theirs in zip(fused, peft_own, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_adapters_are_switched_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = adapted(tiny.policy())
    policy.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    fuse(policy)
    ids = torch.tensor([[4, 5, 6]])

    def logits() -> Tensor:
        with torch.no_grad():
            result: Tensor = policy(input_ids=ids).logits
        return result

    own = logits()
    with policy.disable_adapter():
        base = logits()
    policy.set_adapter("other")
    other = logits()
    policy.set_adapter("default")

    assert torch.equal(logits(), own)
    torch.testing.assert_close(base, tiny.policy().eval()(input_ids=ids).logits)
    assert not torch.allclose(own, base)
    assert not torch.allclose(own, other)


@pytest.mark.parametrize(
    "changes",
    [{"use_dora": True}, {"lora_bias": True, "target_modules": ["c_attn"]}],
    ids=lambda given: str(given),
)
def test_what_is_special_is_left_to_peft(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = adapted(gpt2(), **changes)
    before = logits_and_gradients(policy)
    fuse(policy)

    assert not is_fused(policy, monkeypatch)
    for ours, theirs in zip(logits_and_gradients(policy), before, strict=True):
        assert torch.equal(ours, theirs)


def test_dropout_in_training_and_autocast_are_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = adapted(tiny.policy(), lora_dropout=0.5)
    fuse(policy)

    assert is_fused(policy, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fused(policy, monkeypatch)
    policy.train()
    assert not is_fused(policy, monkeypatch)


def test_what_is_saved_is_pefts(tmp_path: Path) -> None:
    policy = adapted(tiny.policy())
    fuse(policy)
    policy.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny.policy(), str(tmp_path)).eval()
    layers = [module for module in policy.modules() if isinstance(module, Linear)]

    assert layers
    assert all(type(layer) is FusedLinear for layer in layers)
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, policy(input_ids=ids).logits)
