"""Every number that follows from a spec, worked out once, and every rule that needs a fact to be checked.

The API plans before it accepts a job, the worker before it starts an engine, and the trainer before it
loads a model: the same functions, so the same words. This module knows no torch and loads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict

from ppo_engine.facts import Facts, ModelFacts
from ppo_engine.spec import (
    Full,
    Hyperparameters,
    Issue,
    Loc,
    Lora,
    ModelReward,
    RunSpec,
    SpecError,
    ValueHead,
    ValueModel,
    check_fields,
    shown,
)

_FP32 = 4
_ADAM_STATES = 2
_WHITEN_ROWS = 8
_MOST_EPISODES = 2**31


class BatchSizes(BaseModel):
    """How rows are cut, under TRL's names: `local_` is per process, `micro` one forward, `mini` one step."""

    model_config = ConfigDict(frozen=True)

    world_size: int
    batch_size: int
    local_batch_size: int
    micro_batch_size: int
    mini_batch_size: int
    local_mini_batch_size: int


class Schedule(BatchSizes):
    """How long a run is.

    total_episodes: responses asked for; the last update may exceed them. num_total_batches: updates.
    optimizer_steps: in the whole run.
    """

    total_episodes: int
    num_total_batches: int
    optimizer_steps: int


class Plan(Schedule):
    """What a run will do and need.

    parameters_trained: None where the model's facts are unknown.
    memory: bytes by role, per process without sharding, activations and caches left out.
    """

    parameters_trained: int | None
    memory: dict[str, int] | None
    warnings: tuple[str, ...]


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
        if isinstance(spec.method, Lora):
            issues += _under("method", check_lora(spec.method, facts.model))
    for index, reward in enumerate(spec.rewards):
        if isinstance(reward, ModelReward) and reward.name in facts.rewards:
            loc: Loc = ("rewards", index, "source")
            issues += check_reward_model(facts.rewards[reward.name], loc)
    return issues


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
    if ppo.whiten_rewards and sizes.batch_size < _WHITEN_ROWS:
        yield Issue(
            loc=("whiten_rewards",),
            msg=f"true given with a batch of {sizes.batch_size} rows; whitening needs at least "
            f"{_WHITEN_ROWS} rows: raise per_device_train_batch_size or gradient_accumulation_steps.",
        )
    if ppo.total_episodes is None and prompts is None:
        return
    episodes = _episodes(ppo, prompts or 0)
    if episodes < sizes.batch_size:
        given = f"{ppo.total_episodes} given"
        if ppo.total_episodes is None:
            given = f"Not given, and num_train_epochs {ppo.num_train_epochs} x {prompts} prompts = {episodes}"
        yield Issue(
            loc=("total_episodes",),
            msg=f"{given}, with a batch of {sizes.batch_size} rows ({product}, {world_size} processes); "
            "a run needs at least one batch: raise it, or make the batch smaller.",
        )
    if episodes is not None and episodes >= _MOST_EPISODES:
        given = f"num_train_epochs {ppo.num_train_epochs} x {prompts} prompts = {episodes}"
        yield Issue(
            loc=("total_episodes",),
            msg=f"Not given, and {given}; a run has fewer than {_MOST_EPISODES}: give it, or fewer epochs.",
        )


def check_policy(model: ModelFacts) -> Iterator[Issue]:
    """Whether a model can be a policy; locs from the spec's root."""
    if model.is_causal_lm is False:
        yield Issue(
            loc=("model",),
            msg=f"A model of architecture {shown(model.architectures)} given; PPO trains causal language "
            "models: give one whose config names a ...ForCausalLM.",
        )
    tokenizer = model.tokenizer
    if tokenizer is not None and tokenizer.pad_token is None and tokenizer.eos_token is None:
        yield Issue(
            loc=("model",),
            msg="A model given whose tokenizer has neither a pad token nor an eos token; name one of them in "
            "its tokenizer_config.json.",
        )


def check_lengths(ppo: Hyperparameters, model: ModelFacts) -> Iterator[Issue]:
    """Rules between the model's sizes and hyperparameters; locs relative to `ppo`."""
    if model.context_length is not None and ppo.response_length >= model.context_length:
        yield Issue(
            loc=("response_length",),
            msg=f"{ppo.response_length} given; the model has {model.context_length} positions for prompt and "
            "response together: give fewer.",
        )
    if (
        ppo.stop_token_id is not None
        and model.vocab_size is not None
        and ppo.stop_token_id >= model.vocab_size
    ):
        yield Issue(
            loc=("stop_token_id",),
            msg=f"{ppo.stop_token_id} given; the model's vocabulary has ids 0 to {model.vocab_size - 1}.",
        )
    if ppo.stop_token == "eos" and model.tokenizer is not None and model.tokenizer.eos_token is None:
        yield Issue(
            loc=("stop_token",),
            msg='"eos" given; the model\'s tokenizer has no eos token: give stop_token_id.',
        )


