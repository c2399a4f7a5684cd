"""From a spec to what the trainer's constructor takes: models, tokenizer, adapters, prompts.

Loads safetensors only, and no code that a model brings along. Knows no processes and no training.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppo_engine.facts import (
    AdapterFacts,
    Facts,
    FactsError,
    ModelFacts,
    facts_at,
    gather,
    read_adapter_facts,
)
from ppo_engine.plan import check_adapter
from ppo_engine.prompts import read_jsonl
from ppo_engine.roles import check_value_model, facts_of
from ppo_engine.run_dir import RunDir
from ppo_engine.spec import (
    DEFAULT_ADAPTER,
    HubModel,
    Issue,
    Loc,
    LocalModel,
    Lora,
    ModelSource,
    RunSpec,
    SpecError,
    ValueModel,
    shown,
    sources,
    trained_from,
)


@dataclass(frozen=True)
class Loaded:
    """Arguments of `PPOTrainer`."""

    tokenizer: Any
    policy: nn.Module
    value_model: nn.Module | None


def read_facts(spec: RunSpec, prompts: int, columns: Mapping[str, Iterable[str]] | None = None) -> Facts:
    """What can be known without loading a model; of one on the hub, nothing.

    columns: as in `facts.gather`.

    Raises:
        SpecError: a directory is no model.
    """
    found: dict[Loc, ModelFacts | AdapterFacts] = {}
    issues: list[Issue] = []
    for loc, source in sources(spec):
        if isinstance(source, LocalModel):
            try:
                found[loc] = facts_at(Path(source.path), loc)
            except FactsError as error:
                issues.append(Issue(loc=loc, msg=str(error)))
    if issues:
        raise SpecError(issues)
    return gather(spec, found, prompts, columns)


def read_rows(run_dir: RunDir, file_id: str, loc: Loc) -> list[dict[str, Any]]:
    """The rows of a prompt file. Raises SpecError where the run directory lacks it, or a line is no row."""
    path = run_dir.data(file_id)
    if not path.is_file():
        raise SpecError([Issue(loc=loc, msg=f'"{file_id}" given; the run directory has no {path.name}.')])
    return list(read_jsonl(path, loc))


def load(spec: RunSpec) -> Loaded:
    """Load all that a spec names but its rewards.

    Raises:
        SpecError: something it names cannot be loaded, or is not what its role needs.
    """
    name, revision = locate(spec.model)
    with _refusing(name, ("model",)):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=_policy_dtype(spec),
            use_safetensors=True,
            output_loading_info=True,
        )
        model, info = loaded
        _require_whole(info["missing_keys"])
        if isinstance(spec.model, LocalModel):
            # Exports name the model they were made from: where it lies on this machine is nobody's business.
            model.name_or_path = model.config._name_or_path = Path(name).name
        facts = facts_of(model, tokenizer)
    if isinstance(spec.method, Lora):
        model = _with_adapters(model, facts, spec, spec.method)
    return Loaded(tokenizer, model, _value_model(spec, facts))


@contextmanager
def _refusing(name: str, loc: Loc) -> Iterator[None]:
    """What goes wrong inside refuses what a spec names at `loc`.

    The files are anybody's, and transformers, peft, tokenizers, and safetensors raise whatever they meet in
    them; only a lack of memory says nothing of the files.
    """
    try:
        yield
    except (SpecError, MemoryError, torch.OutOfMemoryError):
        raise
    except FactsError as error:
        raise SpecError([Issue(loc=loc, msg=str(error))]) from error
    except Exception as error:
        msg = f"{name} given; it cannot be loaded: {type(error).__name__}: {error}"
        raise SpecError([Issue(loc=loc, msg=msg)]) from error


def _require_whole(missing: Iterable[str]) -> None:
    """Raises FactsError where weights are missing, which transformers would draw at random."""
    if names := sorted(missing):
        raise FactsError(f"The model given lacks the weights {shown(names)}; give one that has all of them.")


def locate(source: LocalModel | HubModel) -> tuple[str, str | None]:
    """What `from_pretrained` calls a model: its directory or repository, and its revision."""
    return (source.path, None) if isinstance(source, LocalModel) else (source.repo, source.revision)


def _policy_dtype(spec: RunSpec) -> torch.dtype:
    """Frozen weights in the run's precision; trained ones in fp32, which autocast computes in bf16."""
    is_frozen = isinstance(spec.method, Lora)
    return torch.bfloat16 if is_frozen and spec.resources.precision == "bf16" else torch.float32


