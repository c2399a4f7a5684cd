"""A script of TRL's kind, end to end from the command line: full fine-tuning and LoRA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from ppo_engine import PPOConfig
from tests.engine import tiny
from tests.engine.training import PROMPTS

ROOT = Path(__file__).parents[2]


@dataclass
class Ran:
    """What a run of the script left."""

    output: str
    directory: Path

    @property
    def log(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.directory / "log.json").read_text())
        return found

    @property
    def pushes(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "pushes.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, a policy, and a reward model, as directories."""
    root = tmp_path_factory.mktemp("places")
    tiny.save(tiny.policy(), tiny.tokenizer(), root / "policy")
    tiny.save(tiny.reward_model(), tiny.tokenizer(), root / "reward")
    (root / "prompts").mkdir()
    (root / "prompts" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS[:60]))
    return root


def run(places: Path, name: str, *words: str) -> Ran:
    directory = places / name
    arguments = {
        "dataset_name": places / "prompts",
        "output_dir": directory,
        "model_name_or_path": places / "policy",
        "sft_model_path": places / "policy",
        "reward_model_path": places / "reward",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "total_episodes": 24,
        "response_length": 8,
        "local_rollout_forward_batch_size": 3,
        "missing_eos_penalty": 1.0,
        "logging_steps": 1,
        "report_to": "none",
    }
    given = [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.trl_script", *given, "--push_to_hub", *words],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(places / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return Ran(done.stdout, directory)


@pytest.fixture(scope="module")
def full(places: Path) -> Ran:
    return run(places, "full", "--stop_token", "eos", "--kl_estimator", "k3", "--whiten_rewards")


@pytest.fixture(scope="module")
def lora(places: Path) -> Ran:
    return run(places, "lora", "--use_peft", "--lora_r", "2")


def test_a_full_run_trains_saves_and_pushes(full: Ran, places: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(places / "policy").state_dict()
    after = AutoModelForCausalLM.from_pretrained(full.directory).state_dict()

    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(full.directory).pad_token == "[PAD]"
    assert [entry["objective/kl"] >= 0 for entry in full.log] == [True] * 3
    assert not full.directory.joinpath("adapter_config.json").exists()


def test_a_lora_run_saves_the_adapter_alone(lora: Ran, places: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(places / "policy")
    policy = PeftModel.from_pretrained(base, str(lora.directory))

    assert any(bool(weight.any()) for name, weight in policy.named_parameters() if "lora_B" in name)
    assert not lora.directory.joinpath("model.safetensors").exists()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_push_holds_the_policy_and_names_the_data(kind: str, request: pytest.FixtureRequest) -> None:
    ran: Ran = request.getfixturevalue(kind)
    last = ran.pushes[-1]

    assert last["repo"] == f"somebody/{kind}"
    assert last["message"] == "End of training"
    assert "datasets: somebody/prompts" in last["card"].split("---")[1]
    weights = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    assert {weights, "tokenizer.json", "README.md"} <= set(last["files"])


def test_without_a_stop_token_responses_go_on_and_pay_for_a_missing_eos(lora: Ran) -> None:
    """Neither command in TRL's example gives one."""
    for entry in lora.log:
        assert entry["response/length"] == 8
        penalty = entry["reward/model"] - entry["objective/scores"]
        assert penalty == pytest.approx(1 - entry["response/finished"])
        assert 0 < entry["response/finished"] < 1


def test_completions_of_what_was_held_out_are_shown(full: Ran) -> None:
    shown = [line for line in full.output.splitlines() if " -> " in line]

    assert len(shown) == 5 * 4  # at each of three updates, and at the end
    held_out = {row["prompt"] for row in PROMPTS[50:60]}
    assert all(any(f"'{prompt}' ->" in line for prompt in held_out) for line in shown)


# The command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--missing_eos_penalty 1.0", "missing_eos_penalty", 1.0),
        ("--stop_token eos", "stop_token", "eos"),
        ("--stop_token_id 0", "stop_token_id", 0),
        ("--kl_estimator k3", "kl_estimator", "k3"),
        ("--kl_placement loss --kl_estimator k2", "kl_placement", "loss"),
        ("--whiten_rewards", "whiten_rewards", True),
        ("--whiten_advantages false", "whiten_advantages", False),
        ("--no_ds3_gather_for_generation", "ds3_gather_for_generation", False),
        ("--ds3_gather_for_generation false", "ds3_gather_for_generation", False),
        ("--gradient_checkpointing false", "gradient_checkpointing", False),
        ("--adaptive_kl_target 6", "adaptive_kl_target", 6.0),
        ("--early_stop_kl 0.02", "early_stop_kl", 0.02),
        ("--normalize_scores --score_clip 5", "score_clip", 5.0),
        ("--cliprange_high 0.28", "cliprange_high", 0.28),
        ("--dual_clip 3", "dual_clip", 3.0),
        ("--loss_aggregation sequence_mean", "loss_aggregation", "sequence_mean"),
        ("--critic_learning_rate 1e-4", "critic_learning_rate", 1e-4),
        ("--advantage_estimator rloo --num_return_sequences 4", "num_return_sequences", 4),
        ("--reward_adapter_name judge", "reward_adapter_name", "judge"),
        ("--value_adapter", "value_adapter", True),
        ("--dataset_num_proc 2", "dataset_num_proc", 2),
        ("--logging_steps 0.1", "logging_steps", 0.1),
        ("--per_device_eval_batch_size 2", "per_device_eval_batch_size", 2),
    ],
)
def test_arguments_are_read_from_the_command_line(
    tmp_path: Path, words: str, name: str, value: object
) -> None:
    given = ["--output_dir", str(tmp_path), "--report_to", "none", *words.split()]
    (args,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(given)

    assert getattr(args, name) == value


def test_every_argument_of_ours_explains_itself() -> None:
    text = " ".join(HfArgumentParser(PPOConfig).format_help().split())

    for name in vars(PPOConfig)["__annotations__"]:
        if name != "given_world_size":
            explained = PPOConfig.__dataclass_fields__[name].metadata["help"]
            assert " ".join(explained.split()) in text, name
