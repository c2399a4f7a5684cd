"""What a run hands out: an adapter or a merged whole that others load, with its card, and nothing private."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ppo_engine.__main__ import main
from ppo_engine.card import Base, Card, DataSet, model_card
from ppo_engine.run_dir import MANIFEST, RunDir, read_manifest
from ppo_engine.trainer import PPOTrainer
from tests.engine import tiny
from tests.engine.training import PROMPTS, STOP, logged, make_run, trainer

IDS = torch.tensor([[0, 6, 7, 3, 4]])
SHORT = {"total_episodes": 16, "learning_rate": 0.05}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def adapted(lora: dict[str, Any], **changes: Any) -> PeftModel:
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "up_proj"], **lora})
    return get_peft_model(tiny.policy(**changes), config)


def snapshot(policy_dir: Path, root: Path) -> Path:
    """The policy as it lies in the hub's cache."""
    directory = root / "hub" / "models--proxima--tiny-policy" / "snapshots" / COMMIT
    tiny.save(AutoModelForCausalLM.from_pretrained(policy_dir), tiny.tokenizer(), directory)
    return directory


def front_matter(directory: Path) -> dict[str, Any]:
    _, front, _ = (directory / "README.md").read_text().split("---\n", 2)
    read: dict[str, Any] = yaml.safe_load(front)
    return read


# The merged whole --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": "all-linear"},
        {"use_rslora": True, "rank_pattern": {"up_proj": 3}},
        {"use_dora": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "norm"]},
        {"trainable_token_indices": [6, 7]},
    ],
    ids=lambda lora: next(iter(lora)),
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_a_merged_model_computes_as_base_and_adapter_do(
    tmp_path: Path, lora: dict[str, Any], tied: bool
) -> None:
    model = adapted(lora, tie_word_embeddings=tied)
    made = trainer(tmp_path, model=model, peft_config=None, changes={**SHORT, "value_adapter": True})
    made.train()
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in made.model.named_parameters()}
    made.save_merged_model(str(tmp_path / "merged"))

    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name in load_file(tmp_path / "merged" / "model.safetensors"))
    with torch.no_grad():
        merged, own = whole(IDS).logits, made.model.policy(IDS).logits
        with made.null_ref_context():
            base = made.model.policy(IDS).logits
    torch.testing.assert_close(merged, own, rtol=1e-4, atol=1e-4)
    assert (own - base).abs().max() > 0.1
    for name, weight in made.model.named_parameters():
        place, value = before[name]
        assert weight.data_ptr() == place
        assert torch.equal(weight, value)


def test_a_merge_that_fails_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    made = trainer(tmp_path, changes=SHORT)
    with torch.no_grad():
        made.model.policy.get_parameter(
            "base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"
        ).fill_(float("nan"))
    before = {name: weight.clone() for name, weight in made.model.named_parameters()}
    with pytest.raises(ValueError, match="NaNs detected"):
        made.save_merged_model(str(tmp_path / "merged"))
    for name, weight in made.model.named_parameters():
        assert torch.equal(weight.nan_to_num(), before[name].nan_to_num())
    assert not any(getattr(module, "merged", False) for module in made.model.policy.modules())


