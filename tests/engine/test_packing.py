"""Rows read without their padding: as padded rows are read, by the architectures that can."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ppo_engine.actor_critic import ActorCritic, trunk
from ppo_engine.batch import cut_packed, rectangles
from ppo_engine.packing import ATTENTION, Packed, Padded, pack
from tests.engine import tiny
from tests.engine.training import logged, trainer, value_model

Lengths = st.lists(st.integers(1, 30), min_size=1, max_size=9)
SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 4}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_key_value_heads": 2,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "a window of 4 tokens": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=4)),
    "windows in some layers": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**GROUPED, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    ),
    "normed heads": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED)),
    "learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=32,
            bos_token_id=None,
            eos_token_id=None,
        )
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def packing(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A model that reads packed rows, with weights large enough that each token's words count."""
    torch.manual_seed(0)
    model = MODELS[request.param]().double()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(8)
    assert pack(model)
    return model


def rows_of(lengths: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    ids_BT = torch.randint(1, 32, (len(lengths), max(lengths)), generator=generator)
    mask_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids_BT * mask_BT, mask_BT


@given(lengths=Lengths)
def test_packed_rows_say_what_padded_rows_say_and_teach_the_same(packing: Any, lengths: list[int]) -> None:
    ids_BT, mask_BT = rows_of(lengths)
    told = []
    for rows in (Packed.of(ids_BT, lengths), Padded(ids_BT, mask_BT.long())):
        hidden_ND = rows.read(trunk(packing), mask_BT)
        (hidden_ND * torch.arange(1.0, len(hidden_ND) + 1)[:, None]).sum().backward()
        gradients = [weight.grad.clone() for weight in packing.parameters() if weight.grad is not None]
        packing.zero_grad()
        told.append([hidden_ND.detach(), *gradients])

    assert len(told[0]) > 10
    for packed, padded in zip(*told, strict=True):
        assert (packed - padded).norm() <= 1e-5 * padded.norm() + 1e-5


@given(Lengths)
def test_the_line_has_every_token_once_and_little_else(lengths: list[int]) -> None:
    ids_BT, mask_BT = rows_of(lengths)
    packed = Packed.of(ids_BT, lengths)
    area = sum(rows * tokens for rows, tokens in packed.groups)
    place_N = packed.place_BT[mask_BT]

    assert packed.input_ids_1N.shape == packed.position_ids_1N.shape == (1, area)
    assert len(set(place_N.tolist())) == sum(lengths)
    assert torch.equal(packed.input_ids_1N[0][place_N], ids_BT[mask_BT])
    assert packed.position_ids_1N[0][place_N].tolist() == [i for length in lengths for i in range(length)]
    assert area - sum(lengths) <= 16 * (len(set(lengths)) - 1)  # or a group more would have cost less


def test_rows_of_like_length_attend_together() -> None:
    assert rectangles([30, 5, 29, 4, 30]) == [[0, 4, 2], [1, 3]]


@given(Lengths, st.integers(1, 120))
def test_micro_batches_take_every_row_once_and_keep_the_budget(lengths: list[int], max_tokens: int) -> None:
    parts = cut_packed(lengths, max_tokens)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    tokens = [sum(lengths[row] for row in part) for part in parts]
    assert all(len(part) == 1 or taken <= max_tokens for part, taken in zip(parts, tokens, strict=True))
    flat = [lengths[row] for part in parts for row in part]
    assert flat == sorted(lengths, reverse=True)


def test_micro_batches_are_of_about_as_many_tokens_each() -> None:
    # 40 tokens, at most 30: two of 20, not one of 30 and one of 10.
    assert cut_packed([10, 10, 10, 10], max_tokens=30) == [[0, 1], [2, 3]]
    assert cut_packed([3, 9, 4, 1, 3, 4], max_tokens=8) == [[1], [2, 5], [0, 4, 3]]


class Mixing(nn.Module):
    """Adds each token's neighbour to it, whoever wrote that."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + 0.1 * hidden.roll(1, 1)


def mixing() -> Any:
    model = MODELS["llama"]()
    model.model.norm = nn.Sequential(model.model.norm, Mixing())
    return model


def with_a_state() -> Any:
    model = MODELS["llama"]()
    model.config.layer_types = ["full_attention", "linear_attention"]
    return model


@pytest.mark.parametrize(
    "make",
    [
        mixing,
        lambda: BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=4)),
        lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, attn_implementation="eager")),
        with_a_state,
        lambda: Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                **SHAPE, **EXPERTS, use_sliding_window=True, sliding_window=28, max_window_layers=0
            )
        ),
    ],
    ids=[
        "rows that are mixed",
        "positions by distance",
        "an attention of its own",
        "layers that carry a state",
        "a window in the mask alone",
    ],
)
def test_a_model_that_cannot_is_left_as_it_is(make: Callable[[], Any]) -> None:
    model = make()
    before = model.config._attn_implementation
    assert not pack(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("seed", range(4))
def test_experts_pack_though_their_rounding_changes_with_a_rows_neighbours(seed: int) -> None:
    torch.manual_seed(seed)
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    wide = {"hidden_size": 256, "num_attention_heads": 8, "num_hidden_layers": 4}
    assert pack(Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**GROUPED, **wide, **experts})))


def test_experts_without_a_window_pack() -> None:
    config = Qwen2MoeConfig(**SHAPE, **EXPERTS)
    assert not config.sliding_window
    assert pack(Qwen2MoeForCausalLM(config))


def test_models_with_one_config_pack_alike_and_once_more() -> None:
    model = MODELS["llama"]()
    beside = LlamaForCausalLM(model.config)
    assert [pack(model), pack(model), pack(beside), pack(copy.deepcopy(model))] == [True] * 4
    beside.model.norm = nn.Sequential(beside.model.norm, Mixing())
    assert not pack(beside)
    assert model.config._attn_implementation == ATTENTION  # or the first would read rows as one


def test_sampling_and_exports_of_a_packing_model_are_what_they_were(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    prompt = {"input_ids": torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])}
    prompt["attention_mask"] = (prompt["input_ids"] != 0).long()
    before = model.generate(**prompt, do_sample=False, max_new_tokens=8)
    assert pack(model)

    assert torch.equal(model.generate(**prompt, do_sample=False, max_new_tokens=8), before)
    model.save_pretrained(tmp_path)
    assert ATTENTION not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


class Reading:
    """Counts the tokens that trunks are given, outside of sampling."""

    def __init__(self, module: ActorCritic) -> None:
        self.tokens = 0
        for model in (module.policy, module.value_model):
            trunk(model).register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not kwargs["use_cache"]:
            self.tokens += kwargs["input_ids"].numel()


def test_a_run_learns_the_same_packed_and_reads_fewer_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves, tokens = [], []
    for name in ("packed", "padded"):
        if name == "padded":
            monkeypatch.setattr(ActorCritic, "pack", lambda self: False)
        made = trainer(tmp_path / name, value_model=value_model())
        assert made.model.is_packed == made.learner.is_packed == (name == "packed")
        reading = Reading(made.model)
        made.train()
        tokens.append(reading.tokens)
        curves.append([logged(made, key) for key in ("loss/policy_avg", "loss/value_avg", "objective/kl")])

    for packed, padded in zip(*curves, strict=True):
        assert packed == pytest.approx(padded, rel=1e-3, abs=1e-5)
    assert tokens[0] < tokens[1]


def test_where_one_role_cannot_pack_none_does(tmp_path: Path) -> None:
    critic = value_model()
    critic.set_attn_implementation("eager")
    made = trainer(tmp_path, value_model=critic)
    assert not made.model.is_packed
    assert not made.learner.is_packed
    reference = tiny.policy()
    reference.set_attn_implementation("eager")
    assert not trainer(tmp_path, ref_model=reference).model.is_packed
