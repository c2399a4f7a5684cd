"""What the trainer's constructor is given: the rules between its arguments that no spec has.

This module moves and changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ppo_engine.config import PPOConfig
from ppo_engine.hyperparameters import Hyperparameters
from ppo_engine.issues import Issue, SpecError, shown


def require_eval_prompts(args: PPOConfig, eval_dataset: Any) -> None:
    """Raises SpecError where an evaluation is asked for, and nothing given to evaluate on."""
    if eval_dataset is None and (args.eval_on_start or args.eval_strategy != "no"):
        asked = "eval_on_start" if args.eval_on_start else "eval_strategy"
        msg = f"Nothing given, and {asked} asks for an evaluation; give prompts to evaluate on."
        raise SpecError([Issue(loc=("eval_dataset",), msg=msg)])


def require_own_metrics(data_sets: Collection[str]) -> None:
    """Raises SpecError where the metrics of two evaluation sets, by their names, could be called the same."""
    for name in data_sets:
        for other in data_sets:
            if name.startswith(f"{other}/"):
                msg = (
                    f"{shown(name)} given beside {shown(other)}; metrics of the one could have the names of "
                    "the other's: give a name that does not begin with another one and a slash."
                )
                raise SpecError([Issue(loc=("eval_dataset", name), msg=msg)])


def check_value_adapter(
    args: PPOConfig, ppo: Hyperparameters, value_model: nn.Module | None, has_adapters: bool
) -> None:
    """Raises SpecError where an adapter for the value is asked for, and there is no place for it."""
    if not args.value_adapter:
        return
    wrong = {
        "value_model, which is another critic: give one of them": value_model is not None,
        f"advantage_estimator {shown(ppo.advantage_estimator)}, which has no critic: leave it out": (
            not ppo.has_critic
        ),
        "full fine-tuning, which has no adapters: give peft_config, or leave it out": not has_adapters,
    }
    issues = [
        Issue(loc=("value_adapter",), msg=f"true given with {why}.")
        for why, is_wrong in wrong.items()
        if is_wrong
    ]
    if issues:
        raise SpecError(issues)


def require_all_parameters(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Raises ValueError where a script's optimizer lacks parameters, which would never be trained."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    lacking = [
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and id(parameter) not in held
    ]
    if lacking:
        raise ValueError(
            f"The optimizer in optimizers lacks {len(lacking)} parameters that are to be trained, such as "
            f"{', '.join(lacking[:4])}: give it those of the policy and of a value_model that you make, or "
            "leave optimizers out (a value head is made by the trainer, and so is an adapter of peft_config)."
        )


def refuse_critic_rates(ppo: Hyperparameters) -> None:
    """Raises SpecError where a script's optimizer leaves no say to the critic's arguments."""
    for name in ("critic_learning_rate", "critic_warmup"):
        if given := getattr(ppo, name):
            msg = f"{given} given with optimizers, which has rates of its own: leave one of them out."
            raise SpecError([Issue(loc=(name,), msg=msg)])


def stop_token_id(args: PPOConfig, tokenizer: Any) -> int | None:
    """The id responses end after; None: they have full length."""
    if args.stop_token is None:
        return args.stop_token_id
    eos_token_id: int | None = tokenizer.eos_token_id
    assert eos_token_id is not None, "the rules ask for it"
    return eos_token_id
