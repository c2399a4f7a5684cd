"""Every number that follows from a spec, worked out once, and every rule that needs a fact to be checked.

The API plans before it accepts a job, the worker before it starts an engine, and the trainer before it
loads a model: the same functions, so the same words. This module knows no torch and loads nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from ppo_engine.facts import OUTPUT_LAYERS, AdapterFacts, Facts, ModelFacts
from ppo_engine.findings import REPOSITORY
from ppo_engine.hyperparameters import Hyperparameters
from ppo_engine.issues import Issue, Loc, SpecError, shown
from ppo_engine.model_sources import HubModel, LocalModel, ModelSource, public_name
from ppo_engine.reward_kinds import ModelReward, ReferencePart
from ppo_engine.spec import (
    DEFAULT_ADAPTER,
    Full,
    Lora,
    PromptLengths,
    RunSpec,
    ValueAdapter,
    ValueHead,
    ValueModel,
    check_fields,
    critic,
    trained_from,
)

_FP32 = 4
_BF16 = 2
_ADAM_STATES = 2
_OPTIMIZER = {"none": "optimizer", "optimizer": "optimizer_off_gpu"}  # where its states lie
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


def _check_column(column: str, columns: Mapping[str, frozenset[str]], loc: Loc) -> Iterator[Issue]:
    for field, known in columns.items():
        if column not in known:
            yield Issue(
                loc=loc,
                msg=f"{shown(column)} given; beside the prompts, the file of prompts.{field} has the columns "
                f"{shown(sorted(known), 400)}: choose of these, or upload a file that has it.",
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
            msg=f"{ppo.stop_token_id} given; the model's vocabulary has ids 0 to {model.vocab_size - 1}: "
            "give one of these.",
        )
    if ppo.stop_token == "eos" and model.tokenizer is not None and model.tokenizer.eos_token is None:
        yield Issue(
            loc=("stop_token",),
            msg='"eos" given; the model\'s tokenizer has no eos token: give stop_token_id.',
        )


def check_prompt_lengths(lengths: PromptLengths, ppo: Hyperparameters, model: ModelFacts) -> Iterator[Issue]:
    """Whether the longest prompt leaves room for a response; locs relative to `prompts`."""
    if lengths.max_length is None or model.context_length is None:
        return
    room = model.context_length - ppo.response_length
    if 0 < room < lengths.max_length:
        yield Issue(
            loc=("max_length",),
            msg=f"{lengths.max_length} given; the model has {model.context_length} positions, and "
            f"response_length {ppo.response_length} leaves {room} for a prompt: give at most {room}, or "
            "leave it out.",
        )


def check_targets(target_modules: str | Sequence[str], model: ModelFacts) -> Iterator[Issue]:
    """Whether the model has the modules that an adapter is asked for; locs relative to `method`."""
    if isinstance(target_modules, str) or not model.linears:
        return
    for index, target in enumerate(target_modules):
        if not any(_targets(name, target) for name in model.linears):
            known = sorted({name.rsplit(".", 1)[-1] for name in model.linears})
            yield Issue(
                loc=("target_modules", index),
                msg=f"{shown(target)} given; {model.model_type or 'the model'} has the linear modules "
                f'{shown(known, 400)}: choose of these, or give "all-linear".',
            )


def _targets(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _check_start(lora: Lora, ppo: Hyperparameters, facts: Facts) -> Iterator[Issue]:
    name = trained_from(lora, ppo)
    if name is not None and name in facts.adapters:
        yield from check_adapter(lora, name, facts.adapters[name], facts.model)


def check_adapter(lora: Lora, name: str, adapter: AdapterFacts, model: ModelFacts | None) -> Iterator[Issue]:
    """Whether the adapter that the trained one starts as is what the spec says; locs relative to `method`.

    An adapter keeps its own shape, so a field that says another would be without effect.
    """
    for field in ("r", "lora_alpha"):
        given, own = getattr(lora, field), getattr(adapter, field)
        if own is not None and given != own:
            yield _other_than_start(field, given, name, own)
    own_targets = adapter.target_modules
    if own_targets is not None and not _same_modules(
        lora.target_modules, own_targets, model.linears if model is not None else {}
    ):
        yield _other_than_start("target_modules", lora.target_modules, name, own_targets)


def _check_bases(spec: RunSpec, facts: Facts) -> Iterator[Issue]:
    for name, adapter in facts.adapters.items():
        loc: Loc = ("method", "adapters", name)
        if facts.model is not None:
            yield from check_base(adapter, facts.model, loc)
        own, given = adapter.base_model, _hub_name(spec.model)
        if own is not None and given is not None and _is_repository(own) and not _same_name(own, given):
            yield Issue(
                loc=loc,
                msg=f"An adapter given whose config names the base {shown(own)}; the model is "
                f"{shown(given)}: give one that was trained on that.",
            )
        is_reward = name == spec.ppo.reward_adapter_name
        yield from check_head(adapter, loc, is_reward=is_reward)


def _hub_name(source: ModelSource) -> str | None:
    """What the hub calls a model; None: it need not be of the hub."""
    if isinstance(source, HubModel):
        return source.repo
    name, revision = public_name(source.path)
    return None if revision is None else name


def _is_repository(name: str) -> bool:
    return re.fullmatch(REPOSITORY, name) is not None


def _same_name(one: str, other: str) -> bool:
    """Whoever publishes a copy of a model changes the owner, not the name."""
    return one.rsplit("/", 1)[-1].lower() == other.rsplit("/", 1)[-1].lower()


def check_base(adapter: AdapterFacts, model: ModelFacts, loc: Loc) -> Iterator[Issue]:
    """Whether a model has what an adapter changes, of the same shapes; the first thing it lacks is told."""
    named = (
        ""
        if adapter.base_model is None
        else f" (its config names {shown(public_name(adapter.base_model)[0])})"
    )
    for name, shape in adapter.changes.items():
        # Output layers and embeddings are not told, and experts are stored as one weight.
        if not model.linears or name.rsplit(".", 1)[-1] in OUTPUT_LAYERS or "experts" in name:
            continue
        own = model.linears.get(name)
        if own is None or sorted(own) != sorted(shape):
            has = "no such module" if own is None else f"one of {own[0]} x {own[1]}"
            yield Issue(
                loc=loc,
                msg=f"An adapter given that changes {name}, of {shape[0]} x {shape[1]}; the model has {has}: "
                f"it was trained for another base{named}. Give one that was trained for this model.",
            )
            return
    width = model.hidden_size
    if adapter.head is not None and width is not None and adapter.head[1] != width:
        yield Issue(
            loc=loc,
            msg=f"An adapter given whose score head reads {adapter.head[1]} numbers; the model has {width}: "
            f"it was trained for another base{named}. Give one that was trained for this model.",
        )


def check_head(adapter: AdapterFacts, loc: Loc, *, is_reward: bool) -> Iterator[Issue]:
    """Whether an adapter has the score head that its role needs, and no other has one."""
    if is_reward and adapter.head is None:
        yield Issue(
            loc=loc,
            msg="An adapter without a score head given, and reward_adapter_name names it; give one that PEFT "
            "saved of a decoder's ...ForSequenceClassification with task_type SEQ_CLS.",
        )
    elif is_reward and adapter.head is not None and adapter.head[0] != 1:
        yield Issue(
            loc=loc,
            msg=f"An adapter with {adapter.head[0]} labels given, and reward_adapter_name names it; a reward "
            "is one number: use one with 1 label.",
        )
    elif adapter.head is not None and not is_reward:
        yield Issue(
            loc=loc,
            msg="An adapter with a score head given, which makes it a reward; name it in "
            "ppo.reward_adapter_name, or give one of a language model.",
        )


def _other_than_start(field: str, given: object, name: str, own: object) -> Issue:
    return Issue(
        loc=(field,),
        msg=f"{shown(given)} given; the adapter that is trained starts as {shown(name)}, which has "
        f"{shown(own, 400)}: give that.",
    )


def _same_modules(
    given: Sequence[str] | str, own: Sequence[str], linears: Mapping[str, tuple[int, int]]
) -> bool:
    if linears:
        return _targeted(given, linears) == _targeted(own, linears)
    return isinstance(given, str) or set(given) == set(own)


def _targeted(targets: Sequence[str] | str, linears: Mapping[str, tuple[int, int]]) -> set[str]:
    if targets == "all-linear":
        return set(linears)
    return {name for name in linears if any(_targets(name, target) for target in targets)}


def check_value_model(value: ModelFacts, policy: ModelFacts | None, loc: Loc) -> Iterator[Issue]:
    """Whether a model can be the critic of a policy: a decoder that reads the same ids."""
    if value.is_causal_lm is False and not value.is_classifier:
        yield Issue(
            loc=loc,
            msg=f"A model of architecture {shown(value.architectures)} given; a value model is a "
            "...ForCausalLM, or a ...ForSequenceClassification with 1 label.",
        )
    elif value.is_classifier and value.output_layers and "score" not in value.output_layers:
        yield Issue(
            loc=loc,
            msg=f"A model of architecture {shown(value.architectures)} given, which reads a text as a whole; "
            "a value is read at every token: give a decoder.",
        )
    elif value.is_classifier and value.labels is not None and value.labels != 1:
        yield Issue(
            loc=loc,
            msg=f"A model with {value.labels} labels given; a value is one number: use one with 1 label.",
        )
    if policy is None:
        return
    for field, what in (("vocab_size", "ids"), ("context_length", "positions")):
        own, needed = getattr(value, field), getattr(policy, field)
        if own is not None and needed is not None and own < needed:
            yield Issue(
                loc=loc,
                msg=f"A model with {own} {what} given; the policy has {needed}, and a value model reads all "
                "that the policy writes: use one with as many.",
            )


def check_reward_model(model: ModelFacts, loc: Loc) -> Iterator[Issue]:
    """Whether a model can score text with one number."""
    if model.architectures and not model.is_classifier:
        yield Issue(
            loc=loc,
            msg=f"A model of architecture {shown(model.architectures)} given; a reward model is a "
            "...ForSequenceClassification: give one.",
        )
    elif model.labels is not None and model.labels != 1:
        yield Issue(
            loc=loc,
            msg=f"A model with {model.labels} labels given; a reward is one number: use one with 1 label.",
        )
    if model.has_padding is False:
        yield Issue(
            loc=loc,
            msg="A model without a padding token given; set pad_token in its tokenizer_config.json, or "
            "pad_token_id in its config.json (its eos token will do: padding changes no score).",
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
        parameters_trained=_parameters(spec, facts)[0],
        memory=_memory(spec, facts),
        warnings=tuple(_warnings(spec, length, facts)),
    )


def _policy_trained(spec: RunSpec, facts: Facts) -> int | None:
    if facts.model is None:
        return None
    if isinstance(spec.method, Full):
        return facts.model.parameters
    start = trained_from(spec.method, spec.ppo)
    if start is not None and start in facts.adapters:
        return facts.adapters[start].parameters
    return _new_adapter(spec, facts)


def _new_adapter(spec: RunSpec, facts: Facts) -> int | None:
    """Weights of a new adapter as the spec describes it."""
    if facts.model is None or not isinstance(spec.method, Lora):
        return None
    linears = facts.model.linears
    targeted = _targeted(spec.method.target_modules, linears)
    return sum(spec.method.r * sum(linears[name]) for name in targeted) if linears else None


def _value_trained(spec: RunSpec, facts: Facts) -> int | None:
    """A head on the policy has a bias; an own model is a trunk with the head of its class, which has none."""
    role = critic(spec)
    if role is None:
        return 0
    if isinstance(role, ValueHead | ValueAdapter):
        width = facts.model and facts.model.hidden_size
        adapter = _policy_trained(spec, facts) if isinstance(role, ValueAdapter) else 0
        return width + 1 + adapter if width and adapter is not None else None
    model = facts.model if role.source is None else facts.value
    if model is None or model.trunk_parameters is None or model.hidden_size is None:
        return None
    return model.trunk_parameters + model.hidden_size


def _parameters(spec: RunSpec, facts: Facts) -> tuple[int | None, int | None]:
    """Trained in all, and of them the policy's."""
    policy, value = _policy_trained(spec, facts), _value_trained(spec, facts)
    return None if policy is None or value is None else policy + value, policy


