"""Derived numbers, by hand; rules that need facts; facts read from real directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_engine.facts import Facts, FactsError, ModelFacts, TokenizerFacts, read_model_facts
from ppo_engine.plan import batch_sizes, check, plan
from ppo_engine.spec import Hyperparameters, SpecError, parse
from tests.engine import tiny
from tests.engine.test_spec import raw

WORDS = len(tiny.WORDS)


def issues(spec: dict[str, Any], facts: Facts) -> dict[str, str]:
    return {".".join(map(str, issue.loc)): issue.msg for issue in check(parse(spec), facts)}


def test_the_numbers_of_a_plan() -> None:
    ppo = {
        "total_episodes": 100,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_mini_batches": 4,
        "num_ppo_epochs": 3,
    }
    derived = plan(parse(raw(ppo=ppo, resources={"gpus": 3})), Facts())

    assert derived.batch_size == 24
    assert derived.local_batch_size == 8
    assert derived.micro_batch_size == 12
    assert derived.mini_batch_size == 6
    assert derived.local_mini_batch_size == 2
    assert derived.num_total_batches == 5  # 100 / 24, rounded up
    assert derived.optimizer_steps == 5 * 3 * 4
    assert any("120 episodes" in warning for warning in derived.warnings)


@given(
    per_device=st.integers(1, 64),
    accumulation=st.integers(1, 64),
    mini_batches=st.integers(1, 64),
    world_size=st.integers(1, 64),
    episodes=st.integers(1, 10_000),
)
def test_a_plan_that_is_accepted_adds_up(
    per_device: int, accumulation: int, mini_batches: int, world_size: int, episodes: int
) -> None:
    ppo = {
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "num_mini_batches": mini_batches,
        "total_episodes": episodes,
    }
    try:
        derived = plan(parse(raw(ppo=ppo, resources={"gpus": world_size})), Facts())
    except SpecError as error:
        wrong = {issue.loc for issue in error.issues}
        assert (("ppo", "num_mini_batches") in wrong) == (per_device * accumulation % mini_batches != 0)
        assert (("ppo", "total_episodes") in wrong) == (episodes < per_device * accumulation * world_size)
        return
    assert derived.mini_batch_size * mini_batches == derived.batch_size
    assert derived.local_mini_batch_size * world_size == derived.mini_batch_size
    assert 0 <= derived.num_total_batches * derived.batch_size - episodes < derived.batch_size


def test_episodes_follow_from_epochs_and_prompts() -> None:
    spec = parse(raw(ppo={"num_train_epochs": 2.5}))

    assert plan(spec, Facts(prompts=40)).total_episodes == 100
    with pytest.raises(SpecError, match=r"ppo\.total_episodes.*number of prompts is not known"):
        plan(spec, Facts())


MODEL = ModelFacts(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    vocab_size=100,
    context_length=64,
    hidden_size=10,
    parameters=1000,
    linears={"model.layers.0.q_proj": (10, 10), "model.layers.0.up_proj": (30, 10)},
    tokenizer=TokenizerFacts(pad_token=None, eos_token="</s>", chat_template=False),
)


@pytest.mark.parametrize(
    ("changes", "model", "loc", "words"),
    [
        ({"ppo": {"total_episodes": 7}}, {}, "ppo.total_episodes", ["7", "8 rows"]),
        ({"ppo": {"num_mini_batches": 3}}, {}, "ppo.num_mini_batches", ["3", "8 rows", "divisor"]),
        (
            {"ppo": {"whiten_rewards": True, "per_device_train_batch_size": 4}},
            {},
            "ppo.whiten_rewards",
            ["4 rows", "at least 8"],
        ),
        ({"ppo": {"response_length": 64}}, {}, "ppo.response_length", ["64", "positions"]),
        ({"ppo": {"stop_token_id": 100}}, {}, "ppo.stop_token_id", ["100", "0 to 99"]),
        (
            {"method": {"type": "lora", "target_modules": ["q_proj", "c_attn"]}},
            {},
            "method.target_modules.1",
            ['"c_attn"', "q_proj", "up_proj"],
        ),
        ({}, {"architectures": ("BertModel",)}, "model", ["BertModel", "causal"]),
        (
            {},
            {"tokenizer": TokenizerFacts(pad_token=None, eos_token=None, chat_template=False)},
            "model",
            ["pad", "eos"],
        ),
        (
            {"ppo": {"stop_token": "eos"}},
            {"tokenizer": TokenizerFacts(pad_token="<pad>", eos_token=None, chat_template=False)},
            "ppo.stop_token",
            ["eos", "stop_token_id"],
        ),
    ],
)
def test_a_rule_that_needs_facts(
    changes: dict[str, Any], model: dict[str, Any], loc: str, words: list[str]
) -> None:
    found = issues(raw(**changes), Facts(model=MODEL.model_copy(update=model), prompts=1000))

    assert list(found) == [loc]
    assert all(word in found[loc] for word in words), found[loc]


def test_a_reward_model_has_one_label() -> None:
    spec = raw(rewards=[{"type": "model", "name": "rm", "source": {"type": "local", "path": "rm"}}])
    two = ModelFacts(architectures=("LlamaForSequenceClassification",), labels=2)
    other = ModelFacts(architectures=("LlamaForCausalLM",))

    assert "2 labels" in issues(spec, Facts(rewards={"rm": two}))["rewards.0.source"]
    assert "LlamaForCausalLM" in issues(spec, Facts(rewards={"rm": other}))["rewards.0.source"]
    assert issues(spec, Facts(rewards={"rm": two.model_copy(update={"labels": 1})})) == {}


def test_trained_parameters_and_memory_by_hand() -> None:
    lora = plan(parse(raw(method={"type": "lora", "r": 2})), Facts(model=MODEL, prompts=100))
    full = plan(parse(raw(method={"type": "full"})), Facts(model=MODEL, prompts=100))

    adapter, head = 2 * (10 + 10) + 2 * (30 + 10), 11
    assert lora.parameters_trained == adapter + head
    assert lora.memory is not None
    assert lora.memory["policy"] == 4 * (1000 + adapter)
    assert lora.memory["reference"] == 0
    assert full.parameters_trained == 1000 + 1000 + head
    assert full.memory is not None
    assert full.memory["reference"] == 4 * 1000
    assert full.memory["optimizer"] == 8 * (2000 + head)


def test_batch_sizes_are_trls() -> None:
    ppo = Hyperparameters(per_device_train_batch_size=2, gradient_accumulation_steps=6, num_mini_batches=3)

    assert batch_sizes(ppo, 2).model_dump() == {
        "world_size": 2,
        "batch_size": 24,
        "local_batch_size": 12,
        "micro_batch_size": 4,
        "mini_batch_size": 8,
        "local_mini_batch_size": 4,
    }


# Facts -------------------------------------------------------------------------------------------------


def test_facts_are_those_of_the_loaded_model(policy_dir: Path) -> None:
    facts, model = read_model_facts(policy_dir), tiny.policy()

    assert facts.is_causal_lm
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.weight_bytes == 4 * facts.parameters
    assert (facts.vocab_size, facts.context_length, facts.hidden_size, facts.layers) == (WORDS, 32, 16, 2)
    assert facts.linears["model.layers.1.mlp.down_proj"] == (16, 32)
    assert not any("embed" in name or "lm_head" in name for name in facts.linears)
    assert facts.tokenizer == TokenizerFacts(pad_token="<pad>", eos_token="</s>", chat_template=False)


def write(directory: Path, name: str, content: bytes) -> None:
    (directory / name).write_bytes(content)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no config.json"),
        ({"config.json": b"{"}, "not JSON"),
        ({"config.json": b"[]"}, "JSON object"),
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "pickled"),
        ({"config.json": b"{}", "model.safetensors": b"\xff" * 8}, "not a safetensors file"),
        ({"config.json": b"{}", "model.safetensors": (9).to_bytes(8, "little") + b"{"}, "not a safetensors"),
        ({"config.json": b"{}", "model.safetensors": (2).to_bytes(8, "little") + b"{["}, "damaged"),
    ],
)
def test_a_directory_that_is_no_model_says_why(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    for name, content in files.items():
        write(tmp_path, name, content)

    with pytest.raises(FactsError, match=words):
        read_model_facts(tmp_path)


def test_a_tokenizer_whose_class_has_tokens_of_its_own_is_not_judged(tmp_path: Path) -> None:
    write(tmp_path, "config.json", b"{}")
    write(tmp_path, "tokenizer_config.json", json.dumps({"tokenizer_class": "GPT2Tokenizer"}).encode())

    assert read_model_facts(tmp_path).tokenizer is None
    write(tmp_path, "tokenizer_config.json", json.dumps({"tokenizer_class": "TokenizersBackend"}).encode())
    tokenizer = read_model_facts(tmp_path).tokenizer
    assert tokenizer is not None
    assert tokenizer.eos_token is None
