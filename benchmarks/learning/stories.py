"""Happier stories at a KL budget: a small story model, a sentiment lexicon, with and without adaptive KL."""

import json
from pathlib import Path
from typing import Any

from happy_stories import happiness
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.learning.curve import PLAIN, Curve
from ppo_engine import PPOConfig, PPOTrainer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "stories"
BATCH, UPDATES = 64, 40
KL_BUDGET = 6.0
VARIANTS: dict[str, dict[str, Any]] = {
    "no KL": {"kl_coef": 0.0},
    "fixed KL": {"kl_coef": 0.02},
    f"adaptive KL, target {KL_BUDGET:g}": {
        "kl_coef": 0.02,
        "adaptive_kl_target": KL_BUDGET,
        "adaptive_kl_horizon": 100.0,
    },
}


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLE / name).read_text().splitlines()]


def run(variant: str, seed: int, model: Path, output: Path) -> Curve:
    """One run; the final score is of held-out prompts."""
    args = PPOConfig(
        output_dir=str(output),
        seed=seed,
        total_episodes=BATCH * UPDATES,
        per_device_train_batch_size=BATCH,
        response_length=48,
        stop_token_id=1,
        temperature=1.0,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        **PLAIN,
        **VARIANTS[variant],
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=AutoTokenizer.from_pretrained(model),
        model=AutoModelForCausalLM.from_pretrained(model),
        ref_model=None,
        reward_model=happiness(),
        train_dataset=rows_of("prompts.jsonl"),
        eval_dataset=rows_of("heldout.jsonl") * 8,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    log = list(trainer.state.log_history)
    return Curve.of_run("stories", variant, seed, BATCH, log, trainer.evaluate()["eval/scores"])
