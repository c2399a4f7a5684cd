"""`PPOConfig`: the trainer's arguments for scripts, under TRL 1.12's names, and the bridge from a spec.

It inherits every field of `transformers.TrainingArguments`; which of them are honoured stands in `inherited`.
This module knows no models and no data.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import JsonValue, ValidationError
from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from ppo_engine.facts import Facts, ModelFacts
from ppo_engine.hyperparameters import (
    Hyperparameters,
    check_hyperparameters,
    check_missing_stop,
    is_greater_better,
)
from ppo_engine.inherited import refused_arguments, refused_values
from ppo_engine.issues import Issue, SpecError, issues_of, shown
from ppo_engine.parallel import before_processes_meet
from ppo_engine.plan import Schedule, check, check_batches, schedule
from ppo_engine.reporting import check_trackers
from ppo_engine.role_rules import check_lengths, check_policy, check_prompt_lengths, check_targets
from ppo_engine.spec import PromptLengths, RunSpec, ValueAdapter, critic


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PPOConfig(TrainingArguments):
    """Arguments of `PPOTrainer`. Steps (logging, saving, evaluation, warm-up) are updates: one rollout and
    all optimizer steps on it. Each field's meaning stands in its `help`.

    Raises:
        SpecError: a value is out of range, fields contradict each other, a derived size is given that differs
            from the derived one, or an inherited argument, or a value of one, is given that PPO does not
            honour.
    """

    learning_rate: float = _option(3e-6, "Peak learning rate of AdamW.")
    logging_steps: float = _option(10, "Updates between two logs; below 1: a share of the run.")
    gradient_checkpointing: bool | None = _option(True, "Recompute activations in the backward pass.")
    bf16: bool | None = _option(  # type: ignore[assignment]
        None,
        "bf16 mixed precision. Not given: as accelerate launch is told, or where the accelerator has it.",
    )
    dataset_num_proc: int | None = _option(None, "For scripts: processes that prepare the data set.")
    num_mini_batches: int = _option(1, "Mini-batches a batch is cut into: optimizer steps per epoch.")
    total_episodes: int | None = _option(None, "Responses of the whole run; else num_train_epochs passes.")
    local_rollout_forward_batch_size: int = _option(64, "Rows sampled and scored at a time, per process.")
    num_sample_generations: int = _option(10, "How often in the run sample completions are shown.")
    response_length: int = _option(53, "Most tokens of a response.")
    stop_token: Literal["eos"] | None = _option(None, "'eos': responses end after the tokenizer's eos token.")
    stop_token_id: int | None = _option(None, "Or the id of the token they end after.")
    temperature: float = _option(0.7, "Of sampling, and of every log-probability.")
    missing_eos_penalty: float | None = _option(
        None, "Taken off the score of a response that did not reach its stop token; positive."
    )
    sft_model_path: str = _option("EleutherAI/pythia-160m", "For scripts: where the policy starts.")
    world_size: int | None = _option(None, "Processes of the run; derived.")
    num_total_batches: int | None = _option(None, "Updates of the run; derived.")
    micro_batch_size: int | None = _option(None, "Rows of a micro-batch over all processes; derived.")
    local_batch_size: int | None = _option(None, "Rows of a batch per process; derived.")
    batch_size: int | None = _option(None, "Rows of a batch over all processes; derived.")
    local_mini_batch_size: int | None = _option(None, "Rows of a mini-batch per process; derived.")
    mini_batch_size: int | None = _option(None, "Rows of a mini-batch over all processes; derived.")
    push_to_hub: bool = _option(False, "Push the policy to the hub, as hub_strategy says.")
    reward_model_path: str = _option("EleutherAI/pythia-160m", "For scripts: the reward model.")
    model_adapter_name: str | None = _option(None, "The adapter that is trained, where there are several.")
    ref_adapter_name: str | None = _option(None, "The adapter that is the reference.")
    num_ppo_epochs: int = _option(4, "Passes over each batch of responses.")
    whiten_rewards: bool = _option(False, "Scale rewards to unit variance over the batch, mean kept.")
    normalize_scores: bool = _option(False, "Normalise scores by their running mean and deviation.")
    score_scale: float = _option(1.0, "Scores are multiplied by it, after normalisation.")
    score_clip: float | None = _option(None, "No score is then further from 0 than this.")
    kl_coef: float = _option(0.05, "Weight of the divergence from the reference; where it adapts, at first.")
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = _option(
        "k1", "Schulman 2020: k1 = -log r; k2 = (log r)^2 / 2; k3 = (r - 1) - log r; abs = |log r|."
    )
    kl_placement: Literal["reward", "loss"] = _option("reward", "Where the divergence is paid.")
    adaptive_kl_target: float | None = _option(None, "The divergence of a response kl_coef is steered to.")
    adaptive_kl_horizon: float | None = _option(None, "Responses over which it is; by default 10,000.")
    early_stop_kl: float | None = _option(None, "An update ends after a step with approxkl above this.")
    advantage_estimator: Literal["gae", "rloo", "grpo", "reinforce++"] = _option(
        "gae", "gae: with a critic; rloo, grpo, reinforce++: without any."
    )
    num_return_sequences: int = _option(1, "Responses to each prompt of a batch.")
    whiten_advantages: bool | None = _option(
        None, "Scale advantages to mean 0, variance 1. Not given: with gae and reinforce++."
    )
    cliprange: float = _option(0.2, "Clip range of the probability ratio.")
    cliprange_high: float | None = _option(None, "The same upwards; by default cliprange.")
    dual_clip: float | None = _option(None, "Bounds the loss where the advantage is negative; above 1.")
    loss_aggregation: Literal["token_mean", "sequence_mean"] = _option(
        "token_mean", "A step's loss: the mean over its tokens, or over its responses' means."
    )
    entropy_coef: float = _option(0.0, "Weight of the policy's entropy, which the loss rewards.")
    vf_coef: float = _option(0.1, "Weight of the value loss.")
    critic_warmup: int = _option(0, "Updates at the start in which only the critic learns.")
    critic_learning_rate: float | None = _option(None, "Of the critic, at its highest; else learning_rate.")
    reward_adapter_name: str | None = _option(
        None, "The adapter whose score head gives a reward; see ppo_engine.load_reward_adapter."
    )
    value_adapter: bool = _option(
        False, "The value has an adapter of its own on the policy's base, shaped as the policy's."
    )
    cliprange_value: float = _option(0.2, "Clip range of the value's move.")
    gamma: float = _option(1.0, "Discount per token.")
    lam: float = _option(0.95, "Lambda of generalised advantage estimation.")
    overlong_prompts: Literal["refuse", "drop", "truncate"] = _option(
        "refuse", "Of prompts above max_prompt_length: refuse names them; truncate keeps a prompt's end."
    )
    max_prompt_length: int | None = _option(
        None, "Most tokens of a prompt; by default, and at most, the context less response_length."
    )
    ds3_gather_for_generation: bool = _option(
        True, "Under ZeRO-3: gather the policy for generation; off: slower, for policies larger than a GPU."
    )

    given_world_size: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if issues := _settle_precision(self):
            raise SpecError(issues)
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = is_greater_better(self.metric_for_best_model)
        if self.activation_checkpointing is None:  # TRL's name is transformers' deprecated alias
            self.activation_checkpointing = self.gradient_checkpointing
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        before_processes_meet()
        super().__post_init__()  # type: ignore[no-untyped-call]
        issues = [
            *refused_arguments(self, PPOConfig.__annotations__),
            *refused_values(self),
            *check_trackers(self.report_to or ()),
        ]
        ppo = hyperparameters(self)
        prompt_lengths(self)
        assert self.world_size is not None, "read, it is the number of processes"
        issues += [*check_hyperparameters(ppo), *check_batches(ppo, self.world_size, prompts=None)]
        if issues:
            raise SpecError(issues)

    @classmethod
    def from_spec(cls, spec: RunSpec, facts: Facts, output_dir: str | Path, **overrides: Any) -> PPOConfig:
        """The arguments of a spec's run.

        Raises:
            SpecError: with the issues of `plan.check(spec, facts)`, where there are any.
        """
        issues = check(spec, facts)
        if issues:
            raise SpecError(issues)
        given = spec.ppo.model_dump(exclude={"eval_steps"})
        return cls(
            output_dir=str(output_dir),
            bf16=spec.resources.precision == "bf16",
            per_device_eval_batch_size=spec.ppo.local_rollout_forward_batch_size,
            value_adapter=isinstance(critic(spec), ValueAdapter),
            overlong_prompts=spec.prompts.overlong,
            max_prompt_length=spec.prompts.max_length,
            eval_strategy="no" if spec.ppo.eval_steps is None else "steps",
            eval_steps=spec.ppo.eval_steps,
            **{**given, "logging_steps": 1, **overrides},
        )


def _settle_precision(args: PPOConfig) -> list[Issue]:
    """Turn bf16 on or off: as it is given, or the launcher was told, or the accelerator has it.

    `accelerate launch` says "no" also where its user has said nothing, so that contradicts nothing.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    has_bf16 = is_torch_bf16_gpu_available()
    given = args.bf16
    if given is None:
        args.bf16 = launched == "bf16" or (not args.use_cpu and has_bf16)
    if launched not in ("no", "bf16") or (launched == "bf16" and given is False):
        msg = (
            f"{shown(given)} given, and mixed precision {shown(launched)} to accelerate launch (variable "
            "ACCELERATE_MIXED_PRECISION); PPOTrainer trains in bf16 or in fp32: give both bf16, or none."
        )
    elif args.bf16 and not args.use_cpu and not has_bf16:
        msg = "true given; no accelerator here computes in it: leave it out, or give use_cpu."
    else:
        return []
    return [Issue(loc=("bf16",), msg=msg)]


