"""Which weights play which role: policy, reference, value, reward; and switching adapters between roles.

With adapters one base serves policy and reference: the reference is the base with adapters off, or with
another adapter on. This module does not know processes or the training loop.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import JsonValue
from torch import Tensor, nn

from ppo_engine import role_rules
from ppo_engine.actor_critic import ScalarHead, causal_lm, trunk
from ppo_engine.adapters import REWARD_HEADS, VALUE_ADAPTER, Switch, parameters_of, weights_of
from ppo_engine.facts import ModelFacts, TokenizerFacts, linears, modules, why_base_changes
from ppo_engine.issues import Issue, Loc, SpecError, shown
from ppo_engine.logprobs import output_logits
from ppo_engine.spec import DEFAULT_ADAPTER


def build_policy(
    model: nn.Module, peft_config: PeftConfig | None, adapter: str | None, reference: str | None = None
) -> nn.Module:
    """The policy: the model, or the model with a new adapter, of which only the adapter is trained.

    reference: the adapter that is the reference; a new adapter starts as a copy of it. None: the base is.

    Raises:
        TypeError: `peft_config` is no PeftConfig.
        ValueError: the adapter that `peft_config` is to make is there already, or without a `peft_config`
            is not; or it is of a kind that has no layers, or that changes the base; or the reference is
            not there, is the adapter that is trained, or is of another shape than the one made.
    """
    name = adapter or DEFAULT_ADAPTER
    if peft_config is not None:
        if not isinstance(peft_config, PeftConfig):
            raise TypeError(
                f"peft_config is a {type(peft_config).__name__}; give a peft.PeftConfig, such as LoraConfig."
            )
        model = with_new_adapter(model, peft_config, name)
    if isinstance(model, PeftModel):
        for own, config in model.peft_config.items():
            _require_untouched_base(config, f"model has an adapter {own!r}")
        train_adapter(model, name)
    if reference is not None:
        require_adapter(model, reference, "ref_adapter_name")
        if reference == name:
            raise ValueError(
                f"ref_adapter_name is {reference!r}, which is also the adapter that is trained; the "
                "reference must stay: give model_adapter_name another name."
            )
        if peft_config is not None:
            _start_as(model, name, reference)
    return model


def with_new_adapter(model: nn.Module, config: PeftConfig, name: str) -> PeftModel:
    """The model with one adapter more, made anew.

    Raises:
        ValueError: it has one of that name, lacks a module of `modules_to_save`, or its base would change.
    """
    _require_untouched_base(config, "peft_config given")
    _require_modules(model, getattr(config, "modules_to_save", None) or ())
    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, adapter_name=name)
    if name in model.peft_config:
        raise ValueError(
            f"model is a PeftModel with an adapter {name!r}, and peft_config is given too; merge and unload "
            "that adapter first, give model_adapter_name another name, or leave peft_config out to train "
            "the adapter it has."
        )
    model.add_adapter(name, config)
    return model


def _require_untouched_base(config: PeftConfig, what: str) -> None:
    start, bias = getattr(config, "init_lora_weights", None), getattr(config, "bias", None)
    if (reason := why_base_changes(start, bias)) is not None:
        raise ValueError(f"{what} with {reason}")


def _require_modules(model: nn.Module, names: Sequence[str]) -> None:
    """peft itself leaves a module that it does not find out."""
    known = [name for name, _ in causal_lm(model).named_modules(remove_duplicate=False) if name]
    for name in names:
        if not any(module.endswith(name) for module in known):
            ends = sorted({module.rsplit(".", 1)[-1] for module in known})
            raise ValueError(
                f"peft_config.modules_to_save names {name!r}, and the model has no such module; its modules "
                f"end in {shown(ends, 400)}: choose of these."
            )


def _start_as(policy: nn.Module, adapter: str, other: str) -> None:
    """Copy an adapter's weights to another of its shape, so that both compute the same."""
    if _shape_of(policy, adapter) != _shape_of(policy, other):
        raise ValueError(
            f"peft_config given with ref_adapter_name {other!r}, an adapter of another shape; the policy "
            "starts as its reference, so the new adapter must have its kind, rank, alpha, and modules: give "
            f"peft_config=copy.deepcopy(model.peft_config[{other!r}])."
        )
    given = weights_of(policy, other)
    with torch.no_grad():
        for place, weight in weights_of(policy, adapter).items():
            weight.copy_(given[place])


def _shape_of(policy: nn.Module, adapter: str) -> Any:
    """All that tells how an adapter computes, but its weights' numbers."""
    layers: list[Any] = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]
    scales = [getattr(layer, "scaling", {}).get(adapter) for layer in layers]
    kinds = [type(getattr(layer, "lora_variant", {}).get(adapter)) for layer in layers]
    return {place: weight.shape for place, weight in weights_of(policy, adapter).items()}, scales, kinds


