"""Every number that follows from a spec, worked out once, and every rule that needs a fact to be checked.

The API plans before it accepts a job, the worker before it starts an engine, and the trainer before it
loads a model: the same functions, so the same words. This module knows no torch and loads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from pydantic import BaseModel, ConfigDict

from ppo_engine import footprint
from ppo_engine.facts import Facts
from ppo_engine.hyperparameters import Hyperparameters
from ppo_engine.issues import Issue, Loc, SpecError, shown
from ppo_engine.model_sources import LocalModel, public_name
from ppo_engine.reward_kinds import ModelReward, ReferencePart
from ppo_engine.role_rules import (
    check_adapter,
    check_base,
    check_head,
    check_lengths,
    check_named_base,
    check_policy,
    check_prompt_lengths,
    check_reward_model,
    check_saved_modules,
    check_targets,
    check_value_model,
    same_name,
)
from ppo_engine.spec import Lora, RunSpec, ValueModel, check_fields, critic, trained_from

_WHITEN_ROWS = 8
_MOST_EPISODES = 2**31


class BatchSizes(BaseModel):
    """How rows are cut, under TRL's names: `local_` is per process, `micro` one forward, `mini` one step."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    world_size: int
    """Processes."""
    batch_size: int
    """Rows of an update, of all processes."""
    local_batch_size: int
    """Rows of an update, per process."""
    micro_batch_size: int
    """Rows of one forward and backward, of all processes."""
    mini_batch_size: int
    """Rows of an optimizer step, of all processes."""
    local_mini_batch_size: int
    """Rows of an optimizer step, per process."""


class Schedule(BatchSizes):
    """How long a run is."""

    total_episodes: int
    """Responses asked for; the last update may exceed them."""
    num_total_batches: int
    """Updates."""
    optimizer_steps: int
    """Of the whole run."""


class Plan(Schedule):
    """What a run will do and need."""

    parameters_trained: int | None
    """Weights that change; null where nothing is known of the model."""
    memory: dict[str, int] | None
    """Bytes by role, per process without sharding, activations and caches left out; null where nothing is
    known of the model."""
    warnings: tuple[str, ...]
    """What is allowed, and may not be what was meant."""


def batch_sizes(ppo: Hyperparameters, world_size: int) -> BatchSizes:
    """The sizes of all batches; meaningful only where `check_batches` finds nothing."""
    local = ppo.per_device_train_batch_size * ppo.gradient_accumulation_steps
    return BatchSizes(
        world_size=world_size,
        batch_size=local * world_size,
        local_batch_size=local,
        micro_batch_size=ppo.per_device_train_batch_size * world_size,
        mini_batch_size=local * world_size // ppo.num_mini_batches,
        local_mini_batch_size=local // ppo.num_mini_batches,
    )


def schedule(ppo: Hyperparameters, world_size: int, prompts: int) -> Schedule:
    """How long a run is; meaningful only where `check_batches` finds nothing."""
    sizes = batch_sizes(ppo, world_size)
    episodes = _episodes(ppo, prompts)
    updates = math.ceil(episodes / sizes.batch_size)
    return Schedule(
        **sizes.model_dump(),
        total_episodes=episodes,
        num_total_batches=updates,
        optimizer_steps=updates * ppo.num_ppo_epochs * ppo.num_mini_batches,
    )


def check(spec: RunSpec, facts: Facts) -> list[Issue]:
    """Every rule that the spec breaks, given what is known."""
    issues = list(check_fields(spec))
    issues += _under("ppo", check_batches(spec.ppo, spec.resources.gpus, facts.prompts))
    if facts.model is not None:
        issues += check_policy(facts.model)
        issues += _under("ppo", check_lengths(spec.ppo, facts.model))
        issues += _under("prompts", check_prompt_lengths(spec.prompts, spec.ppo, facts.model))
        if isinstance(spec.method, Lora):
            issues += _under("method", check_targets(spec.method.target_modules, facts.model))
            issues += _under("method", check_saved_modules(spec.method, facts.model))
    if isinstance(spec.method, Lora):
        issues += _under("method", _check_start(spec.method, spec.ppo, facts))
        issues += _check_bases(spec, facts)
    if facts.value is not None:
        issues += check_value_model(facts.value, facts.model, ("method", "value", "source"))
    for index, reward in enumerate(spec.rewards):
        if isinstance(reward, ModelReward) and reward.name in facts.rewards:
            loc: Loc = ("rewards", index, "source")
            issues += check_reward_model(facts.rewards[reward.name], loc)
        if isinstance(reward, ReferencePart) and reward.column is not None:
            issues += _check_column(reward.column, facts.columns, ("rewards", index, "column"))
    return issues


