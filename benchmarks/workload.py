"""Makes what both trainers are measured on: Llamas, their reward and value models, a tokenizer, prompts.

Everything is random but seeded, made on the spot, and saved with `save_pretrained`, so both sides load the
same bytes. This file does not know who trains on it.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

SEED = 20261101
PROMPTS = 256
PROMPT_TOKENS = (4, 32)


@dataclass(frozen=True)
class Size:
    """One model shape of the benchmark; `vocabulary` counts the pad and eos tokens."""

    name: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    intermediate: int


SIZES = (
    Size("0.4M", vocabulary=1024, hidden=96, layers=2, heads=4, intermediate=256),
    Size("33M", vocabulary=8192, hidden=512, layers=8, heads=8, intermediate=1376),
)


def make(size: Size, directory: Path) -> int:
    """Writes `policy/`, `value/`, `reward/`, and `prompts.json`; returns the policy's parameters."""
    disable_progress_bar()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(size.vocabulary)
    config = _config(size)
    torch.manual_seed(SEED)
    policy = LlamaForCausalLM(config)
    policy.generation_config.eos_token_id = None
    _save(policy, tokenizer, directory / "policy")
    for role in ("value", "reward"):
        _save(LlamaForSequenceClassification(config), tokenizer, directory / role)
    (directory / "prompts.json").write_text(json.dumps(_prompts(size.vocabulary)))
    return sum(parameter.numel() for parameter in policy.parameters())


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1} | {f"w{number}": number for number in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def _config(size: Size) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        intermediate_size=size.intermediate,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        num_labels=1,
    )


def _save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _prompts(vocabulary: int) -> list[list[int]]:
    draw = random.Random(SEED)
    return [
        [draw.randrange(2, vocabulary) for _ in range(draw.randint(*PROMPT_TOKENS))] for _ in range(PROMPTS)
    ]
