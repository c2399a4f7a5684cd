"""The arguments that `PPOConfig` inherits from `transformers.TrainingArguments`: which the PPO loop honours.

No argument is read and then forgotten: all others must keep their defaults. Knows no argument of PPO's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from ppo_engine.issues import Issue, shown

HONOURED = frozenset(
    {
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "bf16",
        "ddp_backend",
        "ddp_timeout",
        "deepspeed",
        "disable_tqdm",
        "eval_on_start",
        "eval_steps",
        "eval_strategy",
        "full_determinism",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "greater_is_better",
        "hub_model_id",
        "hub_private_repo",
        "hub_revision",
        "hub_strategy",
        "hub_token",
        "learning_rate",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_first_step",
        "logging_steps",
        "logging_strategy",
        "lr_scheduler_kwargs",
        "lr_scheduler_type",
        "max_grad_norm",
        "metric_for_best_model",
        "num_train_epochs",
        "optim",
        "optim_args",
        "output_dir",
        "per_device_eval_batch_size",
        "per_device_train_batch_size",
        "project",
        "push_to_hub",
        "report_to",
        "restore_callback_states_from_checkpoint",
        "run_name",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "seed",
        "tf32",
        "trackio_bucket_id",
        "trackio_space_id",
        "trackio_static_space_id",
        "use_cpu",
        "warmup_steps",
        "weight_decay",
    }
)
"""Inherited arguments that do in the PPO loop what their help says."""

FOR_SCRIPTS = frozenset({"do_eval", "do_predict", "do_train", "local_rank", "resume_from_checkpoint"})
"""Inherited arguments that Trainer itself never reads: scripts and launchers do.
Every argument that is in neither set must keep its default."""

_BY_STEPS = ("no", "steps")  # a pass over the prompts is no unit of PPO, which counts updates
_BY_METRIC = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
_BY_OWN_LOOP = ("lomo", "galore", "apollo", "schedule_free")  # they need more of a loop than step()
HONOURED_VALUES: dict[str, tuple[str, ...]] = {
    "eval_strategy": _BY_STEPS,
    "logging_strategy": _BY_STEPS,
    "save_strategy": _BY_STEPS,
    "hub_strategy": ("every_save", "end"),  # the others push checkpoints, which hold critic and optimizer
    "lr_scheduler_type": tuple(kind.value for kind in SchedulerType if kind not in _BY_METRIC),
    "optim": tuple(
        name.value for name in OptimizerNames if not any(word in name.value for word in _BY_OWN_LOOP)
    ),
}
"""Of honoured arguments, the values that are."""


def refused_values(args: TrainingArguments) -> list[Issue]:
    """One issue for each honoured argument whose value is not."""
    return [
        Issue(
            loc=(name,),
            msg=f"{shown(given)} given; PPOTrainer honours {', '.join(honoured)}: choose of these.",
        )
        for name, honoured in HONOURED_VALUES.items()
        if (given := str(getattr(args, name).value)) not in honoured
    ]


def refused_arguments(args: TrainingArguments, own: Collection[str]) -> list[Issue]:
    """One issue for each inherited argument that is given and not honoured. own: those of a subclass."""
    untouched = TrainingArguments(output_dir=args.output_dir, use_cpu=args.use_cpu, report_to="none")
    return [
        Issue(
            loc=(inherited.name,),
            msg=f"{shown(given)} given; PPOTrainer does not honour this argument: leave it out.",
        )
        for inherited in dataclasses.fields(TrainingArguments)
        if inherited.name not in HONOURED | FOR_SCRIPTS | set(own)
        if (given := getattr(args, inherited.name)) != getattr(untouched, inherited.name)
    ]
