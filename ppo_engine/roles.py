"""Which weights play which role: policy, reference, value, reward; and switching adapters between roles.

With adapters one base serves policy and reference: the reference is the base with adapters off, or with
another adapter on. This module does not know processes or the training loop.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from ppo_engine import plan
from ppo_engine.actor_critic import causal_lm, output_logits, trunk
from ppo_engine.facts import ModelFacts, TokenizerFacts, linears
from ppo_engine.spec import DEFAULT_ADAPTER, Loc, SpecError


def build_policy(model: nn.Module, peft_config: PeftConfig | None, adapter: str | None) -> nn.Module:
    """The policy: the model, or the model with a new adapter, of which only the adapter is trained.

    Raises:
        TypeError: `peft_config` is no PeftConfig.
        ValueError: a peft model and a `peft_config` are given together, or the adapter does not exist.
    """
    if peft_config is not None:
        if not isinstance(peft_config, PeftConfig):
            raise TypeError(
                f"peft_config is a {type(peft_config).__name__}; give a peft.PeftConfig, such as LoraConfig."
            )
        if isinstance(model, PeftModel):
            raise ValueError(
                "model is a PeftModel and peft_config is given too; merge and unload the model's adapter "
                "first, or leave peft_config out to train the adapter it has."
            )
        model = get_peft_model(model, peft_config, adapter_name=adapter or DEFAULT_ADAPTER)
    if isinstance(model, PeftModel):
        train_adapter(model, adapter or DEFAULT_ADAPTER)
    return model


def train_adapter(policy: PeftModel, adapter: str) -> None:
    """Make one adapter active, and it alone trainable."""
    require_adapter(policy, adapter, "model_adapter_name")
    policy.requires_grad_(False)
    policy.set_adapter(adapter)


def require_adapter(policy: nn.Module, adapter: str, field: str) -> None:
    """Raises ValueError where the policy has no adapter of that name."""
    known = sorted(policy.peft_config) if isinstance(policy, PeftModel) else []
    if adapter not in known:
        raise ValueError(
            f"{field} is {adapter!r}; the policy has the adapters {known}: load it under that name."
        )


def facts_of(model: nn.Module, tokenizer: Any = None) -> ModelFacts:
    """What the rules of a plan need of a loaded model, and of its tokenizer where it has one of its own."""
    language_model = causal_lm(model)
    config = language_model.config.get_text_config()
    return ModelFacts(
        model_type=config.model_type,
        architectures=tuple(language_model.config.architectures or ()),
        vocab_size=config.vocab_size,
        context_length=getattr(config, "max_position_embeddings", None),
        linears=linears({name: tuple(weight.shape) for name, weight in language_model.named_parameters()}),
        tokenizer=tokenizer
        and TokenizerFacts(
            pad_token=tokenizer.pad_token,
            eos_token=tokenizer.eos_token,
            chat_template=bool(tokenizer.chat_template),
        ),
    )


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
    """
    given = dict(kwargs or {})
    layers = {name: given.pop(name) for name in ("every_n_layers", "offload") if name in given}
    enable: Any = causal_lm(model).activation_checkpointing_enable
    enable(activation_checkpointing_kwargs=given or {"use_reentrant": False}, **layers)


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
        ValueError: it has no `score` head with one output.
        SpecError: it breaks a rule of `plan.check_value_model`.
    """
    if value_model is None:
        return
    score = getattr(value_model, "score", None)
    outputs = getattr(score, "out_features", None)
    if not hasattr(value_model, "base_model_prefix") or outputs != 1:
        raise ValueError(
            f"value_model is a {type(value_model).__name__} whose score head has {outputs} outputs; give a "
            "...ForSequenceClassification with num_labels=1, or None for a head on the policy's trunk."
        )
    issues = list(plan.check_value_model(facts_of(value_model), policy, loc))
    if issues:
        raise SpecError(issues)


@contextmanager
def reference_adapter(policy: PeftModel, ref_adapter_name: str | None) -> Iterator[None]:
    """Inside, the policy computes as the reference: adapters off, or the named one on.

    Afterwards, whatever happened, active adapters, `requires_grad`, and modes are as before: peft's own
    switches change `requires_grad`.
    """
    active = list(policy.active_adapters)
    trained = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    modes = [(module, module.training) for module in policy.modules()]
    try:
        if ref_adapter_name is None:
            policy.base_model.disable_adapter_layers()
        else:
            policy.set_adapter(ref_adapter_name)
        yield
    finally:
        policy.base_model.enable_adapter_layers()
        policy.base_model.set_adapter(active)
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
