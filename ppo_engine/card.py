"""The model card of an export: what was trained on what, how, towards which rewards, and how it did.

Markdown with YAML in front, as the Hugging Face hub reads it. This module knows no models and no files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from huggingface_hub import ModelCardData
from pydantic import JsonValue

_TAGS = ("ppo", "reinforcement-learning", "text-generation", "proxima")
_MADE_WITH = ("proxima-ppo", "torch", "transformers", "peft", "accelerate")
_HUB_NAME = r"[\w.-]+(/[\w.-]+)?"


@dataclass(frozen=True)
class Base:
    """What a policy was before training: its public name, and its commit where that is known."""

    name: str | None
    revision: str | None

    def __str__(self) -> str:
        name = self.name or "a model without a name"
        return name if self.revision is None else f"{name} at revision {self.revision}"


@dataclass(frozen=True)
class DataSet:
    """Prompts of a run. digest: sha256 of what was trained on or evaluated with."""

    name: str
    rows: int
    digest: str


@dataclass(frozen=True)
class Card:
    """What a model card says.

    settings: JSON; settings_name: what it is, such as "Spec". data: all prompts. rewards: weights by name.
    update, updates: after how many of how many it was made. further_steps: those of the next one that are in
    it, which was given up where they were no longer finite. results, evaluation: the last metrics of each.
    """

    base: Base
    settings_name: str
    settings: Mapping[str, JsonValue]
    data: tuple[DataSet, ...]
    rewards: Mapping[str, float]
    update: int
    updates: int
    results: Mapping[str, float]
    evaluation: Mapping[str, float] = field(default_factory=dict)
    further_steps: int = 0


def model_card(card: Card, *, is_adapter: bool, **metadata: Any) -> str:
    """The card as the text of a README.md.

    is_adapter: of an adapter, not of a whole model. metadata: further fields of the YAML; tags are added to
    ours.
    """
    what = f"A LoRA adapter for {card.base}" if is_adapter else f"A language model, trained from {card.base}"
    parts = [
        f"---\n{_front_matter(card.base, is_adapter=is_adapter, **metadata)}\n---\n\n# Policy\n\n"
        f"{what} by PPO: the policy after {_when(card)}.",
        f"## How to load it\n\n```python\n{_loading(card.base, is_adapter=is_adapter)}\n```",
        "## Data\n\n" + _table(("prompts", "rows", "sha256"), [vars(data).values() for data in card.data]),
        "## Rewards\n\nA response's score is the sum of these, each with its weight.\n\n"
        + _table(("reward", "weight"), card.rewards.items()),
        "## Results\n\n" + (_table(("metric", "last value"), card.results.items()) or "None yet."),
    ]
    if card.evaluation:
        parts.append("## Evaluation\n\n" + _table(("metric", "last value"), card.evaluation.items()))
    parts.append(f"## {card.settings_name}\n\n```json\n{json.dumps(card.settings, indent=2)}\n```")
    parts.append(
        "## Made with\n\n" + _table(("package", "version"), [(name, version(name)) for name in _MADE_WITH])
    )
    return "\n\n".join(parts) + "\n"


def _when(card: Card) -> str:
    done = f"update {card.update} of {card.updates}"
    if not card.further_steps:
        return done
    steps = "1 optimizer step" if card.further_steps == 1 else f"{card.further_steps} optimizer steps"
    return f"{done}, and {steps} more; those that followed were not finite, and were not taken"


def _front_matter(base: Base, *, is_adapter: bool, **metadata: Any) -> str:
    given = metadata.pop("tags", None) or ()
    tags = [given] if isinstance(given, str) else list(given)
    has_name = base.name is not None and re.fullmatch(_HUB_NAME, base.name) is not None
    data = ModelCardData(
        base_model=base.name if has_name else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*_TAGS, *(("lora",) if is_adapter else ()), *(tag for tag in tags if tag not in _TAGS)],
        **metadata,
    )
    return data.to_yaml().strip()


def _loading(base: Base, *, is_adapter: bool) -> str:
    kind = "AutoModelForCausalLM"
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")'
    if not is_adapter:
        return (
            f"from transformers import {kind}, AutoTokenizer\n\n"
            f'model = {kind}.from_pretrained("DIRECTORY")\n{tokenizer}'
        )
    revision = "" if base.revision is None else f", revision={base.revision!r}"
    name = base.name or "BASE"
    return (
        f"from peft import PeftModel\nfrom transformers import {kind}, AutoTokenizer\n\n"
        f"base = {kind}.from_pretrained({name!r}{revision})\n"
        f'model = PeftModel.from_pretrained(base, "DIRECTORY")\n{tokenizer}'
    )


def _table(columns: tuple[str, ...], rows: Iterable[Iterable[object]]) -> str:
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    return "\n".join([head, *lines]) if lines else ""


def _cell(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return re.sub(r"\s", " ", text).replace("|", "\\|")
