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
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppo_engine.adapters import parameters_of
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
from ppo_engine.memory import is_out_of_memory
from ppo_engine.model_sources import HubData, HubModel, LocalModel, ModelSource, public_name
from ppo_engine.prompts import read_jsonl
from ppo_engine.role_rules import check_adapter, check_base, check_head, check_saved_modules
from ppo_engine.roles import add_reward_head, check_value_model, facts_of, with_new_adapter
from ppo_engine.run_dir import RunDir
from ppo_engine.spec import DEFAULT_ADAPTER, Lora, RunSpec, ValueModel, critic, data_id, sources, trained_from


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


def read_rows(run_dir: RunDir, spec: RunSpec) -> dict[str, list[dict[str, Any]]]:
    """The rows of all prompts, by their field in the spec.

    Raises:
        SpecError: the run directory lacks some, or a line is no row.
    """
    return {field: list(_rows(run_dir, field, source)) for field, source in spec.prompts.sources().items()}


def _rows(run_dir: RunDir, field: str, source: str | HubData) -> Iterator[dict[str, Any]]:
    loc, path = ("prompts", field), run_dir.data(data_id(field, source))
    if not path.is_file():
        msg = f"{shown(str(source))} given; the run directory has no {path.name}."
        if isinstance(source, HubData):
            msg += " Only a worker brings data sets of the hub: put its rows there, one JSON object a line."
        raise SpecError([Issue(loc=loc, msg=msg)])
    return read_jsonl(path, loc)


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
    except SpecError:
        raise
    except FactsError as error:
        raise SpecError([Issue(loc=loc, msg=str(error))]) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
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
    _require_none(_in_method(check_saved_modules(lora, facts)))
    with _refusing(shown(lora.target_modules), ("method", "target_modules")):
        config = _lora_config(lora, locate(spec.model)[1])
        policy = _with_new_adapter(policy, config, trained)
    return policy  # type: ignore[no-any-return]


def _with_new_adapter(policy: nn.Module, config: PeftConfig, adapter: str) -> PeftModel:
    """With one adapter more, all in fp32: peft leaves what is trained whole in the base's precision."""
    with warnings.catch_warnings():
        # Tied weights part here, and in exports too: an output layer of its own is what was asked for.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        adapted = with_new_adapter(policy, config, adapter)
    for weight in parameters_of(adapted, adapter).values():
        weight.data = weight.data.float()
    return adapted


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
    weights = load_file(directory / "adapter_model.safetensors")
    head_1D = weights.pop(ADAPTED + REWARD_HEAD)
    policy = _with_loaded(model, config, adapter, weights, directory)
    add_reward_head(policy, adapter, head_1D)
    return policy


def _load_adapter(model: nn.Module, directory: Path, adapter: str) -> PeftModel:
    config: Any = PeftConfig.from_pretrained(str(directory))
    config.inference_mode = True
    return _with_loaded(model, config, adapter, load_file(directory / "adapter_model.safetensors"), directory)


def _with_loaded(
    model: nn.Module, config: PeftConfig, adapter: str, weights: dict[str, Tensor], directory: Path
) -> PeftModel:
    config.base_model_name_or_path = None  # peft warns where a copy of the base has another name
    policy = _with_new_adapter(model, config, adapter)
    with warnings.catch_warnings():
        # Of keys that are missing peft warns only.
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        set_peft_model_state_dict(policy, weights, adapter)
    taken = get_peft_model_state_dict(policy, adapter_name=adapter, save_embedding_layers=False)
    sizes = [sum(weight.numel() for weight in each.values()) for each in (weights, taken)]
    if sizes[0] != sizes[1]:
        raise FactsError(
            f"{directory} has {sizes[0]} weights, and the model takes {sizes[1]}: not made for it."
        )
    return policy


def _require_fit(directory: Path, model: ModelFacts, loc: Loc, *, is_reward: bool) -> None:
    adapter = read_adapter_facts(directory)
    _require_none([*check_base(adapter, model, loc), *check_head(adapter, loc, is_reward=is_reward)])


def _require_same(lora: Lora, name: str, directory: Path, model: ModelFacts) -> None:
    _require_none(_in_method(check_adapter(lora, name, read_adapter_facts(directory), model)))


def _in_method(issues: Iterable[Issue]) -> list[Issue]:
    return [Issue(loc=("method", *issue.loc), msg=issue.msg) for issue in issues]


def _require_none(issues: list[Issue]) -> None:
    if issues:
        raise SpecError(issues)


def _lora_config(lora: Lora, revision: str | None) -> LoraConfig:
    targets = lora.target_modules
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(lora.modules_to_save) or None,
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
