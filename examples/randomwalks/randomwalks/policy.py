"""The model that is fine-tuned: a small GPT-2, fitted to the random walks.

It has seen walks, good and bad, and knows which steps are edges; that short ways are wanted is for PPO
to teach. The result is an ordinary `save_pretrained` directory.
"""

from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from randomwalks.graph import LETTERS, MAX_NODES

PAD, END = "<pad>", "<end>"
STEPS, BATCH_SIZE, LEARNING_RATE = 300, 32, 2e-3
IGNORED = -100  # the label transformers leaves out of the loss


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per node, one to pad with, one that ends a walk: 23. Other letters are an error."""
    vocabulary = {token: number for number, token in enumerate([PAD, END, *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side="left"
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """An untrained GPT-2 of 1.5 million parameters."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=4 * MAX_NODES,
        n_embd=144,
        n_layer=6,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def fit(walks: Sequence[str], directory: Path, steps: int = STEPS) -> Generator[float, None, None]:
    """Fit a fresh model to the walks and save it, with its tokenizer, to `directory`.

    Yields the loss after every step; nothing is saved unless it is followed to its end.
    """
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    encoded = tokenizer(
        [walk + END for walk in walks], padding=True, padding_side="right", return_tensors="pt"
    )
    input_ids, attention_mask = encoded["input_ids"], encoded["attention_mask"]
    labels = input_ids.masked_fill(attention_mask == 0, IGNORED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for rows in islice(_batches(len(walks)), steps):
        loss = model(input_ids[rows], attention_mask=attention_mask[rows], labels=labels[rows]).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _batches(rows: int) -> Iterator[torch.Tensor]:
    """Row numbers of batch after batch, without end; every pass in an order of its own."""
    while True:
        yield from torch.randperm(rows).split(BATCH_SIZE)
