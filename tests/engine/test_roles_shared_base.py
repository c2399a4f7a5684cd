"""One base under all roles: what is trained whole beside adapters is a copy, and none changes the base."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ppo_engine.__main__ import main
from ppo_engine.adapters import parameters_of
from ppo_engine.checkpoint import CheckpointMismatch
from ppo_engine.facts import FactsError, read_adapter_facts, read_model_facts
from ppo_engine.issues import SpecError
from ppo_engine.load import load, read_facts
from ppo_engine.plan import plan
from ppo_engine.roles import build_policy, facts_of
from ppo_engine.run_dir import RunDir
from ppo_engine.spec import RunSpec, identity, parse
from ppo_engine.trainer import PPOTrainer
from tests.engine import tiny
from tests.engine.test_load import local, spec_of
from tests.engine.test_lora import gpt2
from tests.engine.test_spec import raw
from tests.engine.training import PROMPTS, logged, make_run, trainer

IDS = torch.tensor([[0, 6, 7, 3, 4]])
HEAD = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "modules_to_save": ["lm_head"]}
SMALL = {"r": 2, "target_modules": ["q_proj", "up_proj"]}

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")
TIED = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")  # peft says so to a script


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny.save(tiny.policy(), tiny.tokenizer(), root / "policy")
    tiny.save(tiny.policy(tie_word_embeddings=True), tiny.tokenizer(), root / "tied")
    tiny.save(gpt2(), tiny.tokenizer(), root / "gpt2")
    return root


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def refused(error: type[Exception], *arguments: Any, **changes: Any) -> str:
    with pytest.raises(error) as caught:
        build_policy(*arguments, **changes)
    return str(caught.value)


# Trained whole -----------------------------------------------------------------------------------------


@TIED
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens", "norm"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_reference_keeps_what_is_trained_whole_as_it_was(tmp_path: Path, tied: bool, module: str) -> None:
    model = tiny.policy(tie_word_embeddings=tied)
    before = logits(model.eval())
    whole = LoraConfig(**{**HEAD, "modules_to_save": [module]})
    made = trainer(tmp_path, model=model, peft_config=whole)
    made.train()

    first, *_, last = logged(made, "objective/kl")
    assert first == pytest.approx(0, abs=1e-6)
    assert abs(last) > 1e-6
    with made.null_ref_context():
        assert torch.equal(logits(made.model.policy), before)
    moved = parameters_of(made.model.policy, "default")
    assert any("modules_to_save" in name for name in moved)
    for name, weight in moved.items():
        if "modules_to_save" in name:
            original = made.model.policy.get_parameter(
                name.replace("modules_to_save.default", "original_module")
            )
            assert weight.requires_grad
            assert not torch.equal(weight, original)


def test_an_error_inside_the_reference_leaves_what_is_trained_whole_in_place(tmp_path: Path) -> None:
    made = trainer(tmp_path, peft_config=LoraConfig(**HEAD))
    made.train()
    after = logits(made.model.policy)
    trained = [name for name, weight in made.model.named_parameters() if weight.requires_grad]
    with suppress(OSError), made.null_ref_context():
        made.model.policy.requires_grad_(True)
        made.model.policy.disable_adapter_layers()
        raise OSError("planted")
    assert torch.equal(logits(made.model.policy), after)
    assert [name for name, weight in made.model.named_parameters() if weight.requires_grad] == trained


def test_a_module_that_the_model_lacks_is_named_to_a_script() -> None:
    told = refused(ValueError, tiny.policy(), LoraConfig(**{**HEAD, "modules_to_save": ["lmhead"]}), None)
    assert "modules_to_save names 'lmhead'" in told
    assert '"lm_head"' in told


def test_a_script_resumes_only_what_trains_the_same_modules(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 1, "total_episodes": 16}
    trainer(tmp_path, peft_config=LoraConfig(**HEAD), changes=changes).train()
    other = trainer(tmp_path, changes=changes)
    with pytest.raises(
        CheckpointMismatch, match=r"peft_config.modules_to_save: \['lm_head'\] then, \[\] now"
    ):
        other.train(resume_from_checkpoint=tmp_path / "checkpoint-1")


# In a spec ---------------------------------------------------------------------------------------------


def lora_spec(models: Path, model: str, **lora: Any) -> RunSpec:
    return spec_of(models, model, method={"type": "lora", "r": 3, **lora})


def planned_issues(spec: RunSpec) -> dict[str, str]:
    with pytest.raises(SpecError) as caught:
        plan(spec, read_facts(spec, len(PROMPTS)))
    return {".".join(map(str, issue.loc)): issue.msg for issue in caught.value.issues}


@pytest.mark.parametrize("model", ["policy", "tied", "gpt2"])
@pytest.mark.parametrize(
    ("names", "place", "words"),
    [
        (["lm_head", "lmhead"], "method.modules_to_save.1", ['"lmhead" given', '"lm_head"']),
        (["mlp"], "method.modules_to_save.0", ['"mlp" given', "choose of these"]),
        (
            ["{target}"],
            "method.modules_to_save.0",
            ["target_modules puts an adapter on", "leave it out here"],
        ),
    ],
)
def test_modules_that_cannot_be_trained_whole_are_named_by_the_plan_and_by_the_engine(
    models: Path, model: str, names: list[str], place: str, words: list[str]
) -> None:
    target = "c_fc" if model == "gpt2" else "up_proj"
    spec = lora_spec(models, model, modules_to_save=[name.format(target=target) for name in names])
    found = planned_issues(spec)
    assert list(found) == [place]
    assert all(word in found[place] for word in words), found[place]
    with pytest.raises(SpecError) as caught:  # as where the plan could not see the model
        load(spec)
    assert [".".join(map(str, issue.loc)) for issue in caught.value.issues] == [place]


@pytest.mark.parametrize("module", ["lm_head", "wte", "ln_f"])
def test_tied_layers_may_be_trained_whole(models: Path, module: str) -> None:
    spec = lora_spec(models, "gpt2", modules_to_save=[module])
    policy = load(spec).policy
    trained = sum(weight.numel() for weight in parameters_of(policy, "default").values())
    numbers = plan(spec, read_facts(spec, len(PROMPTS)))
    assert numbers.parameters_trained == trained + 17  # and a value head
    policy.get_submodule("base_model.model." + ("" if module == "lm_head" else "transformer.") + module)


@TIED
def test_facts_of_files_and_of_the_loaded_model_name_the_same_modules(models: Path) -> None:
    for name in ("policy", "tied", "gpt2"):
        stored = read_model_facts(models / name)
        model = AutoModelForCausalLM.from_pretrained(models / name)
        assert facts_of(model).modules == stored.modules
        assert stored.modules["lm_head"] == 16 * 16
        adapted = get_peft_model(
            model, LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"])
        )
        assert facts_of(adapted).modules == stored.modules
        assert facts_of(adapted).linears == stored.linears


def test_what_is_trained_whole_beside_a_half_precision_base_is_fp32(models: Path) -> None:
    spec = spec_of(
        models,
        method={"type": "lora", "r": 3, "modules_to_save": ["lm_head", "norm"]},
        resources={"precision": "bf16"},
    )
    policy = load(spec).policy
    assert {weight.dtype for weight in parameters_of(policy, "default").values()} == {torch.float32}
    assert policy.get_parameter("base_model.model.lm_head.original_module.weight").dtype == torch.bfloat16


def test_the_modules_belong_to_a_run() -> None:
    def known(**lora: Any) -> dict[str, Any]:
        return identity(parse(raw(method={"type": "lora", **lora})))

    assert known(modules_to_save=["lm_head"]) != known()
    assert known(modules_to_save=["lm_head"])["method.modules_to_save.0"] == "lm_head"


def test_an_adapter_starts_and_stays_with_its_own_modules(models: Path, tmp_path: Path) -> None:
    policy = get_peft_model(tiny.policy(), LoraConfig(**HEAD))
    for weight in parameters_of(policy, "default").values():
        nn.init.normal_(weight, std=0.2)
    policy.save_pretrained(tmp_path / "sft", save_embedding_layers=False)
    facts = read_adapter_facts(tmp_path / "sft")
    assert (facts.modules_to_save, facts.whole) == (("lm_head",), 16 * 16)

    method = {
        "type": "lora",
        **HEAD,
        "adapters": {"sft": local(tmp_path / "sft")},
        "value": {"type": "adapter"},
    }
    spec = spec_of(models, method=method, ppo={"ref_adapter_name": "sft"})
    loaded: Any = build_policy(load(spec).policy, None, "default")
    stored = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    assert torch.equal(loaded.base_model.model.lm_head.modules_to_save["default"].weight, stored[HEAD_KEY])
    assert torch.equal(loaded.base_model.model.lm_head.modules_to_save["sft"].weight, stored[HEAD_KEY])
    numbers = plan(spec, read_facts(spec, len(PROMPTS)))
    adapter = sum(weight.numel() for weight in parameters_of(loaded, "default").values())
    assert numbers.parameters_trained == 2 * adapter - 16 * 16 + 17  # the critic has no output layer

    without = {name: value for name, value in method.items() if name != "modules_to_save"}
    found = planned_issues(spec_of(models, method=without, ppo={"ref_adapter_name": "sft"}))
    assert 'starts as "sft", which has ["lm_head"]' in found["method.modules_to_save"]


HEAD_KEY = "base_model.model.lm_head.weight"


@pytest.mark.parametrize("model", ["policy", "tied"])
@pytest.mark.parametrize("merge", [False, True])
def test_a_run_trains_resumes_and_exports_the_output_layer(
    models: Path, tmp_path: Path, model: str, merge: bool
) -> None:
    base = str(models / model)
    method = {"type": "lora", "r": 4, "modules_to_save": ["lm_head"], "merge": merge}
    ppo = {"total_episodes": 48, "save_steps": 1}
    whole = make_run(tmp_path / "whole", models / model, ppo=ppo, method=method)
    assert main([str(whole.path)]) == 0
    kl = [event["data"]["objective/kl"] for event in events(whole) if event["type"] == "metrics"]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert abs(kl[-1]) > 1e-6

    cut = RunDir(tmp_path / "cut")
    shutil.copytree(whole.path, cut.path)
    for path in cut.path.rglob("*-3"):
        shutil.rmtree(path)
    (cut.path / "result.json").unlink()
    assert main([str(cut.path), "--attempt", "2"]) == 0
    file = "model.safetensors" if merge else "adapter_model.safetensors"
    assert (cut.export(3) / file).read_bytes() == (whole.export(3) / file).read_bytes()

    original = AutoModelForCausalLM.from_pretrained(base)
    start = original.lm_head.weight.detach().clone()
    if merge:
        policy: Any = AutoModelForCausalLM.from_pretrained(whole.export(3))
        moved = policy.lm_head.weight
    else:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # peft's, of tied weights
            policy = PeftModel.from_pretrained(original, str(whole.export(3)))
        moved = policy.base_model.model.lm_head.modules_to_save["default"].weight
        assert torch.equal(moved, load_file(whole.export(3) / file)[HEAD_KEY])
    assert not torch.equal(moved, start)
    assert torch.equal(policy.get_input_embeddings().weight, original.get_input_embeddings().weight)
    card = (whole.export(3) / "README.md").read_text()
    assert json.loads(card.split("```json\n")[1].split("```")[0])["method"]["modules_to_save"] == ["lm_head"]


def events(run_dir: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run_dir.events.read_text().splitlines()]


# Adapters that would change the base -------------------------------------------------------------------


CHANGING: list[dict[str, Any]] = [
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "corda"},
    {"init_lora_weights": "lora_ga"},
    {"bias": "all"},
    {"bias": "lora_only"},
]


def told_of(changes: dict[str, Any], text: str) -> bool:
    (field, value), *_ = changes.items()
    return f'{field} "{value}"' in text and "the base without adapters is the reference: give" in text


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'corda'")
@pytest.mark.parametrize("changes", CHANGING, ids=lambda changes: next(iter(changes.values())))
def test_an_adapter_that_changes_the_base_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny.policy(attention_bias=True)
    before = copy.deepcopy(model.state_dict())
    assert told_of(changes, refused(ValueError, model, LoraConfig(**SMALL, **changes), None))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())

    adapted = get_peft_model(tiny.policy(), LoraConfig(**SMALL))
    adapted.save_pretrained(tmp_path)
    for name, value in changes.items():
        setattr(adapted.peft_config["default"], name, value)
    told = refused(ValueError, adapted, None, None)
    assert told_of(changes, told)
    assert "an adapter 'default'" in told

    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**saved, **changes}))
    with pytest.raises(FactsError) as caught:
        read_adapter_facts(tmp_path)
    assert told_of(changes, str(caught.value))


def test_an_adapter_that_changes_the_base_is_refused_at_its_place(models: Path, tmp_path: Path) -> None:
    get_peft_model(tiny.policy(), LoraConfig(**SMALL, init_lora_weights="pissa")).save_pretrained(tmp_path)
    spec = spec_of(models, method={"type": "lora", "adapters": {"sft": local(tmp_path)}})
    for read in (lambda: read_facts(spec, 1), lambda: load(spec)):
        with pytest.raises(SpecError, match='init_lora_weights "pissa"') as caught:
            read()
        assert [issue.loc for issue in caught.value.issues] == [("method", "adapters", "sft")]


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'", "ignore:lora with eva initialization")
def test_an_adapter_that_leaves_the_base_alone_is_allowed(start: bool | str) -> None:
    model = tiny.policy().eval()
    before = logits(model)
    policy: Any = build_policy(model, LoraConfig(**SMALL, init_lora_weights=start), None)
    with policy.disable_adapter():
        assert torch.equal(logits(policy), before)
    if start is not False:  # of all others, the policy starts as the base
        torch.testing.assert_close(logits(policy.eval()), before, rtol=1e-4, atol=1e-4)


def test_an_adapter_may_be_called_as_a_part_of_the_model() -> None:
    policy = build_policy(tiny.policy(), LoraConfig(**HEAD), "model")
    own = parameters_of(policy, "model")
    assert len(own) == 2 * 2 * 7 + 1
    assert all("lora_" in name or "modules_to_save" in name for name in own)
    assert all(policy.get_parameter(name) is weight for name, weight in own.items())


# Another adapter as the reference ----------------------------------------------------------------------


def with_sft(**lora: Any) -> PeftModel:
    model = get_peft_model(tiny.policy(), LoraConfig(**{**HEAD, **lora}), adapter_name="sft")
    torch.manual_seed(3)
    for weight in parameters_of(model, "sft").values():
        nn.init.normal_(weight, std=0.2)
    return model


def made_from_sft(
    directory: Path, model: PeftModel, lora: dict[str, Any], trained: str | None = None
) -> PPOTrainer:
    changes = {"ref_adapter_name": "sft", "model_adapter_name": trained, "total_episodes": 32}
    return trainer(directory, model=model, peft_config=LoraConfig(**lora), changes=changes)


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_a_new_adapter_starts_as_its_reference_and_leaves_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = with_sft(**changes)
    sft = logits(model.eval())
    start = {name: weight.clone() for name, weight in parameters_of(model, "sft").items()}
    made = made_from_sft(tmp_path, model, {**HEAD, **changes})
    torch.testing.assert_close(logits(made.model.policy), sft, rtol=1e-4, atol=1e-4)
    made.train()

    first, second = logged(made, "objective/kl")
    assert first == pytest.approx(0, abs=1e-5)
    assert abs(second) > 1e-6
    assert all(torch.equal(weight, start[name]) for name, weight in parameters_of(model, "sft").items())


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 2},
        {"lora_alpha": 4},
        {"use_rslora": True},
        {"use_dora": True},
        {"target_modules": ["q_proj"]},
        {"modules_to_save": None},
    ],
    ids=str,
)
def test_a_new_adapter_of_another_shape_than_its_reference_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="starts as its reference") as caught:
        made_from_sft(tmp_path, with_sft(), {**HEAD, **changes})
    assert "peft_config=copy.deepcopy(model.peft_config['sft'])" in str(caught.value)


def test_the_fix_that_is_told_is_one(tmp_path: Path) -> None:
    model = with_sft()
    changes = {"ref_adapter_name": "sft"}
    trainer(tmp_path, model=model, peft_config=copy.deepcopy(model.peft_config["sft"]), changes=changes)


def test_an_adapter_cannot_be_trained_and_be_its_own_reference(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the reference must stay"):
        made_from_sft(tmp_path, get_peft_model(tiny.policy(), LoraConfig(**HEAD)), HEAD, "sft")
    changes = {"ref_adapter_name": "sft", "model_adapter_name": "sft"}
    with pytest.raises(ValueError, match="the reference must stay"):
        trainer(tmp_path, model=with_sft(), peft_config=None, changes=changes)
