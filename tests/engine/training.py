"""Small trainers and small run directories, for tests that train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import LlamaForSequenceClassification

from ppo_engine import PPOConfig, PPOTrainer
from ppo_engine.rewards import RewardBatch
from ppo_engine.run_dir import RunDir
from tests.engine import tiny

PROMPTS = [
    {"prompt": f"{first} {second}", "first": first} for first in tiny.WORDS[6:] for second in tiny.WORDS[6:]
]
STOP = tiny.WORDS.index("ten")
GOOD = tiny.WORDS.index("seven")


def likes_seven(batch: RewardBatch) -> list[float]:
    """The share of response tokens that are "seven"."""
    return [ids.count(GOOD) / len(ids) for ids in batch.response_ids]


def value_model() -> LlamaForSequenceClassification:
    model = tiny.reward_model()
    torch.nn.init.zeros_(model.score.weight)
    return model


def config(output_dir: Path, **changes: Any) -> PPOConfig:
    return PPOConfig(
        **{
            "output_dir": str(output_dir),
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
            "num_mini_batches": 2,
            "num_ppo_epochs": 2,
            "total_episodes": 48,
            "response_length": 8,
            "stop_token_id": STOP,
            "learning_rate": 3e-3,
            "temperature": 1.0,
            "num_sample_generations": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            **changes,
        }
    )


def trainer(
    output_dir: Path, *, lora: bool = True, changes: dict[str, Any] | None = None, **given: Any
) -> PPOTrainer:
    """A trainer of a tiny policy; `changes` go to its config, all else to its constructor."""
    return PPOTrainer(
        **{
            "args": config(output_dir, **(changes or {})),
            "processing_class": tiny.tokenizer(),
            "model": tiny.policy(),
            "ref_model": None,
            "reward_model": likes_seven,
            "train_dataset": PROMPTS,
            "value_model": None if lora else value_model(),
            "peft_config": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear") if lora else None,
            **given,
        }
    )


def logged(trained: PPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trained.state.log_history if name in entry]


def make_run(
    directory: Path, policy_dir: Path, *, ppo: dict[str, Any] | None = None, **changes: Any
) -> RunDir:
    """A run directory of six updates with a checkpoint every second one."""
    run_dir = RunDir(directory)
    run_dir.data_dir.mkdir(parents=True)
    spec = {
        "model": {"type": "local", "path": str(policy_dir)},
        "prompts": {"train": "file_1"},
        "method": {"type": "lora", "r": 4},
        "rewards": [{"type": "regex", "name": "seven", "pattern": "seven"}],
        "ppo": {
            "total_episodes": 96,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
            "num_mini_batches": 2,
            "num_ppo_epochs": 2,
            "response_length": 8,
            "stop_token_id": STOP,
            "learning_rate": 3e-3,
            "temperature": 1.0,
            "save_steps": 2,
            **(ppo or {}),
        },
        **changes,
    }
    run_dir.spec.write_text(json.dumps(spec))
    run_dir.data("file_1").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return run_dir
