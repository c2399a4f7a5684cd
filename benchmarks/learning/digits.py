"""Digit completion in verl's setting: continue an arithmetic sequence modulo 10, from a random model.

A prompt is "3,5:4", two numbers and how many more are asked for; the right response is "7,9,1,3", and then
eos. Each character that is right, up to the first that is not, earns its share of 1: the reward is dense.
"""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from benchmarks.learning.curve import PLAIN, Curve
from ppo_engine import PPOConfig, PPOTrainer

MODULUS, MOST_NUMBERS = 10, 9
BATCH, UPDATES = 800, 200
PAD, EOS = "<pad>", "<eos>"
WORDS = [PAD, EOS, *"0123456789,:", "<a>", "<b>"]  # 16, as in verl's model
VARIANTS = {"gae": {}}


def prompts() -> list[dict[str, str]]:
    """Every first number, difference, and count, in an order of its own."""
    found = [
        f"{first},{(first + difference) % MODULUS}:{count}"
        for first in range(MODULUS)
        for difference in range(MODULUS)
        for count in range(1, MOST_NUMBERS + 1)
    ]
    random.Random(0).shuffle(found)
    return [{"prompt": prompt} for prompt in found]


def answer(prompt: str) -> str:
    """The right response, without its eos."""
    numbers, count = prompt.split(":")
    first, second = map(int, numbers.split(","))
    steps = range(1, int(count) + 1)
    return ",".join(str((second + (second - first) * step) % MODULUS) for step in steps)


def right_characters(batch: Any) -> list[list[float]]:
    """A share for each token that is right, the eos too, up to the first that is not."""
    return [
        _shares([*answer(prompt), EOS], [WORDS[token] for token in ids])
        for prompt, ids in zip(batch.prompts, batch.response_ids, strict=True)
    ]


def _shares(right: list[str], written: list[str]) -> list[float]:
    agreeing = 0
    while agreeing < min(len(right), len(written)) and right[agreeing] == written[agreeing]:
        agreeing += 1
    return [1 / len(right)] * agreeing + [0.0] * (len(written) - agreeing)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def make_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=16,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
        num_labels=1,
    )


def run(variant: str, seed: int, output: Path) -> Curve:
    """One run of verl's budget: 200 updates of 800 responses, four optimizer steps on each."""
    torch.manual_seed(seed)
    policy, value = LlamaForCausalLM(make_config()), LlamaForSequenceClassification(make_config())
    args = PPOConfig(
        output_dir=str(output),
        seed=seed,
        total_episodes=BATCH * UPDATES,
        per_device_train_batch_size=BATCH,
        local_rollout_forward_batch_size=BATCH,
        num_mini_batches=4,
        num_ppo_epochs=1,
        response_length=32,
        stop_token="eos",
        temperature=1.0,
        learning_rate=1e-4,
        critic_learning_rate=1e-3,
        lr_scheduler_type="constant",
        gamma=1.0,
        lam=1.0,
        cliprange_value=0.5,
        vf_coef=1.0,
        max_grad_norm=1.0,
        kl_coef=0.0,
        **PLAIN,
        **VARIANTS[variant],
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=make_tokenizer(),
        model=policy,
        ref_model=None,
        reward_model=right_characters,
        value_model=value,
        train_dataset=prompts(),
    )
    trainer.train()
    return Curve.of_run("digits", variant, seed, BATCH, trainer.state.log_history)