def _check_start(lora: Lora, ppo: Hyperparameters, facts: Facts) -> Iterator[Issue]:
    name = trained_from(lora, ppo)
    if name is not None and name in facts.adapters:
        yield from check_adapter(lora, name, facts.adapters[name], facts.model)


def _check_bases(spec: RunSpec, facts: Facts) -> Iterator[Issue]:
    for name, adapter in facts.adapters.items():
        loc: Loc = ("method", "adapters", name)
        if facts.model is not None:
            yield from check_base(adapter, facts.model, loc)
        yield from check_named_base(adapter, spec.model, loc)
        is_reward = name == spec.ppo.reward_adapter_name
        yield from check_head(adapter, loc, is_reward=is_reward)


def _check_column(column: str, columns: Mapping[str, frozenset[str]], loc: Loc) -> Iterator[Issue]:
    for field, known in columns.items():
        if column not in known:
            yield Issue(
                loc=loc,
                msg=f"{shown(column)} given; beside its prompts, prompts.{field} has the columns "
                f"{shown(sorted(known), 400)}: choose of these, or give prompts that have it.",
            )
            return


def _under(section: str, issues: Iterator[Issue]) -> list[Issue]:
    return [Issue(loc=(section, *issue.loc), msg=issue.msg) for issue in issues]


def check_batches(ppo: Hyperparameters, world_size: int, prompts: int | None) -> Iterator[Issue]:
    """Rules between batch sizes, processes, and the number of prompts; locs relative to `ppo`."""
    sizes = batch_sizes(ppo, world_size)
    product = (
        f"per_device_train_batch_size {ppo.per_device_train_batch_size} x gradient_accumulation_steps "
        f"{ppo.gradient_accumulation_steps} = {sizes.local_batch_size} rows per process"
    )
    if sizes.local_batch_size % ppo.num_mini_batches:
        yield Issue(
            loc=("num_mini_batches",),
            msg=f"{ppo.num_mini_batches} given, with {product}; the rows must divide into mini-batches: "
            "give a divisor.",
        )
    if sizes.batch_size % ppo.num_return_sequences:
        yield Issue(
            loc=("num_return_sequences",),
            msg=f"{ppo.num_return_sequences} given, with {product} and {world_size} processes; a batch holds "
            "whole groups of responses to one prompt: give a divisor of the rows of all processes.",
        )
    if ppo.whiten_rewards and sizes.batch_size < _WHITEN_ROWS:
        yield Issue(
            loc=("whiten_rewards",),
            msg=f"true given with a batch of {sizes.batch_size} rows; whitening needs at least "
            f"{_WHITEN_ROWS} rows: raise per_device_train_batch_size or gradient_accumulation_steps.",
        )
    if ppo.adaptive_kl_target is not None and ppo.adaptive_horizon < sizes.batch_size:
        horizon = f"{ppo.adaptive_horizon:g}"
        given = f"Not given, which means {horizon}" if ppo.adaptive_kl_horizon is None else f"{horizon} given"
        yield Issue(
            loc=("adaptive_kl_horizon",),
            msg=f"{given}, with a batch of {sizes.batch_size} rows; kl_coef moves by up to a fifth per "
            f"horizon, and an update may not be longer than one: give at least {sizes.batch_size}.",
        )
    if ppo.total_episodes is not None or prompts is not None:
        yield from _check_episodes(ppo, sizes, prompts or 0, f"{product}, {world_size} processes")


