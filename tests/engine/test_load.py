"""What a spec names, loaded: it is as large as was planned; bad files are refused by their place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from ppo_engine.__main__ import main
from ppo_engine.actor_critic import ActorCritic
from ppo_engine.adapters import parameters_of
from ppo_engine.load import load, read_facts
from ppo_engine.plan import Plan, plan
from ppo_engine.rewards import ModelReward, build
from ppo_engine.roles import add_value_adapter, build_policy, frozen_copy
from ppo_engine.run_dir import Result, RunDir
from ppo_engine.spec import RunSpec, ValueAdapter, parse
from ppo_engine.spec import critic as critic_of
from tests.engine import tiny
from tests.engine.test_spec import raw
from tests.engine.training import PROMPTS, make_run

HALF = {"precision": "bf16"}


def local(path: Path | str) -> dict[str, str]:
    return {"type": "local", "path": str(path)}


def save_adapter(directory: Path, name: str = "default", **changes: Any) -> Path:
    """An adapter of rank 2 on two kinds of modules, trained a little."""
    lora = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], **changes}
    policy = get_peft_model(tiny.policy(), LoraConfig(**lora))
    for weight in (weight for name, weight in policy.named_parameters() if "lora_B" in name):
        nn.init.normal_(weight)
    policy.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny.save(tiny.policy(), tiny.tokenizer(), root / "policy")
    tiny.save(tiny.policy(tie_word_embeddings=True), tiny.tokenizer(), root / "tied")
    tiny.save(tiny.policy(hidden_size=32), tiny.tokenizer(), root / "wide")
    tiny.save(tiny.reward_model(), tiny.tokenizer(), root / "critic")
    save_adapter(root / "sft")
    tiny.save_judge(root / "taste")
    return root


def spec_of(models: Path, model: str = "policy", ppo: dict[str, Any] | None = None, **parts: Any) -> RunSpec:
    return parse(raw(model=local(models / model), ppo={"response_length": 8, **(ppo or {})}, **parts))


def planned(spec: RunSpec) -> Plan:
    return plan(spec, read_facts(spec, len(PROMPTS)))


def built(spec: RunSpec) -> ActorCritic:
    """The trained module as the trainer makes it."""
    loaded = load(spec)
    name = spec.ppo.model_adapter_name or "default"
    policy = build_policy(loaded.policy, None, name)
    has_own = isinstance(critic_of(spec), ValueAdapter)
    return ActorCritic(
        policy,
        loaded.value_model,
        value_head=True,
        value_adapter=add_value_adapter(policy, name) if has_own else None,
    )


def trained(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.requires_grad)


def size(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("policy", {"type": "lora", "r": 3}),
        ("policy", {"type": "lora", "r": 3, "target_modules": ["q_proj"]}),
        ("policy", {"type": "lora", "r": 3, "value": {"type": "model"}}),
        ("policy", {"type": "lora", "value": {"type": "model", "source": "wide"}}),
        ("policy", {"type": "lora", "adapters": {"sft": "sft"}}),
        ("policy", {"type": "full"}),
        ("tied", {"type": "full"}),
        ("policy", {"type": "full", "value": {"type": "head"}}),
        ("policy", {"type": "full", "value": {"type": "model", "source": "critic"}}),
    ],
)
def test_what_is_planned_is_what_is_there(
    models: Path, model: str, method: dict[str, Any], precision: str
) -> None:
    spec = spec_of(models, model, method=placed(method, models), resources={"precision": precision})
    numbers, module = planned(spec), built(spec)

    assert numbers.parameters_trained == trained(module)
    assert numbers.memory is not None
    assert numbers.memory["policy"] == size(module.policy)
    assert numbers.memory["value"] == size(module.value_model or module.value_head or nn.Module())
    assert numbers.memory["optimizer"] == 2 * 4 * trained(module)
    is_full = method["type"] == "full"
    assert numbers.memory["reference"] == (size(frozen_copy(module.policy)) if is_full else 0)


def placed(part: Any, models: Path) -> Any:
    """With every model given by its name in the fixture."""
    if isinstance(part, dict):
        adapters = {name: local(models / path) for name, path in part.get("adapters", {}).items()}
        source = {"source": local(models / part["source"])} if "source" in part else {}
        rest = {name: placed(value, models) for name, value in part.items()}
        return {**rest, **({"adapters": adapters} if adapters else {}), **source}
    return part


def test_an_adapter_that_is_trained_further_counts_as_it_is(models: Path) -> None:
    method = {"r": 2, "lora_alpha": 6, "target_modules": ["up_proj", "q_proj"]}
    method = {**method, "type": "lora", "adapters": {"sft": local(models / "sft")}}
    for ppo in ({"model_adapter_name": "sft"}, {"ref_adapter_name": "sft"}):
        spec = spec_of(models, method=method, ppo=ppo)
        numbers, module = planned(spec), built(spec)
        assert numbers.parameters_trained == trained(module)
        assert numbers.memory is not None
        assert numbers.memory["policy"] == size(module.policy)


@pytest.mark.parametrize("start", ["new", "sft"])
def test_adapters_on_one_base_count_by_their_roles(models: Path, start: str) -> None:
    method = {"type": "lora", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
    method = {**method, "value": {"type": "adapter"}, "adapters": {"taste": "taste", "sft": "sft"}}
    ppo = {"reward_adapter_name": "taste"} | ({"ref_adapter_name": "sft"} if start == "sft" else {})
    rewards = [{"type": "adapter", "name": "taste"}]
    spec = spec_of(models, method=placed(method, models), ppo=ppo, rewards=rewards, resources=HALF)
    numbers, module = planned(spec), built(spec)

    assert numbers.parameters_trained == trained(module)
    memory = numbers.memory
    assert memory is not None
    of_judge = sum(weight.nbytes for weight in parameters_of(module, "taste").values())
    of_critic = sum(weight.nbytes for weight in module.critic_parameters())
    assert (memory["reward"], memory["value"], memory["reference"]) == (of_judge, of_critic, 0)
    assert memory["policy"] + memory["reward"] + memory["value"] == size(module)


def test_a_snapshot_of_the_hub_is_known_by_its_name_and_commit(models: Path, tmp_path: Path) -> None:
    place = tmp_path / "models--proxima--tiny" / "snapshots" / "c0ffee"
    tiny.save(tiny.policy(), tiny.tokenizer(), place)
    policy = load(parse(raw(model=local(place), ppo={"response_length": 8}))).policy
    assert isinstance(policy, PeftModel)
    base = policy.get_base_model()
    assert (base.name_or_path, base.config._commit_hash) == ("proxima/tiny", "c0ffee")


def test_a_reward_model_counts_as_it_is_loaded(models: Path) -> None:
    rewards = [{"type": "model", "name": "judge", "source": local(models / "critic")}]
    spec = spec_of(models, rewards=rewards, resources=HALF)
    reward = build(spec.rewards).rewards[0].reward

    assert isinstance(reward, ModelReward)
    memory = planned(spec).memory
    assert memory is not None
    assert memory["reward"] == size(reward.model)


def test_the_trained_adapter_starts_as_the_one_it_is_named_after(models: Path) -> None:
    method = {"type": "lora", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
    method = {**method, "adapters": {"sft": local(models / "sft")}}
    policy = built(spec_of(models, method=method, ppo={"ref_adapter_name": "sft"})).policy

    assert isinstance(policy, PeftModel)
    stored = load_file(models / "sft" / "adapter_model.safetensors")
    weights = dict(policy.named_parameters())
    for name, weight in stored.items():
        for adapter in ("default", "sft"):
            assert torch.equal(weights[name.replace(".weight", f".{adapter}.weight")], weight)


# What cannot be loaded ---------------------------------------------------------------------------------


def refusal(run_dir: RunDir) -> Result:
    main([str(run_dir.path)])
    result = run_dir.read_result()
    assert result is not None
    return result


def damage_policy(change: Callable[[Path], object]) -> Callable[[Path], dict[str, Any]]:
    def spec(directory: Path) -> dict[str, Any]:
        tiny.save(tiny.policy(), tiny.tokenizer(), directory / "model")
        change(directory / "model")
        return {"model": local(directory / "model")}

    return spec


def cut_off(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def disagree(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))


def deepen(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))


def garble(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0"')


def critic(model: nn.Module) -> Callable[[Path], dict[str, Any]]:
    def spec(directory: Path) -> dict[str, Any]:
        path = tiny.save(model, tiny.tokenizer(), directory / "critic")
        return {"method": {"type": "lora", "value": {"type": "model", "source": local(path)}}}

    return spec


def judge(change: Callable[[Path], object]) -> Callable[[Path], dict[str, Any]]:
    def spec(directory: Path) -> dict[str, Any]:
        tiny.save(tiny.reward_model(), tiny.tokenizer(), directory / "judge")
        change(directory / "judge")
        return {"rewards": [{"type": "model", "name": "judge", "source": local(directory / "judge")}]}

    return spec


def unpad(model: Path) -> None:
    for name, field in (("config.json", "pad_token_id"), ("tokenizer_config.json", "pad_token")):
        config = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**config, field: None}))


def adapter(
    change: Callable[[Path], object] = lambda path: None,
    ppo: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    **method: Any,
) -> Callable[[Path], dict[str, Any]]:
    def spec(directory: Path) -> dict[str, Any]:
        path = save_adapter(directory / "sft", **(lora or {}))
        change(path)
        named = {"type": "lora", "adapters": {"sft": local(path)}, **method}
        return {"method": named, "ppo_changes": ppo or {"model_adapter_name": "sft"}}

    return spec


def taste(
    change: Callable[[Path], object] = lambda path: None, role: str | None = "reward", **policy: Any
) -> Callable[[Path], dict[str, Any]]:
    """A reward adapter; with changes to the policy, trained on another; named in a role, or in none."""

    def spec(directory: Path) -> dict[str, Any]:
        path = tiny.save_judge(directory / "taste", **policy)
        change(path)
        named = {"method": {"type": "lora", "adapters": {"taste": local(path)}}}
        if role == "reward":
            ppo = {"reward_adapter_name": "taste"}
            return {**named, "rewards": [{"type": "adapter", "name": "taste"}], "ppo_changes": ppo}
        return {**named, "ppo_changes": {} if role is None else {role: "taste"}}

    return spec


def behead(path: Path) -> None:
    keep(path, lambda name: "score" not in name)


def keep(path: Path, is_kept: Callable[[str], bool]) -> None:
    weights = load_file(path / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if is_kept(name)}
    save_file(kept, path / "adapter_model.safetensors")


def two_labels(path: Path) -> None:
    weights = load_file(path / "adapter_model.safetensors")
    head = weights["base_model.model.score.weight"]
    weights["base_model.model.score.weight"] = head.repeat(2, 1)
    save_file(weights, path / "adapter_model.safetensors")


def pickle(path: Path) -> None:
    weights = load_file(path / "adapter_model.safetensors")
    (path / "adapter_model.safetensors").unlink()
    torch.save(weights, path / "adapter_model.bin")


def shallow(path: Path) -> None:
    """Weights of the first layer only."""
    keep(path, lambda name: ".layers.0." in name)


SFT = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
SOURCE = ("method", "value", "source")
TASTE = ("method", "adapters", "taste")


@pytest.mark.parametrize(
    ("make", "loc", "words"),
    [
        (damage_policy(cut_off), ("model",), "model.safetensors is cut off"),
        (damage_policy(disagree), ("model",), "cannot be loaded"),
        (damage_policy(deepen), ("model",), "lacks the weights"),
        (damage_policy(garble), ("model",), "cannot be loaded"),
        (critic(tiny.reward_model(labels=2)), SOURCE, "2 labels"),
        (critic(tiny.encoder_reward_model()), SOURCE, "give a decoder"),
        (critic(tiny.reward_model(vocab_size=10)), SOURCE, "10 ids given; the policy has 16"),
        (critic(tiny.policy(max_position_embeddings=16)), SOURCE, "16 positions given; the policy has 32"),
        (judge(cut_off), ("rewards", 0, "source"), "model.safetensors is cut off"),
        (judge(garble), ("rewards", 0, "source"), "cannot be loaded"),
        (adapter(pickle, **SFT), ("method", "adapters", "sft"), "no adapter_model.safetensors"),
        (taste(behead), TASTE, "without a score head given, and reward_adapter_name names it"),
        (taste(two_labels), TASTE, "2 labels given"),
        (taste(hidden_size=32), TASTE, 'for another base (its config names "tiny-policy")'),
        (taste(num_hidden_layers=3), TASTE, "the model has no such module: it was trained for another base"),
        (taste(shallow), TASTE, "without a score head given"),
        (taste(lambda path: keep(path, lambda name: ".layers.1." not in name)), TASTE, "not made for it"),
        (taste(role=None), TASTE, "which makes it a reward"),
        (judge(unpad), ("rewards", 0, "source"), "without a padding token given; set pad_token"),
        (adapter(shallow, **SFT), ("method", "adapters", "sft"), "not made for it"),
        (
            adapter(**{**SFT, "r": 16}),
            ("method", "r"),
            '16 given; the adapter that is trained starts as "sft"',
        ),
        (adapter(**{**SFT, "lora_alpha": 2}), ("method", "lora_alpha"), "which has 6"),
        (
            adapter(**{**SFT, "target_modules": "all-linear"}),
            ("method", "target_modules"),
            'which has ["q_proj", "up_proj"]',
        ),
        (adapter(ppo={"ref_adapter_name": "sft"}, **{**SFT, "r": 16}), ("method", "r"), "which has 2"),
    ],
)
def test_bad_files_are_refused_by_their_place(
    tmp_path: Path, policy_dir: Path, make: Callable[[Path], dict[str, Any]], loc: tuple[Any, ...], words: str
) -> None:
    changes = make(tmp_path)
    ppo = changes.pop("ppo_changes", {})
    result = refusal(make_run(tmp_path / "run", policy_dir, ppo=ppo, **changes))

    assert (result.outcome, result.reason) == ("failed", "spec"), result
    assert [issue.loc for issue in result.issues] == [loc]
    assert words in result.issues[0].msg


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "one"', "Line 2 is not JSON"),
        (b'["one"]', 'Line 2 holds ["one"]; each line is a JSON object'),
        (b'{"prompt": "\xff"}', "Line 2 is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, policy_dir: Path, line: bytes, words: str) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir)
    run_dir.data("file_1").write_bytes(b'{"prompt": "one"}\n' + line + b"\n")
    result = refusal(run_dir)

    assert (result.outcome, result.reason) == ("failed", "spec"), result
    assert [issue.loc for issue in result.issues] == [("prompts", "train")]
    assert words in result.issues[0].msg
