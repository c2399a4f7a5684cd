"""Small real tokenizers, policies, and reward models, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

WORDS = [
    *("<s>", "</s>", "<pad>", "<unk>", "user", "assistant"),
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} {{ message['role'] }} {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)


def tokenizer(
    words: list[str] = WORDS,
    *,
    chat: bool = False,
    bos: bool = True,
    pad: str | None = "<pad>",
    eos: str | None = "</s>",
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; `bos`: it writes <s> before a text."""
    model = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    if bos:
        model.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", words.index("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token=eos,
        pad_token=pad,
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def policy(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A decoder whose attention has dropout, which the engine must switch off."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": len(WORDS),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "attention_dropout": 0.3,
            "pad_token_id": 2,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "initializer_range": 0.5,
            **changes,
        }
    )
    return LlamaForCausalLM(config)


def reward_model(
    vocab_size: int = len(WORDS), labels: int = 1, pad_token_id: int | None = 1
) -> LlamaForSequenceClassification:
    """A decoder with a head for one score; its pad token is </s>, as in many released models."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        num_labels=labels,
        pad_token_id=pad_token_id,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForSequenceClassification(config)


def encoder_reward_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        num_labels=1,
        pad_token_id=2,
    )
    return BertForSequenceClassification(config)


def save(model: torch.nn.Module, own_tokenizer: PreTrainedTokenizerFast, directory: Path) -> str:
    model.save_pretrained(directory)
    own_tokenizer.save_pretrained(directory)
    return str(directory)


def classifier(**changes: Any) -> LlamaForSequenceClassification:
    """The trunk of `policy`, with a head for one score."""
    base = policy(**changes)
    base.config.num_labels = 1
    model = LlamaForSequenceClassification(base.config)
    model.model.load_state_dict(base.model.state_dict())
    return model


def save_judge(directory: Path, **changes: Any) -> Path:
    """A reward adapter as PEFT saves it: a LoRA on the trunk of `policy`, and a score head, all random.

    changes: to the policy's config.
    """
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="SEQ_CLS")
    judge = get_peft_model(classifier(**changes), config)
    torch.manual_seed(1)
    for name, weight in judge.named_parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=1.0 if "score" in name else 0.3)
    judge.peft_config["default"].base_model_name_or_path = "/home/me/tiny-policy"
    judge.save_pretrained(str(directory), save_embedding_layers=False)
    return directory
