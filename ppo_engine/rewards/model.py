"""Reward by a sequence-classification model with one label, read at the last token of prompt and response.

Texts are made ids by the model's own tokenizer (and chat template), or, where the model shares the policy's
tokenizer, the policy's ids are scored as they are. Knows no spec and no processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from ppo_engine.batch import cut, response_mask
from ppo_engine.issues import shown
from ppo_engine.memory import Cut, Room, is_out_of_memory
from ppo_engine.rewards.contract import RewardBatch, RewardError

_MAX_TOKENS = 2**14  # padded tokens of one forward


class ModelReward:
    """Scores with a model, without gradients.

    model: in evaluation mode from now on, wherever it lies. tokenizer: the model's.
    shares_ids: the tokenizer is the policy's, so its ids are scored as they are.
    chat_template: prompt and response are rendered by the tokenizer's chat template.
    room: of its forwards, which whoever runs it may set; None: rows that do not fit are the caller's care.

    Raises:
        RewardError: the model has several labels; neither it nor the tokenizer has a padding token; there is
            no chat template.

    A row that is longer than the model's context has no score.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, shares_ids: bool = False, chat_template: bool = False
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.shares_ids, self.chat_template = shares_ids, chat_template
        self.room: Room | None = None
        config: Any = model.config
        self.pad_token_id = _require_scoring(tokenizer, config, chat_template)
        self.context_length = _context_length(model, config)

    @classmethod
    def load(
        cls,
        name_or_path: str,
        *,
        revision: str | None = None,
        chat_template: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> ModelReward:
        """From a directory or the hub; safetensors only, no code of the model's own.

        Raises:
            RewardError: also where there is no such model, or its weights hold no classification head.
        """
        with _refusing(name_or_path):
            config = AutoConfig.from_pretrained(name_or_path, revision=revision)
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision)
        _require_scoring(tokenizer, config, chat_template)  # before the weights come
        with _refusing(name_or_path):
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                name_or_path, revision=revision, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        if loaded["missing_keys"]:
            raise RewardError(
                f"{name_or_path} lacks the weights {shown(sorted(loaded['missing_keys']))}, which would be "
                "random; give a trained sequence-classification model."
            )
        return cls(model.to(device), tokenizer, chat_template=chat_template)

    @torch.no_grad()
    def __call__(self, batch: RewardBatch) -> list[float | RewardError]:
        ids = self._ids(batch)
        fitting = [row for row, given in enumerate(ids) if self._fits(len(given))]
        lengths = [len(ids[row]) for row in fitting]
        scores: list[float | RewardError] = [self._too_long(len(row)) for row in ids]

        def attempt(max_tokens: int) -> None:
            for places in cut(lengths, max_tokens):
                rows = [fitting[place] for place in places]
                for row, score in zip(rows, self._score([ids[row] for row in rows]).tolist(), strict=True):
                    scores[row] = score

        if self.room is None:
            attempt(_MAX_TOKENS)
        else:
            self.room.do_alone(
                "reward", _MAX_TOKENS, attempt, lambda tokens: Cut.of(cut(lengths, tokens), lengths)
            )
        return scores

    def _ids(self, batch: RewardBatch) -> list[list[int]]:
        if self.shares_ids:
            return [p + r for p, r in zip(batch.prompt_ids, batch.response_ids, strict=True)]
        return [self._tokenized(self._text(batch, index)) for index in range(len(batch))]

    def _tokenized(self, text: str) -> list[int]:
        """The text's ids, with one bos token where the tokenizer adds it: a template may have written it."""
        bos: str | None = getattr(self.tokenizer, "bos_token", None)
        has_bos = bos is not None and text.startswith(bos)
        ids: list[int] = self.tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
        return ids or [self.pad_token_id]

    def _text(self, batch: RewardBatch, index: int) -> str:
        prompt, response = batch.prompts[index], batch.responses[index]
        if not self.chat_template:
            return prompt + response
        messages = batch.columns[index].get("messages") or [{"role": "user", "content": prompt}]
        messages = [*messages, {"role": "assistant", "content": response}]
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return text

    def _fits(self, length: int) -> bool:
        return self.context_length is None or length <= self.context_length

    def _too_long(self, length: int) -> RewardError:
        return RewardError(
            f"the row has {length} tokens with its response; the reward model has {self.context_length} "
            "positions: use shorter prompts or a smaller response_length.",
            lasting=True,
        )

    def _score(self, ids: list[list[int]]) -> Tensor:
        """Scores [B], fp32, of rows padded on the right."""
        given: Any = self.model
        model = given.get_base_model() if hasattr(given, "get_base_model") else given
        device = next(model.parameters()).device
        lengths_B = torch.tensor([len(row) for row in ids], device=device)
        width = max(map(len, ids))
        attention_mask_BT = response_mask(lengths_B, width).long()
        if not isinstance(getattr(model, "score", None), nn.Module):
            # An encoder pools as it was trained to.
            input_ids_BT = _padded(ids, width, self.pad_token_id, device)
            output = given(input_ids=input_ids_BT, attention_mask=attention_mask_BT)
            return output.logits[:, 0].float()  # type: ignore[no-any-return]
        # A decoder's own forward looks for the last id that is not the pad's, which may be part of the text.
        trunk = getattr(model, model.base_model_prefix)
        # 0 is in every vocabulary; a pad token that was added to the tokenizer need not be.
        input_ids_BT = _padded(ids, width, 0, device)
        hidden_BTD = trunk(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False)[0]
        last_BD = hidden_BTD[torch.arange(len(ids), device=device), lengths_B - 1]
        return model.score(last_BD)[:, 0].float()  # type: ignore[no-any-return]


def _padded(ids: list[list[int]], width: int, pad_token_id: int, device: torch.device) -> Tensor:
    return torch.tensor([row + [pad_token_id] * (width - len(row)) for row in ids], device=device)


def _context_length(model: Any, config: Any) -> int | None:
    """The most tokens of a row; None: no limit is known."""
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        # RoBERTa and its kin count positions from after the padding's.
        if positions and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return positions - table.padding_idx - 1
    return positions


@contextmanager
def _refusing(name_or_path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the files are anybody's; the libraries raise whatever they meet in them
        if is_out_of_memory(error):
            raise
        raise RewardError(f"{name_or_path} cannot be loaded: {type(error).__name__}: {error}") from error


def _require_scoring(tokenizer: Any, config: Any, chat_template: bool) -> int:
    """The padding token's id. Raises RewardError where such a model cannot score."""
    pad_token_id = _pad_token_id(tokenizer, config)
    if config.num_labels != 1:
        raise RewardError(
            f"A model with {config.num_labels} labels given; a reward is one number: use one with 1 label."
        )
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise RewardError("chat_template is true; the reward model's tokenizer has none: leave it out.")
    return pad_token_id


def _pad_token_id(tokenizer: Any, config: Any) -> int:
    for owner in (tokenizer, config.get_text_config()):
        pad_token_id: int | None = getattr(owner, "pad_token_id", None)
        if pad_token_id is not None:
            return pad_token_id
    raise RewardError(
        "A model without a padding token given; set pad_token in its tokenizer_config.json, or pad_token_id "
        "in its config.json (its eos token will do: padding changes no score)."
    )
