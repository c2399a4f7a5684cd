"""What others load: the policy as an adapter in PEFT's layout or as a whole model, its tokenizer, its card.

The stop token stands in the generation config. Value, reward, and reference are never part of an export.
This module does not know when to export.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ppo_engine.actor_critic import causal_lm
from ppo_engine.adapters import parameters_of
from ppo_engine.card import Base
from ppo_engine.model_sources import public_name
from ppo_engine.parallel import Parallel

CARD = "README.md"


def base_of(policy: nn.Module) -> Base:
    """What the policy was loaded from; a directory is called as others may call it."""
    model = causal_lm(policy)
    name, revision = model.name_or_path, getattr(model.config, "_commit_hash", None)
    if not name:
        return Base(None, None)
    if os.path.isabs(name) or Path(name).is_dir():
        name, found = public_name(os.path.abspath(name))
        revision = found or revision
    return Base(name, revision)


def save_adapter(
    directory: Path, parallel: Parallel, policy: PeftModel, tokenizer: Any, adapter: str, card: str
) -> None:
    """Write one adapter; every process calls this."""
    with parallel.gathered(parameters_of(policy, adapter).values()):
        if not parallel.is_main:
            return
        directory.mkdir(parents=True, exist_ok=True)
        policy.save_pretrained(str(directory), selected_adapters=[adapter], save_embedding_layers=False)
        _lay_flat(directory, adapter)
        _name_base(directory / "adapter_config.json", base_of(policy))
        causal_lm(policy).generation_config.save_pretrained(directory)
        _save_the_rest(directory, tokenizer, card)


def save_whole(
    directory: Path, parallel: Parallel, policy: nn.Module, tokenizer: Any, adapter: str, card: str
) -> None:
    """Write a whole model, an adapter where there is one merged into a copy; every process calls this."""
    if isinstance(policy, PeftModel):
        weights = _merged_weights(causal_lm(policy), adapter, parallel)
        if parallel.is_main:
            _save_model(_with_weights(causal_lm(policy), weights), directory, tokenizer, card)
        return
    with parallel.gathered(policy.parameters()):
        if parallel.is_main:
            _save_model(policy, directory, tokenizer, card)


def _save_model(model: Any, directory: Path, tokenizer: Any, card: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    _save_the_rest(directory, tokenizer, card)


def _save_the_rest(directory: Path, tokenizer: Any, card: str) -> None:
    tokenizer.save_pretrained(directory)
    (directory / CARD).write_text(card, encoding="utf-8")  # instead of peft's draft


def _lay_flat(directory: Path, adapter: str) -> None:
    """peft puts any adapter but "default" into a folder of its name; loading wants it at the root."""
    folder = directory / adapter
    if folder.is_dir():
        for file in folder.iterdir():
            file.replace(directory / file.name)
        folder.rmdir()


def _name_base(file: Path, base: Base) -> None:
    """An adapter that was loaded names the model it began on, wherever that lay."""
    config = json.loads(file.read_text())
    config["base_model_name_or_path"], config["revision"] = base.name, base.revision
    file.write_text(json.dumps(config, indent=2, sort_keys=True))


# Merging -----------------------------------------------------------------------------------------------


def _with_weights(model: Any, weights: dict[str, Tensor]) -> Any:
    """A model of the same kind that has these weights; none is copied."""
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        whole = type(model)(config)
    whole.load_state_dict(weights, assign=True, strict=False)
    if _is_untied(whole):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    whole.tie_weights()
    whole.generation_config = model.generation_config
    return whole


def _is_untied(model: Any) -> bool:
    """Whether embeddings that are shared by the config differ: an adapter changed one of them."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    return (
        last is not None
        and first.weight.shape == last.weight.shape
        and not torch.equal(first.weight, last.weight)
    )


def _merged_weights(base: nn.Module, adapter: str, parallel: Parallel) -> dict[str, Tensor]:
    """Whole weights of the base by their names without adapters, one adapter merged in; on the main process.

    Only what the adapter changes is copied, and under ZeRO-3, layer by layer, all that is not here.
    """
    weights: dict[str, Tensor] = {}
    for name, part in _parts(base):
        own = list(part.parameters(recurse=isinstance(part, _WRAPPERS)))
        with parallel.gathered(own), torch.no_grad():
            if not parallel.is_main:
                continue
            found = _merged(part, adapter) if isinstance(part, _WRAPPERS) else _own(part)
            for key, weight in found.items():
                kept = weight.cpu().clone() if parallel.zero_stage == 3 else weight
                weights[f"{name}.{key}" if name else key] = kept
    return weights


_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def _parts(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module by its name, but none inside of what peft has wrapped."""
    yield name, module
    if not isinstance(module, _WRAPPERS):
        for child_name, child in module.named_children():
            yield from _parts(child, f"{name}.{child_name}" if name else child_name)


def _own(module: nn.Module) -> dict[str, Tensor]:
    """What a module itself would store."""
    stored = {name: weight.data for name, weight in module.named_parameters(recurse=False)}
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            stored[name] = buffer
    return stored


def _merged(part: Any, adapter: str) -> dict[str, Tensor]:
    """The weights of a wrapped layer with one adapter merged in.

    peft's `safe_merge` makes new tensors, which take the place of the layer's own: those are put back.
    """
    if isinstance(part, ModulesToSaveWrapper):
        trained, has_it = part.modules_to_save, adapter in part.modules_to_save
        chosen = trained[adapter] if has_it else part.original_module
        return {name: weight.data for name, weight in chosen.named_parameters()}
    layers: list[Any] = [module for module in part.modules() if isinstance(module, BaseTunerLayer)]
    inner = layers[0].get_base_layer()
    before = {weight: weight.data for weight in inner.parameters()}
    try:
        for layer in layers:
            if adapter in layer._all_available_adapter_names():
                layer.merge(safe_merge=True, adapter_names=[adapter])
        return {name: weight.data for name, weight in inner.named_parameters()}
    finally:
        for weight, data in before.items():
            weight.data = data
        for layer in layers:
            layer.merged_adapters.clear()
