"""What the trainer's constructor is given: the rules between its arguments that no spec has.

This module moves and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ppo_engine.config import PPOConfig
from ppo_engine.hyperparameters import Hyperparameters
from ppo_engine.issues import Issue, SpecError, shown
from ppo_engine.spec import check_best_metric


def require_train_prompts(train_dataset: Any) -> None:
    """Raises SpecError where there is nothing to train on."""
    if train_dataset is None:
        msg = "None given; a run needs prompts to train on: give a data set."
        raise SpecError([Issue(loc=("train_dataset",), msg=msg)])


def require_own_reference(model: nn.Module, ref_model: nn.Module | None) -> None:
    """Raises SpecError where the reference would move with the policy."""
    if ref_model is model:
        msg = (
            "The same object as model given; the reference would move with the policy: give a copy, or "
            "None to have one made (with adapters: the base serves as the reference)."
        )
        raise SpecError([Issue(loc=("ref_model",), msg=msg)])


def require_stop_token(environment: object, stop_token_id: int | None) -> None:
    """Raises SpecError where a turn would have no end at which an environment could answer."""
    if environment is not None and stop_token_id is None:
        msg = "Given without a stop token, at which it would answer; give stop_token or stop_token_id."
        raise SpecError([Issue(loc=("environment",), msg=msg)])


def require_evaluations(args: PPOConfig, eval_dataset: Any) -> dict[str, Any]:
    """The data sets to evaluate on, as `evaluation_sets` has them.

    Raises:
        SpecError: there are none, and an evaluation is asked for; or as `evaluation_sets`.
    """
    if eval_dataset is None and (args.eval_on_start or args.eval_strategy != "no"):
        asked = "eval_on_start" if args.eval_on_start else "eval_strategy"
        msg = f"Nothing given, and {asked} asks for an evaluation; give prompts to evaluate on."
        raise SpecError([Issue(loc=("eval_dataset",), msg=msg)])
    return evaluation_sets(eval_dataset)


def evaluation_sets(given: Any) -> dict[str, Any]:
    """By what follows "eval" in the names of their metrics: nothing, or the name of each of several.

    Raises:
        SpecError: the metrics of two of them could be called the same.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return {"": given}
    for name in given:
        for other in given:
            if name.startswith(f"{other}/"):
                msg = (
                    f"{shown(name)} given beside {shown(other)}; metrics of the one could have the names of "
                    "the other's: give a name that does not begin with another one and a slash."
                )
                raise SpecError([Issue(loc=("eval_dataset", name), msg=msg)])
    return {f"/{name}": rows for name, rows in given.items()}


def require_best_metric(
    args: PPOConfig, ppo: Hyperparameters, rewards: Sequence[str], evaluated: Mapping[str, Any]
) -> None:
    """Raises SpecError where no metric of the run has the name that tells the best checkpoint.

    rewards: their names. evaluated: as `require_evaluations` gives them.
    """
    evaluations = [] if args.eval_strategy == "no" else [f"eval{suffix}" for suffix in evaluated]
    if issues := list(check_best_metric(ppo, rewards, evaluations)):
        raise SpecError(issues)


def check_critic(
    args: PPOConfig, ppo: Hyperparameters, value_model: nn.Module | None, *, has_adapters: bool
) -> None:
    """Raises SpecError where a critic is given, or asked for, and there is no place for it."""
    estimator = f"advantage_estimator {shown(ppo.advantage_estimator)}, which has no critic: leave it out"
    wrong = {
        "value_model, which is another critic: give one of them": value_model is not None,
        estimator: not ppo.has_critic,
        "full fine-tuning, which has no adapters: give peft_config, or leave it out": not has_adapters,
    }
    issues = [
        Issue(loc=("value_adapter",), msg=f"true given with {why}.")
        for why, is_wrong in wrong.items()
        if is_wrong and args.value_adapter
    ]
    if value_model is not None and not ppo.has_critic:
        issues.append(
            Issue(loc=("value_model",), msg=f"A {type(value_model).__name__} given with {estimator}.")
        )
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