def _with_adapters(model: nn.Module, facts: ModelFacts, spec: RunSpec, lora: Lora) -> nn.Module:
    """All adapters on the model: those the spec names, and the one that is trained.

    A new adapter starts as zero change; where another adapter is the reference, it starts as that one.
    """
    trained, start = spec.ppo.model_adapter_name or DEFAULT_ADAPTER, trained_from(lora, spec.ppo)
    loaded = {name: name for name in lora.adapters} | ({} if start is None else {trained: start})
    policy: Any = model
    for adapter, name in loaded.items():
        with _refusing(locate(lora.adapters[name])[0], ("method", "adapters", name)):
            directory = _adapter_directory(lora.adapters[name])
            if adapter == trained:
                _require_same(lora, name, directory, facts)
            policy = _load_adapter(policy, directory, adapter)
    if start is not None:
        return policy  # type: ignore[no-any-return]
    with _refusing(shown(lora.target_modules), ("method", "target_modules")):
        config = _lora_config(lora, locate(spec.model)[1])
        if not isinstance(policy, PeftModel):
            policy = get_peft_model(policy, config, adapter_name=trained)
        else:
            policy.add_adapter(trained, config)
    return policy  # type: ignore[no-any-return]


def _adapter_directory(source: ModelSource) -> Path:
    """Where an adapter lies; of the hub's, its two files are fetched, so that none of them is a pickle."""
    if isinstance(source, LocalModel):
        return Path(source.path)
    hf_hub_download(source.repo, "adapter_config.json", revision=source.revision)
    weights = hf_hub_download(source.repo, "adapter_model.safetensors", revision=source.revision)
    return Path(weights).parent


def _require_same(lora: Lora, name: str, directory: Path, model: ModelFacts) -> None:
    issues = list(check_adapter(lora, name, read_adapter_facts(directory), model))
    if issues:
        raise SpecError([Issue(loc=("method", *issue.loc), msg=issue.msg) for issue in issues])


def _load_adapter(policy: Any, directory: Path, adapter: str) -> PeftModel:
    stored = read_adapter_facts(directory).parameters
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # below, an error
        if isinstance(policy, PeftModel):
            policy.load_adapter(str(directory), adapter)
        else:
            policy = PeftModel.from_pretrained(policy, str(directory), adapter)
    weights = get_peft_model_state_dict(policy, adapter_name=adapter, save_embedding_layers=False)
    taken = sum(weight.numel() for weight in weights.values())
    if taken != stored:
        raise FactsError(f"{directory} has {stored} weights, and the model takes {taken}: not made for it.")
    return policy


def _lora_config(lora: Lora, revision: str | None) -> LoraConfig:
    targets = lora.target_modules
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
        revision=revision,
    )


def _value_model(spec: RunSpec, policy: ModelFacts) -> nn.Module | None:
    """A trunk of its own with a head of zeros, or the head of a trained one; None: a head on the policy."""
    value = spec.method.value
    if not isinstance(value, ValueModel):
        return None
    name, revision = locate(value.source or spec.model)
    loc: Loc = ("method", "value") if value.source is None else ("method", "value", "source")
    with _refusing(name, loc):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            revision=revision,
            num_labels=1,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
        check_value_model(model, policy, loc)
        if "score.weight" in info["missing_keys"]:
            nn.init.zeros_(model.score.weight)
        _require_whole(set(info["missing_keys"]) - {"score.weight"})
    return model  # type: ignore[no-any-return]
