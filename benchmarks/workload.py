"""Makes what both trainers are measured on: Llamas, their reward and value models, a tokenizer, prompts.

Everything is random but seeded, made on the spot, and saved with `save_pretrained`, so both sides load the
same bytes. This file does not know who trains on it.
"""

import json
import random
from dataclasses import dataclass, replace
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
TEMPERATURE = 0.7
EOS, CHANNEL = 1, 0
PROMPTS = 256
PROMPT_TOKENS = (4, 32)


@dataclass(frozen=True)
class Size:
    """One model shape of the benchmark; `vocabulary` counts the pad and eos tokens.

    mean_response: tokens after which the policy ends a response on average; None: it hardly ever does.
    """

    name: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    mean_response: float | None = None

    @property
    def trunk_weights(self) -> int:
        """In the matrices of the trunk."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """In the matrix of the output layer."""
        return self.vocabulary * self.hidden


SMALL = Size("0.4M", vocabulary=1024, hidden=96, layers=2, heads=4, intermediate=256)
LARGE = Size("33M", vocabulary=8192, hidden=512, layers=8, heads=8, intermediate=1376)
WIDE = Size("128k words", vocabulary=128_256, hidden=128, layers=2, heads=4, intermediate=352)


def ending_early(size: Size, mean_response: float) -> Size:
    """The same shape with a policy whose responses end after so many tokens on average."""
    return replace(size, name=f"{size.name} early", mean_response=mean_response)


def make(size: Size, directory: Path) -> int:
    """Writes `policy/`, `value/`, `reward/`, and `prompts.json`; returns the policy's parameters."""
    disable_progress_bar()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(size.vocabulary)
    config = _config(size)
    torch.manual_seed(SEED)
    policy = LlamaForCausalLM(config)
    policy.generation_config.eos_token_id = None
    if size.mean_response is not None:
        make_it_end(policy, 1 / size.mean_response)
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
        eos_token_id=EOS,
        num_labels=1,
    )


@torch.no_grad()
def make_it_end(policy: LlamaForCausalLM, probability: float) -> None:
    """Have the policy write eos with about this probability, wherever it stands.

    One channel of the residual stream is kept at a constant, which no layer writes to and only the logit of
    eos reads; how strongly it does is found by bisection.
    """
    policy.model.embed_tokens.weight[:, CHANNEL] = 1.0
    for layer in policy.model.layers:
        layer.self_attn.o_proj.weight[CHANNEL] = 0.0
        layer.mlp.down_proj.weight[CHANNEL] = 0.0
    policy.lm_head.weight[:, CHANNEL] = 0.0
    policy.lm_head.weight[EOS] = 0.0
    ids = torch.randint(2, policy.config.vocab_size, (16, 64))
    low, high = 0.0, 1000.0
    for _ in range(40):
        policy.lm_head.weight[EOS, CHANNEL] = (low + high) / 2
        chance = (policy(ids).logits / TEMPERATURE).softmax(-1)[..., EOS].mean()
        low, high = (low, (low + high) / 2) if chance > probability else ((low + high) / 2, high)


def _save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _prompts(vocabulary: int) -> list[list[int]]:
    draw = random.Random(SEED)
    return [
        [draw.randrange(2, vocabulary) for _ in range(draw.randint(*PROMPT_TOKENS))] for _ in range(PROMPTS)
    ]