def train_adapter(policy: PeftModel, adapter: str) -> None:
    """Make one adapter active, and it alone trainable."""
    require_adapter(policy, adapter, "model_adapter_name")
    kind = policy.peft_config[adapter]
    if kind.is_prompt_learning or kind.is_adaption_prompt:
        raise ValueError(f"{kind.peft_type} given, which changes prompts, not layers; give a LoraConfig.")
    policy.requires_grad_(False)
    policy.set_adapter(adapter)


def add_value_adapter(policy: nn.Module, shaped_as: str) -> str:
    """A second adapter to be trained, on the trunk alone; it starts as no change. Returns its name.

    shaped_as: the policy's adapter whose rank, scale, and modules it takes.

    Raises:
        ValueError: that is no LoRA, or there is none.
    """
    config = policy.peft_config[shaped_as] if isinstance(policy, PeftModel) else None
    if not isinstance(policy, PeftModel) or not isinstance(config, LoraConfig):
        raise ValueError("value_adapter is true without a LoRA on the policy; give peft_config a LoraConfig.")
    head = causal_lm(policy).get_output_embeddings()
    beyond = [name for name, module in causal_lm(policy).named_modules() if module is head]
    own = dataclasses.replace(
        copy.deepcopy(config),
        init_lora_weights=True,
        inference_mode=False,
        modules_to_save=None,
        trainable_token_indices=None,
        exclude_modules=_excluded(config.exclude_modules, beyond),
    )
    policy.add_adapter(VALUE_ADAPTER, own)
    train_adapter(policy, shaped_as)
    for parameter in parameters_of(policy, VALUE_ADAPTER).values():
        parameter.requires_grad_(True)
    return VALUE_ADAPTER


def _excluded(given: Any, beyond: Sequence[str]) -> Any:
    """A pattern, or names, of modules without an adapter: those given, and these."""
    if isinstance(given, str):
        return "|".join([f"(?:{given})", *map(re.escape, beyond)])
    return sorted({*(given or ()), *beyond}) or None


def require_reward_adapter(policy: nn.Module, adapter: str, trained: str) -> None:
    """Raises ValueError where the policy has no reward adapter of that name, or it is the one trained."""
    require_adapter(policy, adapter, "reward_adapter_name")
    if adapter == trained:
        raise ValueError(
            f"reward_adapter_name is {adapter!r}, which is also the adapter that is trained; the reward must "
            "stay: give model_adapter_name another name."
        )
    if adapter not in getattr(policy, REWARD_HEADS, {}):
        raise ValueError(
            f"reward_adapter_name is {adapter!r}, an adapter without a score head; load it with "
            f"ppo_engine.load_reward_adapter(model, directory, {adapter!r})."
        )


def add_reward_head(policy: PeftModel, adapter: str, weight_1D: Tensor) -> None:
    """The score head of a reward adapter: with it on the policy, and with it never trained nor exported."""
    if not hasattr(policy, REWARD_HEADS):
        policy.add_module(REWARD_HEADS, nn.ModuleDict())
    head = ScalarHead(weight_1D.shape[1], bias=False)
    with torch.no_grad():
        head.weight.copy_(weight_1D)
    getattr(policy, REWARD_HEADS)[adapter] = head.to(causal_lm(policy).device)
    for parameter in parameters_of(policy, adapter).values():
        parameter.requires_grad_(False)


def require_adapter(policy: nn.Module, adapter: str, field: str) -> None:
    """Raises ValueError where the policy has no adapter of that name."""
    known = sorted(policy.peft_config) if isinstance(policy, PeftModel) else []
    if adapter not in known:
        raise ValueError(
            f"{field} is {adapter!r}; the policy has the adapters {known}: load it under that name."
        )


def adapter_settings(policy: nn.Module, adapter: str) -> dict[str, JsonValue]:
    """What tells one adapter's shape and scale from another's, by the names a script gave them."""
    if not isinstance(policy, PeftModel):
        return {}
    config = policy.peft_config[adapter]
    targets = getattr(config, "target_modules", None)
    settings: dict[str, JsonValue] = {
        f"peft_config.{name}": getattr(config, name, None) for name in ("r", "lora_alpha", "use_rslora")
    }
    settings["peft_config.target_modules"] = targets if isinstance(targets, str) else sorted(targets or ())
    settings["peft_config.modules_to_save"] = sorted(getattr(config, "modules_to_save", None) or ())
    return settings


