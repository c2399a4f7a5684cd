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
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppo_engine.facts import (
    ADAPTED,
    REWARD_HEAD,
    AdapterFacts,
    Facts,
    FactsError,
    ModelFacts,
    facts_at,
    gather,
    read_adapter_facts,
)
from ppo_engine.issues import Issue, Loc, SpecError, shown
from ppo_engine.model_sources import HubModel, LocalModel, ModelSource, public_name
from ppo_engine.plan import check_adapter, check_base, check_head
from ppo_engine.prompts import read_jsonl
from ppo_engine.roles import add_reward_head, check_value_model, facts_of, with_new_adapter
from ppo_engine.run_dir import RunDir
from ppo_engine.spec import DEFAULT_ADAPTER, Lora, RunSpec, ValueModel, critic, sources, trained_from


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
            # Exports name the model they were made from, and not where it lies on this machine.
            own_name, commit = public_name(name)
            model.name_or_path = model.config._name_or_path = own_name
            model.config._commit_hash = commit
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
            if name == spec.ppo.reward_adapter_name:
                policy = _load_reward_adapter(policy, directory, name, ("method", "adapters", name))
            else:
                _require_fit(directory, facts, ("method", "adapters", name), is_reward=False)
                policy = _load_adapter(policy, directory, adapter)
    if start is not None:
        return policy  # type: ignore[no-any-return]
    with _refusing(shown(lora.target_modules), ("method", "target_modules")):
        config = _lora_config(lora, locate(spec.model)[1])
        policy = with_new_adapter(policy, config, trained)
    return policy  # type: ignore[no-any-return]


def _adapter_directory(source: ModelSource) -> Path:
    return Path(source.path) if isinstance(source, LocalModel) else _snapshot(source.repo, source.revision)


def _snapshot(repo: str, revision: str | None) -> Path:
    """An adapter of the hub: its two files alone are fetched, so that none of them is a pickle."""
    hf_hub_download(repo, "adapter_config.json", revision=revision)
    return Path(hf_hub_download(repo, "adapter_model.safetensors", revision=revision)).parent


def load_reward_adapter(
    model: nn.Module, name_or_path: str | Path, adapter_name: str, revision: str | None = None
) -> PeftModel:
    """Put a reward adapter on a policy's base, for `PPOConfig.reward_adapter_name`; it is never trained.

    model: a causal language model, or a peft model around one. name_or_path: a directory, or a repository of
    the hub, with a LoRA and its score head as PEFT saves those of a sequence-classification model
    (`task_type` SEQ_CLS). adapter_name: what it is called from now on.

    Raises:
        SpecError: it cannot be loaded, has no score head with one output, or was trained for another base.
    """
    with _refusing(str(name_or_path), ("reward_adapter_name",)):
        path = Path(name_or_path)
        directory = path if path.is_dir() else _snapshot(str(name_or_path), revision)
        return _load_reward_adapter(model, directory, adapter_name, ("reward_adapter_name",))


def _load_reward_adapter(model: nn.Module, directory: Path, adapter: str, loc: Loc) -> PeftModel:
    """peft would load it onto a sequence-classification model: here its head is taken off first."""
    _require_fit(directory, facts_of(model), loc, is_reward=True)
    config: Any = PeftConfig.from_pretrained(str(directory))
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, True
    config.base_model_name_or_path = None  # peft warns where a copy of the base has another name
    policy = with_new_adapter(model, config, adapter)
    weights = load_file(directory / "adapter_model.safetensors")
    head_1D = weights.pop(ADAPTED + REWARD_HEAD)
    with _no_missing_keys_told():
        set_peft_model_state_dict(policy, weights, adapter)
    _require_all_taken(policy, adapter, directory, sum(weight.numel() for weight in weights.values()))
    add_reward_head(policy, adapter, head_1D)
    return policy


def _require_fit(directory: Path, model: ModelFacts, loc: Loc, *, is_reward: bool) -> None:
    adapter = read_adapter_facts(directory)
    issues = [*check_base(adapter, model, loc), *check_head(adapter, loc, is_reward=is_reward)]
    if issues:
        raise SpecError(issues)


def _require_same(lora: Lora, name: str, directory: Path, model: ModelFacts) -> None:
    issues = list(check_adapter(lora, name, read_adapter_facts(directory), model))
    if issues:
        raise SpecError([Issue(loc=("method", *issue.loc), msg=issue.msg) for issue in issues])


def _load_adapter(policy: Any, directory: Path, adapter: str) -> PeftModel:
    stored = read_adapter_facts(directory).parameters or 0
    with _no_missing_keys_told():
        if isinstance(policy, PeftModel):
            policy.load_adapter(str(directory), adapter)
        else:
            policy = PeftModel.from_pretrained(policy, str(directory), adapter)
    _require_all_taken(policy, adapter, directory, stored)
    return policy


@contextmanager
def _no_missing_keys_told() -> Iterator[None]:
    """peft warns of them; here they are an error: see `_require_all_taken`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        yield


def _require_all_taken(policy: PeftModel, adapter: str, directory: Path, stored: int) -> None:
    weights = get_peft_model_state_dict(policy, adapter_name=adapter, save_embedding_layers=False)
    taken = sum(weight.numel() for weight in weights.values())
    if taken != stored:
        raise FactsError(f"{directory} has {stored} weights, and the model takes {taken}: not made for it.")


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
    value = critic(spec)
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