def test_full_fine_tuning_has_a_whole_model_either_way(tmp_path: Path) -> None:
    made = trainer(tmp_path, lora=False, changes=SHORT)
    made.save_model(str(tmp_path / "one"))
    made.save_merged_model(str(tmp_path / "other"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


# Names -------------------------------------------------------------------------------------------------


def of_script(model: Any, directory: Path) -> PPOTrainer:
    made = trainer(directory / "run", model=model, changes=SHORT)
    made.save_model(str(directory / "out"))
    return made


def test_an_adapter_names_its_base_with_its_revision(tmp_path: Path, policy_dir: Path) -> None:
    of_script(AutoModelForCausalLM.from_pretrained(snapshot(policy_dir, tmp_path)), tmp_path)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("proxima/tiny-policy", COMMIT)
    assert front_matter(tmp_path / "out")["base_model"] == "proxima/tiny-policy"
    assert f"revision='{COMMIT}'" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_that_began_elsewhere_names_the_model_it_is_for(tmp_path: Path, policy_dir: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(policy_dir)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = "/home/me/secret/base"
    made = trainer(tmp_path / "run", model=model, peft_config=None, changes=SHORT)
    made.save_model(str(tmp_path / "out"))
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == policy_dir.name
    assert_nothing_private(tmp_path / "out", "/home/me", str(policy_dir.parent))


def assert_nothing_private(directory: Path, *private: str) -> None:
    for path in directory.rglob("*"):
        for text in private:
            assert text.encode() not in path.read_bytes(), f"{path.name} tells {text}"


# What is in it -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory: pytest.TempPathFactory, policy_dir: Path) -> RunDir:
    return ran(tmp_path_factory.mktemp("adapter"), policy_dir, merge=False)


@pytest.fixture(scope="module")
def merged_run(tmp_path_factory: pytest.TempPathFactory, policy_dir: Path) -> RunDir:
    return ran(tmp_path_factory.mktemp("merged"), policy_dir, merge=True)


def ran(directory: Path, policy_dir: Path, *, merge: bool) -> RunDir:
    """A run whose value, reward, and reference are adapters that lie in a private place."""
    judge = tiny.save_judge(directory / "private" / "judge")
    adapted({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}).save_pretrained(
        str(directory / "private" / "sft")
    )
    adapters = {"judge": judge, "sft": directory / "private" / "sft"}
    method = {
        "type": "lora",
        "r": 4,
        "lora_alpha": 8,
        "merge": merge,
        "value": {"type": "adapter"},
        "adapters": {name: {"type": "local", "path": str(path)} for name, path in adapters.items()},
    }
    ppo = {
        "total_episodes": 32,
        "save_steps": 1,
        "eval_steps": 1,
        "reward_adapter_name": "judge",
        "ref_adapter_name": "sft",
        "model_adapter_name": "tuned",
    }
    rewards = [{"type": "adapter", "name": "taste", "weight": 0.5}]
    prompts = {"train": "file_1", "eval": "file_2"}
    run_dir = make_run(
        directory / "run", policy_dir, ppo=ppo, method=method, rewards=rewards, prompts=prompts
    )
    run_dir.data("file_2").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS[:4]))
    assert main([str(run_dir.path)]) == 0
    return run_dir


THE_REST = ["README.md", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


def test_an_export_is_the_policy_alone(adapter_run: RunDir, merged_run: RunDir) -> None:
    for run_dir, own in (
        (adapter_run, ["adapter_config.json", "adapter_model.safetensors"]),
        (merged_run, ["config.json", "model.safetensors"]),
    ):
        manifest = read_manifest(run_dir.export(2))
        assert manifest is not None
        names = sorted([*own, *THE_REST])
        assert [file.name for file in manifest.files] == names
        assert sorted(path.name for path in run_dir.export(2).iterdir()) == sorted([*names, MANIFEST])
    weights = load_file(adapter_run.export(2) / "adapter_model.safetensors")
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in weights)
    assert len(weights) == 2 * 2 * 7  # A and B of seven modules in two layers
    assert {weight.shape[0] for name, weight in weights.items() if "lora_A" in name} == {4}


def test_an_adapter_and_the_merged_model_are_the_same_policy(
    adapter_run: RunDir, merged_run: RunDir, policy_dir: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(policy_dir)
    policy = PeftModel.from_pretrained(base, str(adapter_run.export(2)))
    whole = AutoModelForCausalLM.from_pretrained(merged_run.export(2))
    torch.testing.assert_close(whole(IDS).logits, policy(IDS).logits, rtol=1e-4, atol=1e-4)


def test_tokenizer_and_stop_token_come_along(adapter_run: RunDir, merged_run: RunDir) -> None:
    for run_dir in (adapter_run, merged_run):
        tokenizer = AutoTokenizer.from_pretrained(run_dir.export(2))
        assert tokenizer("one ten")["input_ids"] == [0, 6, STOP]
        assert GenerationConfig.from_pretrained(run_dir.export(2)).eos_token_id == STOP


def test_no_private_path_is_told(adapter_run: RunDir, merged_run: RunDir, policy_dir: Path) -> None:
    for run_dir in (adapter_run, merged_run):
        assert_nothing_private(
            run_dir.export(2), str(policy_dir.parent), str(run_dir.path.parent), "private", "/me"
        )


def test_a_base_beside_the_adapter_is_all_that_peft_needs(
    adapter_run: RunDir, policy_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(policy_dir.parent)
    policy = AutoPeftModelForCausalLM.from_pretrained(str(adapter_run.export(2)))
    assert torch.isfinite(policy(IDS).logits).all()


def test_the_card_tells_spec_data_rewards_and_results(adapter_run: RunDir, merged_run: RunDir) -> None:
    said = [json.loads(line) for line in adapter_run.events.read_text().splitlines()]
    metrics = [event["data"] for event in said if event["type"] == "metrics"][-1]
    evaluated = [event["data"] for event in said if event["type"] == "evaluation"][-1]
    text = (adapter_run.export(2) / "README.md").read_text()

    assert "after update 2 of 2" in text
    assert "| train_dataset | 100 | " in text
    assert "| eval_dataset | 4 | " in text
    assert "| taste | 0.5 |" in text
    assert f"| objective/kl | {metrics['objective/kl']:.6g} |" in text
    assert f"| eval/scores | {evaluated['eval/scores']:.6g} |" in text
    assert "time/" not in text
    spec = json.loads(text.split("```json\n")[1].split("```")[0])
    assert spec["ppo"]["response_length"] == 8
    assert spec["method"]["adapters"]["judge"]["path"] == "judge"

    assert front_matter(adapter_run.export(2))["library_name"] == "peft"
    assert front_matter(merged_run.export(2))["library_name"] == "transformers"
    for run_dir in (adapter_run, merged_run):
        front = front_matter(run_dir.export(2))
        assert front["base_model"] == adapter_run.read_spec().model.path.rsplit("/", 1)[-1]  # type: ignore[union-attr]
        assert {"ppo", "text-generation"} <= set(front["tags"])


def test_a_scripts_card_tells_its_arguments(tmp_path: Path) -> None:
    made = of_script(tiny.policy(), tmp_path)
    made.train()
    made.create_model_card(tags=["mine", "ppo"], license="mit")
    text = (tmp_path / "run" / "README.md").read_text()
    given = json.loads(text.split("```json\n")[1].split("```")[0])
    assert (given["learning_rate"], given["precision"]) == (0.05, "fp32")
    assert f"| objective/scores | {logged(made, 'objective/scores')[0]:.6g} |" in text
    front = front_matter(tmp_path / "run")
    assert front["license"] == "mit"
    assert front["tags"].count("ppo") == 1
    assert "mine" in front["tags"]
    assert "None yet" in (tmp_path / "out" / "README.md").read_text()


def test_names_that_are_no_names_spoil_neither_yaml_nor_tables() -> None:
    card = Card(
        base=Base("my model: 'x'\n---", None),
        settings_name="Spec",
        settings={"a": "```"},
        data=(DataSet("train", 3, "ab"),),
        rewards={"a|b\nc": 1.0},
        update=1,
        updates=2,
        results={},
    )
    _, front, body = model_card(card, is_adapter=True).split("---\n", 2)
    assert "base_model" not in yaml.safe_load(front)
    assert "| a\\|b c | 1 |" in body
