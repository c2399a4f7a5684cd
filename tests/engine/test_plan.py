"""Derived numbers, by hand; rules that need facts; facts read from real directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ppo_engine.facts import (
    AdapterFacts,
    Facts,
    FactsError,
    ModelFacts,
    TokenizerFacts,
    read_adapter_facts,
    read_model_facts,
)
from ppo_engine.hyperparameters import Hyperparameters
from ppo_engine.issues import SpecError
from ppo_engine.plan import batch_sizes, check, plan
from ppo_engine.spec import parse
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


def test_a_pass_asks_for_several_responses_to_each_prompt() -> None:
    ppo = {"num_train_epochs": 2.5, "advantage_estimator": "rloo", "num_return_sequences": 4}
    derived = plan(parse(raw(ppo=ppo)), Facts(prompts=40))

    assert derived.total_episodes == 2.5 * 40 * 4
    assert derived.num_total_batches == 50  # of 8 rows, which are 2 prompts


MODEL = ModelFacts(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    vocab_size=100,
    context_length=64,
    hidden_size=10,
    parameters=1000,
    output_layers={"lm_head": 100},
    linears={"model.layers.0.q_proj": (10, 10), "model.layers.0.up_proj": (30, 10)},
    tokenizer=TokenizerFacts(pad_token=None, eos_token="</s>", chat_template=False),
)


@pytest.mark.parametrize(
    ("changes", "model", "loc", "words"),
    [
        ({"ppo": {"total_episodes": 7}}, {}, "ppo.total_episodes", ["7", "8 rows"]),
        ({"ppo": {"num_mini_batches": 3}}, {}, "ppo.num_mini_batches", ["3", "8 rows", "divisor"]),
        ({"ppo": {"num_return_sequences": 3}}, {}, "ppo.num_return_sequences", ["3", "8 rows", "divisor"]),
        (
            {"ppo": {"adaptive_kl_target": 6.0, "adaptive_kl_horizon": 7.0}},
            {},
            "ppo.adaptive_kl_horizon",
            ["7 given", "8 rows", "give at least 8"],
        ),
        (
            {
                "ppo": {
                    "adaptive_kl_target": 6.0,
                    "gradient_accumulation_steps": 2000,
                    "total_episodes": 16_000,
                }
            },
            {},
            "ppo.adaptive_kl_horizon",
            ["Not given, which means 10000", "16000 rows"],
        ),
        (
            {"ppo": {"critic_warmup": 2, "total_episodes": 16}},
            {},
            "ppo.critic_warmup",
            ["2 given", "2 updates", "never learn", "fewer"],
        ),
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
        (
            {"rewards": [{"type": "string_check", "name": "right", "column": "anwser"}]},
            {},
            "rewards.0.column",
            ['"anwser"', '["answer"]', "prompts.train"],
        ),
    ],
)
def test_a_rule_that_needs_facts(
    changes: dict[str, Any], model: dict[str, Any], loc: str, words: list[str]
) -> None:
    columns = {"train": frozenset({"answer"})}
    found = issues(raw(**changes), Facts(model=MODEL.model_copy(update=model), prompts=1000, columns=columns))

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

    adapter = 2 * (10 + 10) + 2 * (30 + 10)
    assert lora.parameters_trained == adapter + (10 + 1)  # the head has a bias
    assert lora.memory is not None
    assert lora.memory["policy"] == 4 * (1000 + adapter)
    assert lora.memory["reference"] == 0
    critic = (1000 - 100) + 10  # its trunk, and a head of its class
    assert full.parameters_trained == 1000 + critic
    assert full.memory is not None
    assert full.memory["reference"] == 4 * 1000
    assert full.memory["optimizer"] == 8 * (1000 + critic)


@pytest.mark.parametrize("method", [{"type": "full"}, {"type": "lora", "r": 4}])
def test_without_a_critic_nothing_is_trained_for_one(method: dict[str, Any]) -> None:
    spec = raw(method=method, ppo={"total_episodes": 16})
    group = {**spec["ppo"], "advantage_estimator": "rloo", "num_return_sequences": 2}
    with_critic = plan(parse(spec), Facts(model=MODEL))
    without = plan(parse({**spec, "ppo": group}), Facts(model=MODEL))

    # All weights; or of each of two modules r x (inputs + outputs).
    assert without.parameters_trained == (1000 if method["type"] == "full" else 4 * (20 + 40))
    assert without.parameters_trained < (with_critic.parameters_trained or 0)
    assert without.memory is not None
    assert without.memory["value"] == 0


def test_half_precision_is_for_the_frozen_base_alone() -> None:
    half = {"resources": {"precision": "bf16"}}
    reward = {"type": "model", "name": "rm", "source": {"type": "local", "path": "rm"}}
    facts = Facts(model=MODEL, rewards={"rm": ModelFacts(parameters=70)}, prompts=100)
    lora = plan(parse(raw(method={"type": "lora", "r": 2}, rewards=[reward], **half)), facts)
    full = plan(parse(raw(method={"type": "full"}, rewards=[reward], **half)), facts)

    assert lora.memory is not None
    assert full.memory is not None
    assert lora.memory["policy"] == 2 * 1000 + 4 * (2 * (10 + 10) + 2 * (30 + 10))
    assert lora.memory["reward"] == full.memory["reward"] == 4 * 70
    assert (full.memory["policy"], full.memory["reference"]) == (4 * 1000, 4 * 1000)


def test_what_is_offloaded_is_not_counted_as_the_gpus() -> None:
    facts = Facts(model=MODEL, prompts=100)
    kept = plan(parse(raw(resources={"gpus": 2, "zero_stage": 2})), facts).memory
    moved = plan(parse(raw(resources={"gpus": 2, "zero_stage": 2, "offload": "optimizer"})), facts).memory

    assert kept is not None
    assert moved is not None
    assert "optimizer" not in moved
    assert moved["optimizer_off_gpu"] == kept["optimizer"]


@pytest.mark.parametrize(
    ("resources", "is_told"),
    [
        ({"zero_stage": 3}, True),
        ({"zero_stage": 3, "offload": "optimizer"}, False),
        ({"zero_stage": 3, "gpus": 2}, False),
        ({}, False),
    ],
)
def test_sharding_over_nobody_is_told(resources: dict[str, Any], is_told: bool) -> None:
    told = plan(parse(raw(resources=resources)), Facts(prompts=100)).warnings
    assert any("zero_stage 3 over one GPU shards nothing" in warning for warning in told) == is_told


def test_a_value_model_of_another_architecture_is_told() -> None:
    value = {"type": "model", "source": {"type": "local", "path": "critic"}}
    spec = parse(raw(method={"type": "lora", "value": value}))
    for kind in ("llama", "gpt2"):
        facts = Facts(model=MODEL, value=CRITIC.model_copy(update={"model_type": kind}), prompts=100)
        told = [warning for warning in plan(spec, facts).warnings if warning.startswith("The value model is")]
        assert ["a gpt2, the policy a llama" in warning for warning in told] == [True] * (kind == "gpt2")


def test_offload_without_sharding_is_refused() -> None:
    with pytest.raises(SpecError) as caught:
        parse(raw(resources={"offload": "optimizer"}))
    assert [issue.loc for issue in caught.value.issues] == [("resources", "offload")]
    assert 'zero_stage 1, 2, or 3, or "none"' in caught.value.issues[0].msg


CRITIC = ModelFacts(
    architectures=("LlamaForSequenceClassification",),
    vocab_size=100,
    context_length=64,
    labels=1,
    output_layers={"score": 10},
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ("LlamaForCausalLM",), "labels": None, "output_layers": {"lm_head": 9}}, None),
        ({"vocab_size": 101, "context_length": None}, None),
        ({}, None),
        ({"labels": 2}, "2 labels"),
        ({"architectures": ("BertForMaskedLM",)}, "BertForMaskedLM"),
        (
            {"architectures": ("BertForSequenceClassification",), "output_layers": {"classifier": 9}},
            "decoder",
        ),
        ({"vocab_size": 99}, "99 ids given; the policy has 100"),
        ({"context_length": 63}, "63 positions given; the policy has 64"),
    ],
)
def test_a_value_model_reads_all_that_the_policy_writes(changes: dict[str, Any], words: str | None) -> None:
    value = {"type": "model", "source": {"type": "local", "path": "critic"}}
    spec = raw(method={"type": "lora", "value": value})
    found = issues(spec, Facts(model=MODEL, value=CRITIC.model_copy(update=changes), prompts=1000))

    assert list(found) == ([] if words is None else ["method.value.source"])
    assert words is None or words in found["method.value.source"]


SFT = AdapterFacts(r=8, lora_alpha=16, target_modules=("q_proj",), parameters=160)


@pytest.mark.parametrize(
    ("lora", "ppo", "locs"),
    [
        ({}, {"model_adapter_name": "sft"}, ["method.r", "method.lora_alpha", "method.target_modules"]),
        ({}, {"ref_adapter_name": "sft"}, ["method.r", "method.lora_alpha", "method.target_modules"]),
        ({}, {}, []),  # the trained adapter is a new one
        ({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}, {"ref_adapter_name": "sft"}, []),
        ({"r": 8, "lora_alpha": 16, "target_modules": ["0.q_proj"]}, {"ref_adapter_name": "sft"}, []),
        (
            {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj"]},
            {"model_adapter_name": "sft"},
            ["method.lora_alpha"],
        ),
    ],
)
def test_an_adapter_keeps_its_own_shape(lora: dict[str, Any], ppo: dict[str, Any], locs: list[str]) -> None:
    method = {"type": "lora", "adapters": {"sft": {"type": "local", "path": "sft"}}, **lora}
    found = issues(raw(method=method, ppo=ppo), Facts(model=MODEL, adapters={"sft": SFT}, prompts=1000))

    assert list(found) == locs
    if "method.r" in found:
        assert found["method.r"] == (
            '16 given; the adapter that is trained starts as "sft", which has 8: give that.'
        )


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
    assert facts.output_layers == {"lm_head": WORDS * 16}
    assert facts.tokenizer == TokenizerFacts(pad_token="<pad>", eos_token="</s>", chat_template=False)


def test_the_labels_of_a_classifier_are_those_of_its_head(tmp_path: Path) -> None:
    tiny.save(tiny.reward_model(labels=2), tiny.tokenizer(), tmp_path)

    assert "id2label" not in json.loads((tmp_path / "config.json").read_text())  # two is its default
    assert read_model_facts(tmp_path).labels == 2


def test_the_labels_of_an_encoder_are_those_of_its_head(tmp_path: Path) -> None:
    encoder = tiny.encoder_reward_model()
    encoder.classifier = nn.Linear(encoder.config.hidden_size, 2)
    encoder.config.num_labels = 2
    tiny.save(encoder, tiny.tokenizer(), tmp_path)

    assert "id2label" not in json.loads((tmp_path / "config.json").read_text())
    assert read_model_facts(tmp_path).labels == 2


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no adapter_config.json"),
        ({"adapter_config.json": b'{"peft_type": "IA3"}'}, 'type "IA3"; give a LoRA'),
        (
            {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.bin": b""},
            "no adapter_model.safetensors; save the adapter again as safetensors",
        ),
    ],
)
def test_a_directory_that_is_no_adapter_says_why(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    for name, content in files.items():
        write(tmp_path, name, content)

    with pytest.raises(FactsError, match=words):
        read_adapter_facts(tmp_path)


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


# Adapters and their base -------------------------------------------------------------------------------


def other_base(model: dict[str, str], base: str) -> list[str]:
    """The messages about an adapter whose config names a base, with a model given."""
    method = {"type": "lora", "adapters": {"sft": {"type": "local", "path": "sft"}}}
    adapter = AdapterFacts(base_model=base)
    facts = Facts(model=MODEL, adapters={"sft": adapter}, prompts=1000)
    return [issue.msg for issue in check(parse(raw(model=model, method=method)), facts)]


SNAPSHOT = "/cache/models--meta--Llama-3/snapshots/abc"


@pytest.mark.parametrize(
    ("model", "base", "is_refused"),
    [
        ({"type": "hub", "repo": "meta/Llama-3"}, "meta/Llama-3-Instruct", True),
        ({"type": "hub", "repo": "meta/Llama-3"}, "mirror/llama-3", False),
        ({"type": "hub", "repo": "meta/Llama-3"}, "/home/me/llama", False),
        ({"type": "local", "path": SNAPSHOT}, "meta/Llama-2", True),
        ({"type": "local", "path": SNAPSHOT}, "meta/Llama-3", False),
        ({"type": "local", "path": "/models/mine"}, "meta/Llama-2", False),
    ],
)
def test_an_adapter_that_names_another_base_is_refused(
    model: dict[str, str], base: str, is_refused: bool
) -> None:
    told = other_base(model, base)
    assert [f'names the base "{base}"' in message for message in told] == [True] * is_refused


def test_an_adapter_may_name_a_base_that_a_local_model_is_not_called() -> None:
    method = {"type": "lora", "adapters": {"sft": {"type": "local", "path": "sft"}}}
    spec = parse(raw(model={"type": "local", "path": "/models/mine"}, method=method))
    for base, warned in (("meta/Llama-2", True), ("/home/me/mine", False)):
        facts = Facts(model=MODEL, adapters={"sft": AdapterFacts(base_model=base)}, prompts=1000)
        told = [warning for warning in plan(spec, facts).warnings if "names the base" in warning]
        assert len(told) == warned
        assert not any("/home" in warning for warning in told)
