"""Random walks in trlX's budget: 2,560 episodes in 20 updates, by this trainer or by TRL 1.12's.

Imports neither trainer until it is asked for one, so that either environment can run it.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig
from randomwalks.graph import random_walks
from randomwalks.policy import fit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.learning.curve import PLAIN, Curve

EPISODES, BATCH, RESPONSE = 2560, 128, 9
WALKS_PER_START = 50
GRAPH, WALKS = random_walks()

COMMON: dict[str, Any] = {
    "total_episodes": EPISODES,
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": 1,
    "local_rollout_forward_batch_size": BATCH,
    "num_ppo_epochs": 4,
    "response_length": RESPONSE,
    "stop_token": "eos",
    "temperature": 1.0,
    "kl_coef": 0.0,
    "gamma": 1.0,
    "weight_decay": 1e-6,
    **PLAIN,
}
_GAE = {"num_mini_batches": 4, "lam": 1.0, "vf_coef": 1.0, "critic_learning_rate": 1e-3}
_RLOO = {"advantage_estimator": "rloo", "num_return_sequences": 8, "num_mini_batches": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    # Without an early stop an update of all weights now and then throws away a start it has few samples of.
    "full, gae": {**_GAE, "learning_rate": 2e-4, "early_stop_kl": 0.03},
    "full, rloo": {**_RLOO, "learning_rate": 3e-4, "cliprange_high": 0.4, "early_stop_kl": 0.03},
    "LoRA, gae": {**_GAE, "learning_rate": 5e-4},
    "LoRA, rloo": {**_RLOO, "learning_rate": 5e-4},
    # trlX's own hyperparameters, with which both trainers are compared.
    "trlX's settings": {
        "learning_rate": 3e-4,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "vf_coef": 1.2,
        "lam": 0.95,
    },
}
PEERS = "trlX's settings"


def make_base(directory: Path) -> None:
    """Fit the policy to the walks."""
    for _ in fit(WALKS, directory):
        pass


def run(library: str, variant: str, seed: int, base: Path, output: Path) -> Curve:
    """One run. library: proxima, or trl for `PEERS`."""
    if library == "trl":
        from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: PLC0415  (one of them is installed)
    else:
        from ppo_engine import PPOConfig, PPOTrainer  # noqa: PLC0415
    settings = VARIANTS[variant]
    tokenizer = AutoTokenizer.from_pretrained(base)
    starts = [{"input_ids": tokenizer(start)["input_ids"]} for start in GRAPH.starts]
    trainer = PPOTrainer(
        args=PPOConfig(output_dir=str(output), seed=seed, **{**COMMON, **settings}),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(base),
        ref_model=None,
        reward_model=OptimalityModel(tokenizer) if library == "trl" else optimality,
        value_model=None if variant.endswith("rloo") else critic(base),
        train_dataset=_dataset(starts, library),
        peft_config=lora() if variant.startswith("LoRA") else None,
    )
    trainer.train()
    told = f"{variant}, TRL 1.12" if library == "trl" else variant
    final = sampled_optimality(trainer.model.policy, tokenizer, seed)
    return Curve.of_run("walks", told, seed, BATCH, trainer.state.log_history, final)


def lora() -> LoraConfig:
    """With the output layer trained whole.

    It is the frozen embedding otherwise, behind a frozen norm: its logits are bounded, and with them how sure
    the policy can be of a letter.
    """
    return LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
        modules_to_save=["lm_head"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )


def critic(base: Path) -> nn.Module:
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    nn.init.zeros_(model.score.weight)
    return model  # type: ignore[no-any-return]


def optimality(batch: Any) -> list[float]:
    walks = zip(batch.prompts, batch.responses, strict=True)
    return [GRAPH.optimality(prompt + response) for prompt, response in walks]


class OptimalityModel(nn.Module):
    """The same reward as TRL 1.12 wants it: a sequence-classification model, read at one token."""

    base_model_prefix = "backbone"

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.score = nn.Identity()

    def backbone(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        texts = [
            self.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
            for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]
        scores_B = torch.tensor([GRAPH.optimality(text) for text in texts])
        return SimpleNamespace(hidden_states=[scores_B[:, None, None].expand(*input_ids.shape, 1)])


def _dataset(rows: list[dict[str, Any]], library: str) -> Any:
    """TRL's loader drops the last batch, so it needs as many rows as a batch has."""
    from datasets import Dataset  # noqa: PLC0415  (only where it is used: it is slow to import)

    return Dataset.from_list(rows * (BATCH if library == "trl" else 1))


@torch.no_grad()
def sampled_optimality(policy: Any, tokenizer: Any, seed: int) -> float:
    """Mean over walks of the final policy, at temperature 1, as many from every start."""
    torch.manual_seed(seed)
    prompts = [start for start in GRAPH.starts for _ in range(WALKS_PER_START)]
    encoded = tokenizer(prompts, return_tensors="pt")
    ids = policy.eval().generate(
        **encoded,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=RESPONSE,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return sum(map(GRAPH.optimality, texts)) / len(texts)
