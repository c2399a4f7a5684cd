"""`PPOConfig`: TRL's names and defaults; each inherited argument is honoured, left to scripts, or refused."""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from ppo_engine import PPOConfig, PPOTrainer
from ppo_engine.hyperparameters import Hyperparameters
from ppo_engine.inherited import FOR_SCRIPTS, HONOURED, refused_arguments
from ppo_engine.issues import SpecError
from tests.engine.training import config

REQUIRED = inspect.Parameter.empty
TRL_CONSTRUCTOR = {
    "args": REQUIRED,
    "processing_class": REQUIRED,
    "model": REQUIRED,
    "ref_model": REQUIRED,
    "reward_model": REQUIRED,
    "train_dataset": REQUIRED,
    "value_model": None,  # required in TRL, which crashes on None; here None is a head on the policy
    "data_collator": None,
    "eval_dataset": None,
    "optimizers": (None, None),
    "callbacks": None,
    "peft_config": None,
}
TRL_DEFAULTS = {
    "learning_rate": 3e-6,
    "logging_steps": 10,
    "gradient_checkpointing": True,
    "bf16": None,
    "dataset_num_proc": None,
    "num_mini_batches": 1,
    "total_episodes": None,
    "local_rollout_forward_batch_size": 64,
    "num_sample_generations": 10,
    "response_length": 53,
    "stop_token": None,
    "stop_token_id": None,
    "temperature": 0.7,
    "missing_eos_penalty": None,
    "sft_model_path": "EleutherAI/pythia-160m",
    "world_size": None,
    "num_total_batches": None,
    "micro_batch_size": None,
    "local_batch_size": None,
    "batch_size": None,
    "local_mini_batch_size": None,
    "mini_batch_size": None,
    "push_to_hub": False,
    "reward_model_path": "EleutherAI/pythia-160m",
    "model_adapter_name": None,
    "ref_adapter_name": None,
    "num_ppo_epochs": 4,
    "whiten_rewards": False,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "cliprange": 0.2,
    "vf_coef": 0.1,
    "cliprange_value": 0.2,
    "gamma": 1.0,
    "lam": 0.95,
    "ds3_gather_for_generation": True,
}
OWN_DEFAULTS = {  # each leaves the algorithm as TRL has it
    "normalize_scores": False,
    "score_scale": 1.0,
    "score_clip": None,
    "kl_placement": "reward",
    "adaptive_kl_target": None,
    "adaptive_kl_horizon": None,
    "early_stop_kl": None,
    "advantage_estimator": "gae",
    "num_return_sequences": 1,
    "whiten_advantages": None,
    "cliprange_high": None,
    "dual_clip": None,
    "loss_aggregation": "token_mean",
    "entropy_coef": 0.0,
    "critic_warmup": 0,
    "critic_learning_rate": None,
    "reward_adapter_name": None,
    "value_adapter": False,
    "overlong_prompts": "refuse",
    "max_prompt_length": None,
}
NO_HYPERPARAMETERS = {"value_adapter", "overlong_prompts", "max_prompt_length"}  # in a spec: method, prompts
FROZEN_HONOURED = """
    activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon bf16
    ddp_backend ddp_timeout deepspeed disable_tqdm
    eval_on_start eval_steps eval_strategy full_determinism gradient_accumulation_steps gradient_checkpointing
    gradient_checkpointing_kwargs greater_is_better hub_model_id hub_private_repo hub_revision hub_strategy
    hub_token learning_rate log_level log_level_replica log_on_each_node logging_first_step logging_steps
    logging_strategy lr_scheduler_kwargs lr_scheduler_type max_grad_norm metric_for_best_model
    num_train_epochs optim optim_args output_dir per_device_eval_batch_size per_device_train_batch_size
    project push_to_hub report_to
    restore_callback_states_from_checkpoint run_name save_steps save_strategy save_total_limit seed tf32
    trackio_bucket_id trackio_space_id trackio_static_space_id use_cpu warmup_steps weight_decay
"""


def test_the_constructor_is_trls_with_one_argument_more() -> None:
    parameters = list(inspect.signature(PPOTrainer.__init__).parameters.values())[1:]

    named = [(parameter.name, parameter.default) for parameter in parameters]
    assert named == [*TRL_CONSTRUCTOR.items(), ("environment", None)]


def test_names_and_defaults_are_trls() -> None:
    own = {field.name: field.default for field in dataclasses.fields(PPOConfig)}

    assert {name: own[name] for name in TRL_DEFAULTS} == TRL_DEFAULTS
    inherited = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    others = own.keys() - TRL_DEFAULTS.keys() - OWN_DEFAULTS.keys()
    assert others <= inherited.keys()
    changed = {
        name
        for name in others - {"include_for_metrics"}  # a factory
        if own[name] != inherited[name]
    }
    assert changed == set()