_HYPERPARAMETERS = tuple(name for name in Hyperparameters.model_fields if name != "eval_steps")


def hyperparameters(args: PPOConfig) -> Hyperparameters:
    """The hyperparameters of a script's arguments, held to the rules of a spec's.

    Raises:
        SpecError: with locs as in `PPOConfig`.
    """
    given = {name: getattr(args, name) for name in _HYPERPARAMETERS}
    given["lr_scheduler_type"] = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    given["gradient_checkpointing"] = bool(args.gradient_checkpointing)
    # Where Trainer takes more than a spec does (a share of the run, any schedule), the trainer resolves it.
    for name in ("save_steps", "warmup_steps"):
        if given[name] is not None and 0 <= given[name] < 1:
            given.pop(name)
        else:
            given[name] = int(given[name])
    if given["lr_scheduler_type"] not in ("linear", "constant", "cosine", "constant_with_warmup"):
        given.pop("lr_scheduler_type")
    try:
        return Hyperparameters.model_validate(given)
    except ValidationError as error:
        raise SpecError(issues_of(error, given)) from None


def prompt_lengths(args: PPOConfig) -> PromptLengths:
    """How long prompts may be, held to the rules of a spec's.

    Raises:
        SpecError: with locs as in `PPOConfig`.
    """
    given = {field: getattr(args, name) for field, name in _PROMPT_LENGTHS.items()}
    try:
        return PromptLengths.model_validate(given)
    except ValidationError as error:
        raise SpecError(_as_arguments(issues_of(error, given))) from None


