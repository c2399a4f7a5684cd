"""A fine-tuning script as people write them for TRL, which names `ppo_engine` in one import only.

It is run as a program by test_trl_script.py. The one thing that is not real is the hub: what would leave the
machine is written into a folder.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers.trainer
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
)

from ppo_engine import PPOConfig, PPOTrainer

HELD_OUT = 10


@dataclass
class DataArguments:
    """Which prompts."""

    dataset_name: str = field(metadata={"help": "A directory, or a data set of the hub."})
    dataset_train_split: str = "train"


@dataclass
class ModelArguments:
    """Which policy, and how it is trained."""

    model_name_or_path: str
    use_peft: bool = False
    lora_r: int = 4


class FolderAsHub:
    """The two calls of the hub's client that a push makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, name: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=f"somebody/{name}")

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str, **_: Any) -> None:
        card = (Path(folder_path) / "README.md").read_text()
        files = sorted(path.name for path in Path(folder_path).iterdir() if path.is_file())
        push = {"repo": repo_id, "message": commit_message, "files": files, "card": card}
        with self.folder.joinpath("pushes.jsonl").open("a") as pushes:
            pushes.write(json.dumps(push) + "\n")


def tokenized(rows: Dataset, tokenizer: Any, processes: int | None) -> Dataset:
    """Prompts as ids, and nothing else."""
    return rows.map(
        lambda part: {"input_ids": tokenizer(part["prompt"])["input_ids"]},
        batched=True,
        remove_columns=rows.column_names,
        num_proc=processes,
    )


def main(words: list[str]) -> None:
    parser = HfArgumentParser((DataArguments, PPOConfig, ModelArguments))
    data_args, args, model_args = parser.parse_args_into_dataclasses(words)
    transformers.trainer.hf_api = lambda: FolderAsHub(Path(args.output_dir))

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    policy = AutoModelForCausalLM.from_pretrained(args.sft_model_path)
    peft_config = LoraConfig(r=model_args.lora_r, task_type="CAUSAL_LM") if model_args.use_peft else None
    ref_policy = None if peft_config else AutoModelForCausalLM.from_pretrained(args.sft_model_path)
    value_model, reward_model = (
        AutoModelForSequenceClassification.from_pretrained(args.reward_model_path, num_labels=1)
        for _ in range(2)
    )
    rows = load_dataset(data_args.dataset_name, split=data_args.dataset_train_split)
    cut = len(rows) - HELD_OUT

    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=ref_policy,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=tokenized(rows.select(range(cut)), tokenizer, args.dataset_num_proc),
        eval_dataset=tokenized(rows.select(range(cut, len(rows))), tokenizer, args.dataset_num_proc),
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name="somebody/prompts")
    trainer.generate_completions()
    Path(args.output_dir, "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(sys.argv[1:])