def facts_of(model: nn.Module, tokenizer: Any = None) -> ModelFacts:
    """What the rules of a plan need of a loaded model, and of its tokenizer where it has one of its own."""
    language_model = causal_lm(model)
    config = language_model.config.get_text_config()
    shapes = _base_shapes(language_model)
    return ModelFacts(
        model_type=config.model_type,
        architectures=tuple(language_model.config.architectures or ()),
        vocab_size=config.vocab_size,
        context_length=getattr(config, "max_position_embeddings", None),
        hidden_size=config.hidden_size,
        linears=linears(shapes),
        modules=modules(shapes, config.vocab_size),
        tokenizer=tokenizer
        and TokenizerFacts(
            pad_token=tokenizer.pad_token,
            eos_token=tokenizer.eos_token,
            chat_template=bool(tokenizer.chat_template),
        ),
    )


def _base_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of all weights, by the names they have without adapters; those of adapters are left out."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tuple(weight.shape)
        for name, weight in model.named_parameters()
        if ".lora_" not in name and ".modules_to_save." not in name
    }


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy whose weights will not be trained: the reference of full fine-tuning."""
    return copy.deepcopy(model).requires_grad_(False)


def disable_dropout(model: nn.Module) -> None:
    """Switch dropout off in the modules, whatever mode they are in; the config keeps its numbers.

    Some architectures hold the rate in an nn.Dropout, others in a number they read in training mode.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def recompute_activations(model: nn.Module, kwargs: Any) -> None:
    """Keep few activations for the backward pass, and compute the others again.

    kwargs: a dict or None; `every_n_layers` and `offload` as in Trainer, others of `torch.utils.checkpoint`.

    Raises:
        ValueError: they leave no way to compute a layer again with the adapter of its forward.
    """
    given = dict(kwargs or {})
    layers = {name: given.pop(name) for name in ("every_n_layers", "offload") if name in given}
    given = given or {"use_reentrant": False}
    if isinstance(model, PeftModel) and VALUE_ADAPTER in model.peft_config:
        if given.get("use_reentrant", True) or "context_fn" in given:
            raise ValueError(
                "activation_checkpointing_kwargs has use_reentrant not false, or a context_fn, with an "
                "adapter for the value; the way back needs use_reentrant false and a context_fn of its own."
            )
        given["context_fn"] = Switch(model).recomputing
    enable: Any = causal_lm(model).activation_checkpointing_enable
    enable(activation_checkpointing_kwargs=given, **layers)


def set_modes(model: nn.Module) -> None:
    """Evaluation mode, but for the layers that recompute activations: they do so in training only."""
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


@contextmanager
def generation_mode(policy: nn.Module) -> Iterator[None]:
    """Inside, no layer recomputes activations: they cannot do so and keep a cache."""
    try:
        policy.eval()
        yield
    finally:
        set_modes(policy)


def check_value_model(value_model: nn.Module | None, policy: ModelFacts, loc: Loc = ("value_model",)) -> None:
    """See that a value model can be the critic of a policy.

    Raises:
        SpecError: it has no `score` head with one output, or breaks a rule of `role_rules.check_value_model`.
    """
    if value_model is None:
        return
    score = getattr(value_model, "score", None)
    outputs = getattr(score, "out_features", None)
    if not hasattr(value_model, "base_model_prefix") or outputs != 1:
        msg = (
            f"A {type(value_model).__name__} given whose score head has {outputs} outputs; a value is one "
            "number: give a ...ForSequenceClassification with num_labels=1, or None for a head on the "
            "policy's trunk."
        )
        raise SpecError([Issue(loc=loc, msg=msg)])
    issues = list(role_rules.check_value_model(facts_of(value_model), policy, loc))
    if issues:
        raise SpecError(issues)


@contextmanager
def reference_adapter(policy: PeftModel, ref_adapter_name: str | None) -> Iterator[None]:
    """Inside, the policy computes as the reference: adapters off, or the named one on.

    Afterwards, whatever happened, active adapters, `requires_grad`, and modes are as before, even where what
    was done inside has changed them: peft's own switches and a generation do.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    modes = [(module, module.training) for module in policy.modules()]
    try:
        with Switch(policy).computing_with(ref_adapter_name):
            yield
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training


@torch.no_grad()
def check_output_layer(policy: nn.Module) -> None:
    """See that logits from hidden states are those of the model's own forward.

    Raises:
        ValueError: the architecture changes its logits in a way this engine does not know.
    """
    model: Any = causal_lm(policy).eval()
    ids = torch.arange(4, device=model.device)[None]
    own = model(input_ids=ids, use_cache=False).logits.float()
    ours = output_logits(model)(trunk(model)(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(own, ours, rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"{type(model).__name__} changes its logits after the output layer in a way that is not "
            "supported; please report the architecture."
        )
