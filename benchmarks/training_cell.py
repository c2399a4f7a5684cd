"""One trainer, in a process of its own, that does an update when it is told to, and says how long it took.

Run as a script by either virtual environment, so it imports nothing of this package. Both trainers take the
same constructor arguments, which is what makes one file enough.
"""

import argparse
import json
import socket
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

PPO_EPOCHS = 4
PHASES = ("time/rollout", "time/reward", "time/scoring", "time/update")
THREADS = 2


class Turns(TrainerCallback):
    """Waits for its turn before each update; afterwards tells the seconds, and the peak memory so far."""

    def __init__(self, referee: socket.socket) -> None:
        self.lines = referee.makefile("rw", buffering=1)
        self.began = 0.0
        self.rollouts = Rollouts()
        self.phases: list[dict[str, float]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._tell(versions=versions())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self.began
        self._tell(seconds=seconds, rollout=self.rollouts.taken())

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Ours tells how long each phase took."""
        timed = {name.split("/")[1]: value for name, value in logs.items() if name in PHASES}
        self.phases += [timed] if timed else []

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._tell(phases=self.phases)

    def _tell(self, **told: Any) -> None:
        """One line out, then the wait for one line in."""
        self.lines.write(json.dumps({**told, "peak_rss_bytes": peak_rss_bytes()}) + "\n")
        self.lines.readline()
        self.began = time.perf_counter()


class Rollouts:
    """Watches the part of a trainer that samples responses: seconds, and tokens that are real."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}

    def watch(self, library: str, trainer: Any) -> None:
        """From now on, tell of every rollout. The two trainers sample in different places."""
        if library == "proxima":
            trainer.collector.sample = self._timed(trainer.collector.sample, self._of_proxima)
        else:
            module = sys.modules[type(trainer).__module__]
            module.batch_generation = self._timed(
                module.batch_generation, lambda given, told: self._of_trl(trainer, given, told)
            )

    def _timed(self, sample: Any, tokens: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            told = sample(*args, **kwargs)
            self._seen = {"seconds": time.perf_counter() - began, **tokens(args, told)}
            return told

        return timed

    @staticmethod
    def _of_proxima(given: Any, rollout: Any) -> dict[str, float]:
        written = sum(map(len, rollout.response_ids))
        return {"response_tokens": written, "text_tokens": sum(map(len, rollout.prompt_ids)) + written}

    @staticmethod
    def _of_trl(trainer: Any, given: Any, told: Any) -> dict[str, float]:
        """Up to the first stop token and with it, and prompts without their padding."""
        prompts = given[1]
        responses = told[0][:, prompts.shape[1] :]
        stops = (responses == trainer.stop_token_id).cumsum(1)
        written = int(((stops == 0) | ((stops == 1) & (responses == trainer.stop_token_id))).sum())
        read = int((prompts != trainer.processing_class.pad_token_id).sum())
        return {"response_tokens": written, "text_tokens": read + written}

    def taken(self) -> dict[str, float]:
        return self._seen


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}


def peak_rss_bytes() -> int:
    """The high-water mark of this process's resident memory (`VmHWM`).

    Not `ru_maxrss`: that one survives `exec`, so a child of a large parent would report its parent.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM line")


def trainer_classes(library: str) -> tuple[Any, Any]:
    """The config and the trainer of `library`; imported here because only one of them is installed."""
    if library == "trl":
        from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: PLC0415
    else:
        from ppo_engine import PPOConfig, PPOTrainer  # noqa: PLC0415
    return PPOConfig, PPOTrainer


def arguments(config: Any, options: argparse.Namespace) -> Any:
    """The arguments of both sides; what TRL turns on by default (bf16, checkpointing) is off on both."""
    return config(
        output_dir=str(options.output),
        total_episodes=options.batch * options.updates,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=PPO_EPOCHS,
        local_rollout_forward_batch_size=options.batch,
        response_length=options.response,
        stop_token_id=1,
        temperature=0.7,
        num_sample_generations=0,
        learning_rate=1e-5,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        seed=1,
    )


def build(options: argparse.Namespace, turns: Turns) -> Any:
    """A trainer ready to train. Methods: full, lora (own value model), lora-head (head on the trunk)."""
    config, trainer = trainer_classes(options.library)
    workload, method = options.workload, options.method
    prompts = json.loads((workload / "prompts.json").read_text())
    classifier = AutoModelForSequenceClassification.from_pretrained
    made = trainer(
        args=arguments(config, options),
        processing_class=AutoTokenizer.from_pretrained(workload / "policy", padding_side="left"),
        model=AutoModelForCausalLM.from_pretrained(workload / "policy"),
        ref_model=None,
        reward_model=classifier(workload / "reward", num_labels=1),
        value_model=None if method == "lora-head" else classifier(workload / "value", num_labels=1),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        callbacks=[turns],
        peft_config=None if method == "full" else lora_config(),
    )
    turns.rollouts.watch(options.library, made)
    return made


def lora_config() -> LoraConfig:
    """On every linear layer but the output layer, which peft leaves out by itself."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", choices=["trl", "proxima"], required=True)
    parser.add_argument("--method", choices=["full", "lora", "lora-head"], required=True)
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--response", type=int, required=True, help="most tokens of a response")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--referee", type=int, required=True, help="descriptor of a socket")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    build(options, Turns(socket.socket(fileno=options.referee))).train()


if __name__ == "__main__":
    main()
