"""From a spec to what the trainer's constructor takes: models, tokenizer, adapters, prompts.

Loads safetensors only, and no code that a model brings along. Knows no processes and no training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppo_engine.facts import Facts, FactsError, ModelFacts, read_model_facts
from ppo_engine.prompts import read_jsonl
from ppo_engine.roles import DEFAULT_ADAPTER
from ppo_engine.run_dir import RunDir
from ppo_engine.spec import HubModel, Issue, LocalModel, Lora, ModelReward, RunSpec, SpecError, ValueModel


@dataclass(frozen=True)
class Loaded:
    """Arguments of `PPOTrainer`."""

    tokenizer: Any
    policy: nn.Module
    value_model: nn.Module | None


def read_facts(spec: RunSpec, prompts: int) -> Facts:
    """What can be known without loading a model.

    Raises:
        SpecError: a directory is no model.
    """
    rewards = {
        reward.name: facts
        for index, reward in enumerate(spec.rewards)
        if isinstance(reward, ModelReward)
        and (facts := _facts(reward.source, ("rewards", index, "source"))) is not None
    }
    value = spec.method.value
    value_source = value.source if isinstance(value, ValueModel) else None
    return Facts(
        model=_facts(spec.model, ("model",)),
        value=None if value_source is None else _facts(value_source, ("method", "value", "source")),
        rewards=rewards,
        prompts=prompts,
    )


def _facts(source: LocalModel | HubModel, loc: tuple[str | int, ...]) -> ModelFacts | None:
    if isinstance(source, HubModel):
        return None
    try:
        return read_model_facts(Path(source.path))
    except FactsError as error:
        raise SpecError([Issue(loc=loc, msg=str(error))]) from None


def read_rows(run_dir: RunDir, file_id: str, loc: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of a prompt file. Raises SpecError where the run directory lacks it."""
    path = run_dir.data(file_id)
    if not path.is_file():
        raise SpecError([Issue(loc=loc, msg=f'"{file_id}" given; the run directory has no {path.name}.')])
    return list(read_jsonl(path))


def load(spec: RunSpec) -> Loaded:
    """Load all that a spec names but its rewards.

    Raises:
        SpecError: something it names cannot be loaded, or is not what its role needs.
    """
    name, revision = locate(spec.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=_policy_dtype(spec), use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise SpecError([Issue(loc=("model",), msg=f"{name} given; it cannot be loaded: {error}")]) from error
    if isinstance(spec.method, Lora):
        model = _with_adapters(model, spec, spec.method, revision)
    return Loaded(tokenizer, model, _value_model(spec))


def locate(source: LocalModel | HubModel) -> tuple[str, str | None]:
    """What `from_pretrained` calls a model: its directory or repository, and its revision."""
    return (source.path, None) if isinstance(source, LocalModel) else (source.repo, source.revision)


def _policy_dtype(spec: RunSpec) -> torch.dtype:
    """Frozen weights in the run's precision; trained ones in fp32, which autocast computes in bf16."""
    is_frozen = isinstance(spec.method, Lora)
    return torch.bfloat16 if is_frozen and spec.resources.precision == "bf16" else torch.float32


def _with_adapters(model: nn.Module, spec: RunSpec, lora: Lora, revision: str | None) -> nn.Module:
    """All adapters on the model: those the spec names, and the one that is trained.

    A new adapter starts as zero change; where another adapter is the reference, it starts as that one.
    """
    trained = spec.ppo.model_adapter_name or DEFAULT_ADAPTER
    sources = dict(lora.adapters)
    if trained not in sources and spec.ppo.ref_adapter_name is not None:
        sources[trained] = sources[spec.ppo.ref_adapter_name]
    policy: Any = model
    for adapter, source in sources.items():
        name, adapter_revision = locate(source)
        try:
            if isinstance(policy, PeftModel):
                policy.load_adapter(name, adapter, revision=adapter_revision)
            else:
                policy = PeftModel.from_pretrained(policy, name, adapter, revision=adapter_revision)
        except (OSError, ValueError, RuntimeError) as error:
            loc = ("method", "adapters", adapter)
            msg = f"{name} given; it cannot be loaded onto the model: {error}"
            raise SpecError([Issue(loc=loc, msg=msg)]) from error
    if trained in sources:
        return policy  # type: ignore[no-any-return]
    config = _lora_config(lora, revision)
    try:
        if isinstance(policy, PeftModel):
            policy.add_adapter(trained, config)
        else:
            policy = get_peft_model(policy, config, adapter_name=trained)
        return policy  # type: ignore[no-any-return]
    except ValueError as error:
        raise SpecError([Issue(loc=("method", "target_modules"), msg=str(error))]) from error


def _lora_config(lora: Lora, revision: str | None) -> LoraConfig:
    targets = lora.target_modules
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
        revision=revision,
    )


def _value_model(spec: RunSpec) -> nn.Module | None:
    """A trunk of its own with a head of zeros, or the head of a trained one; None: a head on the policy."""
    value = spec.method.value
    if not isinstance(value, ValueModel):
        return None
    name, revision = locate(value.source or spec.model)
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            name,
            revision=revision,
            num_labels=1,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        loc = ("method", "value", "source")
        raise SpecError([Issue(loc=loc, msg=f"{name} given; it cannot be loaded: {error}")]) from error
    if any("score" in key for key in loaded["missing_keys"]):
        nn.init.zeros_(model.score.weight)
    return model  # type: ignore[no-any-return]