def _check_episodes(ppo: Hyperparameters, sizes: BatchSizes, prompts: int, product: str) -> Iterator[Issue]:
    episodes = _episodes(ppo, prompts)
    updates = math.ceil(episodes / sizes.batch_size)
    if 0 < updates <= ppo.critic_warmup:
        yield Issue(
            loc=("critic_warmup",),
            msg=f"{ppo.critic_warmup} given, and the run has {updates} updates ({episodes} episodes in "
            f"batches of {sizes.batch_size}); the policy would never learn: give fewer.",
        )
    if episodes < sizes.batch_size:
        given = f"{ppo.total_episodes} given"
        if ppo.total_episodes is None:
            given = f"Not given, and {_passes(ppo, prompts)}"
        yield Issue(
            loc=("total_episodes",),
            msg=f"{given}, with a batch of {sizes.batch_size} rows ({product}); "
            "a run needs at least one batch: raise it, or make the batch smaller.",
        )
    if episodes >= _MOST_EPISODES:
        yield Issue(
            loc=("total_episodes",),
            msg=f"Not given, and {_passes(ppo, prompts)}; a run has fewer than {_MOST_EPISODES}: "
            "give it, or fewer epochs.",
        )


def _episodes(ppo: Hyperparameters, prompts: int) -> int:
    if ppo.total_episodes is not None:
        return ppo.total_episodes
    return int(ppo.num_train_epochs * prompts) * ppo.num_return_sequences


def _passes(ppo: Hyperparameters, prompts: int) -> str:
    """Where the number of episodes comes from, if it is not given."""
    each = f" x num_return_sequences {ppo.num_return_sequences}" if ppo.num_return_sequences > 1 else ""
    return f"num_train_epochs {ppo.num_train_epochs} x {prompts} prompts{each} = {_episodes(ppo, prompts)}"


def plan(spec: RunSpec, facts: Facts) -> Plan:
    """Work out every derived number.

    Raises:
        SpecError: the spec breaks a rule; or the number of episodes cannot be known, because neither
            `ppo.total_episodes` nor the number of prompts is given.
    """
    issues = check(spec, facts)
    if spec.ppo.total_episodes is None and facts.prompts is None:
        msg = "Not given, and the number of prompts is not known; give it."
        issues.append(Issue(loc=("ppo", "total_episodes"), msg=msg))
    if issues:
        raise SpecError(issues)
    length = schedule(spec.ppo, spec.resources.gpus, facts.prompts or 0)
    return Plan(
        **length.model_dump(),
        parameters_trained=footprint.parameters(spec, facts)[0],
        memory=footprint.memory(spec, facts),
        warnings=tuple(_warnings(spec, length, facts)),
    )


def _warnings(spec: RunSpec, length: Schedule, facts: Facts) -> Iterator[str]:
    stage = spec.resources.zero_stage
    if stage and spec.resources.gpus == 1 and spec.resources.offload == "none":
        yield f"zero_stage {stage} over one GPU shards nothing: it costs time, and saves no memory."
    sampled = length.num_total_batches * length.batch_size
    if sampled != length.total_episodes:
        yield f"{sampled} episodes will be sampled, not {length.total_episodes}: updates are whole batches."
    asked = length.batch_size // spec.ppo.num_return_sequences
    if facts.prompts is not None and facts.prompts < asked:
        yield f"A batch asks {asked} prompts, and there are {facts.prompts}: they repeat within a batch."
    if spec.ppo.stop_token is None and spec.ppo.stop_token_id is None:
        yield "No stop token: every response has response_length tokens."
    for name, adapter in facts.adapters.items():
        given, own = spec.model, adapter.base_model and public_name(adapter.base_model)[0]
        if isinstance(given, LocalModel) and own and not same_name(own, public_name(given.path)[0]):
            yield f"The adapter {shown(name)} names the base {shown(own)}; see that this is the model given."
    policy, value = facts.model and facts.model.model_type, facts.value and facts.value.model_type
    if policy and value and policy != value:
        yield f"The value model is a {value}, the policy a {policy}: see that both know the same token ids."
    if isinstance(spec.method, Lora) and isinstance(critic(spec), ValueModel):
        yield "An own value model is trained in full beside the adapters; a value head costs far less."