def check_lora(lora: Lora, model: ModelFacts) -> Iterator[Issue]:
    """Whether the model has the modules that adapters are asked for; locs relative to `method`."""
    if lora.target_modules == "all-linear" or not model.linears:
        return
    for index, target in enumerate(lora.target_modules):
        if not any(_targets(name, target) for name in model.linears):
            known = sorted({name.rsplit(".", 1)[-1] for name in model.linears})
            yield Issue(
                loc=("target_modules", index),
                msg=f"{shown(target)} given; {model.model_type or 'the model'} has the linear modules "
                f'{shown(known, 400)}: choose of these, or give "all-linear".',
            )


def _targets(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def check_reward_model(model: ModelFacts, loc: Loc) -> Iterator[Issue]:
    """Whether a model can score text with one number."""
    if model.architectures and not any("SequenceClassification" in name for name in model.architectures):
        yield Issue(
            loc=loc,
            msg=f"A model of architecture {shown(model.architectures)} given; a reward model is a "
            "...ForSequenceClassification.",
        )
    elif model.labels is not None and model.labels != 1:
        yield Issue(
            loc=loc,
            msg=f"A model with {model.labels} labels given; a reward is one number: use one with 1 label.",
        )


def _episodes(ppo: Hyperparameters, prompts: int) -> int:
    return int(ppo.num_train_epochs * prompts) if ppo.total_episodes is None else ppo.total_episodes


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
        parameters_trained=_trained(spec, facts),
        memory=_memory(spec, facts),
        warnings=tuple(_warnings(spec, length)),
    )


def _policy_trained(spec: RunSpec, model: ModelFacts) -> int | None:
    if isinstance(spec.method, Full):
        return model.parameters
    if not model.linears:
        return None
    targets = spec.method.target_modules
    shapes = [
        shape
        for name, shape in model.linears.items()
        if targets == "all-linear" or any(_targets(name, target) for target in targets)
    ]
    return sum(spec.method.r * (rows + columns) for rows, columns in shapes)


def _value_trained(spec: RunSpec, facts: Facts) -> int | None:
    model = facts.value or facts.model
    if model is None or model.hidden_size is None:
        return None
    trunk = 0 if isinstance(spec.method.value, ValueHead) else model.parameters
    return None if trunk is None else trunk + model.hidden_size + 1


def _trained(spec: RunSpec, facts: Facts) -> int | None:
    if facts.model is None:
        return None
    policy, value = _policy_trained(spec, facts.model), _value_trained(spec, facts)
    return None if policy is None or value is None else policy + value


def _memory(spec: RunSpec, facts: Facts) -> dict[str, int] | None:
    """Bytes by role. Trained weights, their gradients, and Adam's two moments are fp32."""
    trained = _trained(spec, facts)
    if facts.model is None or facts.model.parameters is None or trained is None:
        return None
    frozen = 2 if spec.resources.precision == "bf16" else _FP32
    parameters, is_full = facts.model.parameters, isinstance(spec.method, Full)
    policy = _policy_trained(spec, facts.model) or 0
    roles = {
        "policy": policy * _FP32 + (0 if is_full else parameters * frozen),
        "reference": parameters * frozen if is_full else 0,
        "value": (trained - policy) * _FP32,
        "gradients": trained * _FP32,
        "optimizer": trained * _FP32 * _ADAM_STATES,
    }
    if facts.rewards:
        roles["reward"] = sum((model.parameters or 0) * frozen for model in facts.rewards.values())
    return roles


def _warnings(spec: RunSpec, length: Schedule) -> Iterator[str]:
    sampled = length.num_total_batches * length.batch_size
    if sampled != length.total_episodes:
        yield f"{sampled} episodes will be sampled, not {length.total_episodes}: updates are whole batches."
    if spec.ppo.stop_token is None and spec.ppo.stop_token_id is None:
        yield "No stop token: every response has response_length tokens."
    if isinstance(spec.method, Lora) and isinstance(spec.method.value, ValueModel):
        yield "An own value model is trained in full beside the adapters; a value head costs far less."