_PROMPT_LENGTHS = {"overlong": "overlong_prompts", "max_length": "max_prompt_length"}


def _as_arguments(issues: Iterable[Issue]) -> list[Issue]:
    return [Issue(loc=(_PROMPT_LENGTHS[str(issue.loc[0])],), msg=issue.msg) for issue in issues]


def beside_hyperparameters(args: PPOConfig) -> dict[str, JsonValue]:
    """What else of a script's arguments must be the same for a run to go on as it began."""
    return {
        "bf16": args.bf16,
        "optim": OptimizerNames(args.optim).value,
        "optim_args": args.optim_args,
        "lr_scheduler_type": SchedulerType(args.lr_scheduler_type).value,
        "lr_scheduler_kwargs": args.lr_scheduler_kwargs,
        "warmup_steps": args.warmup_steps,
    }


def check_args(
    args: PPOConfig, prompts: int, model: ModelFacts, target_modules: Iterable[str] | str | None = None
) -> tuple[Hyperparameters, Schedule]:
    """The hyperparameters and the derived sizes of a script's arguments, for a number of prompts and a model.

    target_modules: of a new adapter, where there is one.

    Raises:
        SpecError: they break a rule, or a derived size is given that differs.
    """
    ppo = hyperparameters(args)
    world_size = args.world_size
    assert world_size is not None, "read, it is the number of processes"
    issues = [
        *check_hyperparameters(ppo),
        *check_batches(ppo, world_size, prompts),
        *check_lengths(ppo, model),
        *_as_arguments(check_prompt_lengths(prompt_lengths(args), ppo, model)),
        *check_policy(model),
        *_check_eos(ppo, model),
        *_check_targets(target_modules, model),
    ]
    if issues:
        raise SpecError(issues)
    derived = schedule(ppo, world_size, prompts)
    issues = [
        Issue(loc=(name,), msg=f"{given} given; it is derived, and is {size}: leave it out.")
        for name, size in derived.model_dump(exclude={"total_episodes", "optimizer_steps"}).items()
        if (given := args.given_world_size if name == "world_size" else getattr(args, name)) is not None
        and given != size
    ]
    if issues:
        raise SpecError(issues)
    return ppo, derived


def _check_eos(ppo: Hyperparameters, model: ModelFacts) -> Iterator[Issue]:
    """A penalty without a stop token is for responses without the tokenizer's eos, as in TRL."""
    tokenizer = model.tokenizer
    if tokenizer is not None and tokenizer.eos_token is None and list(check_missing_stop(ppo)):
        yield Issue(
            loc=("missing_eos_penalty",),
            msg=f"{ppo.missing_eos_penalty} given without a stop token, and the tokenizer has no eos token, "
            "so every response would pay it: give stop_token_id.",
        )


def _check_targets(target_modules: Iterable[str] | str | None, model: ModelFacts) -> list[Issue]:
    # A pattern, or none where peft knows the architecture: peft finds out by itself.
    if target_modules is None or isinstance(target_modules, str):
        return []
    issues = check_targets(sorted(target_modules), model)  # peft keeps a set
    return [Issue(loc=("peft_config", *issue.loc), msg=issue.msg) for issue in issues]


def _set_world_size(args: PPOConfig, given: int | None) -> None:
    vars(args)["given_world_size"] = given


# TRL's argument hides a property of TrainingArguments that Trainer needs: what is given is kept beside it,
# to be checked, and what is read is the number of processes there really are.
PPOConfig.world_size = property(TrainingArguments.world_size.fget, _set_world_size)  # type: ignore