def test_what_trl_lacks_is_frozen_and_stands_in_a_spec_alike() -> None:
    own = {field.name: field.default for field in dataclasses.fields(PPOConfig)}
    known = {field.name for field in dataclasses.fields(TrainingArguments)} | TRL_DEFAULTS.keys()

    assert {name: value for name, value in own.items() if name not in known} == OWN_DEFAULTS
    for name in OWN_DEFAULTS.keys() - NO_HYPERPARAMETERS:
        assert Hyperparameters.model_fields[name].default == OWN_DEFAULTS[name], name


def test_the_honoured_arguments_are_frozen() -> None:
    assert set(FROZEN_HONOURED.split()) == HONOURED
    assert not HONOURED & FOR_SCRIPTS


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainingArguments)])
def test_every_inherited_argument_is_honoured_or_refused(tmp_path: Path, name: str) -> None:
    args = config(tmp_path)
    if name == "output_dir":
        return  # is where the comparison is made
    vars(args)[name] = "given"
    told = [issue.loc for issue in refused_arguments(args, PPOConfig.__annotations__)]

    is_known = name in HONOURED | FOR_SCRIPTS | set(TRL_DEFAULTS)
    assert told == ([] if is_known else [(name,)])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_steps": 3}, "max_steps: 3 given; PPOTrainer does not honour this argument"),
        ({"eval_accumulation_steps": 3}, "eval_accumulation_steps: 3 given; PPOTrainer does not honour"),
        ({"skip_memory_metrics": False}, "skip_memory_metrics: false given; PPOTrainer does not honour"),
        ({"eval_strategy": "epoch"}, 'eval_strategy: "epoch" given; PPOTrainer honours no, steps'),
        ({"save_strategy": "epoch"}, 'save_strategy: "epoch" given; PPOTrainer honours no, steps'),
        ({"save_strategy": "best"}, 'save_strategy: "best" given; PPOTrainer honours no, steps'),
        ({"logging_strategy": "epoch"}, 'logging_strategy: "epoch" given; PPOTrainer honours no, steps'),
        ({"hub_strategy": "checkpoint"}, 'hub_strategy: "checkpoint" given; PPOTrainer honours every_save'),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
            'lr_scheduler_type: "reduce_lr_on_plateau" given; PPOTrainer honours linear',
        ),
        ({"optim": "lomo"}, 'optim: "lomo" given; PPOTrainer honours adamw_torch'),
    ],
)
def test_what_is_not_honoured_is_refused_with_field_value_and_rule(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError) as caught:
        config(tmp_path, **changes)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"overlong_prompts": "cut"}, "overlong_prompts: \"cut\" given. Input should be 'refuse', 'drop'"),
        ({"max_prompt_length": 0}, "max_prompt_length: 0 given. Input should be greater than or equal to 1"),
        ({"max_prompt_length": "8"}, 'max_prompt_length: "8" given. Input should be a valid integer'),
    ],
)
def test_how_long_prompts_may_be_is_held_to_the_rules_of_a_spec(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError) as caught:
        config(tmp_path, **changes)
    assert words in str(caught.value)


def test_what_only_scripts_read_is_theirs(tmp_path: Path) -> None:
    args = config(tmp_path, do_train=True, resume_from_checkpoint="last", dataset_num_proc=2)

    assert args.resume_from_checkpoint == "last"


@pytest.mark.parametrize(
    ("launched", "bf16", "words"),
    [
        ("bf16", False, 'bf16: false given, and mixed precision "bf16" to accelerate launch'),
        ("fp16", None, 'bf16: null given, and mixed precision "fp16" to accelerate launch'),
        ("fp16", True, 'bf16: true given, and mixed precision "fp16" to accelerate launch'),
        ("FP8", False, 'bf16: false given, and mixed precision "fp8" to accelerate launch'),
    ],
)
def test_a_precision_that_the_launcher_contradicts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: str, bf16: bool | None, words: str
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(SpecError) as caught:
        config(tmp_path, bf16=bf16)
    assert words in str(caught.value)
    assert "ACCELERATE_MIXED_PRECISION" in str(caught.value)


@pytest.mark.parametrize(
    ("launched", "bf16", "settled"),
    [
        ("bf16", None, True),
        ("bf16", True, True),
        ("no", None, False),
        ("no", True, True),
        ("no", False, False),
    ],
)
def test_the_launchers_precision_holds_where_a_script_gives_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: str, bf16: bool | None, settled: bool
) -> None:
    """It says "no" where nobody has told it anything."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    args = config(tmp_path, bf16=bf16)
    assert (args.bf16, args.mixed_precision) == (settled, "bf16" if settled else "no")


LAUNCHED = """
import sys
from pathlib import Path
from tests.engine.training import config
print("bf16 is", config(Path(sys.argv[1]), bf16=None).bf16)
config(Path(sys.argv[1]), bf16=False)
"""


def test_accelerate_launch_says_its_precision_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--mixed_precision", "bf16"]
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path / "output")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "bf16 is True" in done.stdout, done.stderr
    assert 'SpecError: bf16: false given, and mixed precision "bf16" to accelerate launch' in done.stderr