def _memory(spec: RunSpec, facts: Facts) -> dict[str, int] | None:
    """Bytes by role.

    What is trained, its gradients and Adam's two moments, the reference that is copied from it, frozen
    adapters, and reward models are fp32; the frozen base under adapters has the run's precision. What is
    offloaded is told under a name of its own.
    """
    trained, policy = _parameters(spec, facts)
    if facts.model is None or facts.model.parameters is None or trained is None or policy is None:
        return None
    base, frozen, reference = 0, 0, 0
    reward = sum(model.parameters or 0 for model in facts.rewards.values())
    if isinstance(spec.method, Lora):
        base = facts.model.parameters * (_BF16 if spec.resources.precision == "bf16" else _FP32)
        own = spec.ppo.model_adapter_name or DEFAULT_ADAPTER
        judge = spec.ppo.reward_adapter_name
        sizes = {name: adapter.parameters or 0 for name, adapter in facts.adapters.items() if name != own}
        reward += sizes.pop(judge, 0) if judge is not None else 0
        frozen = sum(sizes.values())
    else:
        reference = facts.model.parameters
    roles = {
        "policy": base + (policy + frozen) * _FP32,
        "reference": reference * _FP32,
        "value": (trained - policy) * _FP32,
        "gradients": trained * _FP32,
        _OPTIMIZER[spec.resources.offload]: trained * _FP32 * _ADAM_STATES,
    }
    if reward:
        roles["reward"] = reward * _FP32
    return roles


def _warnings(spec: RunSpec, length: Schedule, facts: Facts) -> Iterator[str]:
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
        if isinstance(given, LocalModel) and own and not _same_name(own, public_name(given.path)[0]):
            yield f"The adapter {shown(name)} names the base {shown(own)}; see that this is the model given."
    if isinstance(spec.method, Lora) and isinstance(critic(spec), ValueModel):
        yield "An own value model is trained in full beside the adapters; a value head costs far less."
