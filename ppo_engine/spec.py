"""What a run is: the one vocabulary shared by the HTTP API, the worker, and the engine.

A `RunSpec` is frozen JSON. Hyperparameters carry the names of TRL's `PPOConfig`. The rules here need
nothing but the spec itself; rules that need a model or a number of processes stand in `plan.py`.
This module knows no torch, no files, no network.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import PurePath
from typing import Annotated, Any, Literal

import regex
from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, ValidationError

from ppo_engine.findings import IDENTIFIER, NAME, REPOSITORY, rule_and_fix
from ppo_engine.patterns import fault

SPEC_VERSION: Literal[1] = 1
DEFAULT_ADAPTER = "default"  # as peft calls an adapter without a name

SECRET_PREFIX = "PROXIMA_SECRET_"
"""Of the variables in a worker's environment that hold the secrets specs may name."""
_SECRET_NAME = regex.compile(r"[A-Z][A-Z0-9_]{0,63}")
_SECRET_OPTION = regex.compile(
    r"(?i)secret|passw|credential|(api|access|private|signing)_?key|(auth|access|api|bearer)_?token"
)

MAX_ISSUES = 50
"""So many are told at once."""
_JSON = json.JSONEncoder(default=str, ensure_ascii=False)

Loc = tuple[str | int, ...]


class Issue(BaseModel):
    """One thing that is wrong with a spec."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    loc: Loc
    """Path of the field, from the spec's root: `("ppo", "stop_token_id")`."""
    msg: str
    """What was given, the rule, and the fix, in one or two sentences."""

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.loc)) or 'spec'}: {self.msg}"


class SpecError(ValueError):
    """A run that cannot be; carries every `Issue` found, not only the first."""

    def __init__(self, issues: Sequence[Issue]) -> None:
        self.issues = list(issues)
        super().__init__("\n".join(map(str, self.issues)))


class Part(BaseModel):
    """Base of everything in a spec: frozen, no unknown fields, no silent conversions, no NaN."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


# Numbers: of ranges that no run needs to leave, and in which 32 bits neither overflow nor vanish -----------

Positive = Annotated[float, Field(gt=0, le=1e9)]
NonNegative = Annotated[float, Field(ge=0, le=1e9)]
Signed = Annotated[float, Field(ge=-1e9, le=1e9)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Whole = Annotated[int, Field(ge=0, lt=2**31)]


# Models ------------------------------------------------------------------------------------------------


class LocalModel(Part):
    """A directory in the layout of `save_pretrained`, on a disk the worker sees."""

    type: Literal["local"] = "local"
    """On a disk."""
    path: str = Field(min_length=1)
    """The directory. The service allows only paths inside the roots its operator names."""


class HubModel(Part):
    """A model repository on the Hugging Face hub."""

    type: Literal["hub"] = "hub"
    """On the hub."""
    repo: str = Field(pattern=REPOSITORY)
    """`owner/name`."""
    revision: str = Field(default="main", min_length=1)
    """Branch, tag, or commit; a commit makes the run repeatable."""


ModelSource = Annotated[LocalModel | HubModel, Discriminator("type")]


# Data --------------------------------------------------------------------------------------------------


class Prompts(Part):
    """The prompt files of a run, by id. In a run directory they lie at `data/<id>.jsonl`."""

    train: str = Field(pattern=IDENTIFIER)
    """Prompts to train on."""
    eval: str | None = Field(default=None, pattern=IDENTIFIER)
    """Held-out prompts, scored every `ppo.eval_steps` updates."""


# What is trained ---------------------------------------------------------------------------------------


class ValueHead(Part):
    """A linear head on the policy's own trunk: one forward serves policy and value."""

    type: Literal["head"] = "head"
    """On the policy's trunk."""


class ValueModel(Part):
    """A critic with a trunk of its own, trained in full."""

    type: Literal["model"] = "model"
    """A model of its own."""
    source: ModelSource | None = None
    """Where the critic starts; by default the policy's model with a new head of zeros."""


Value = Annotated[ValueHead | ValueModel, Discriminator("type")]


class Full(Part):
    """Every weight of the policy is trained."""

    type: Literal["full"] = "full"
    """Full fine-tuning."""
    value: Value = ValueModel()
    """The critic."""


class Lora(Part):
    """Low-rank adapters on a frozen base (peft's names); the base without them is the reference."""

    type: Literal["lora"] = "lora"
    """Low-rank adapters."""
    r: int = Field(default=16, ge=1, le=4096)
    """Their rank."""
    lora_alpha: Count = 32
    """Their output is scaled by `lora_alpha / r`."""
    target_modules: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | Literal["all-linear"] = (
        "all-linear"
    )
    """Names of linear modules, matched by their last component(s), or all of them but the output layer."""
    adapters: dict[str, ModelSource] = Field(default_factory=dict, max_length=64)
    """Adapters to load under a name, for `ppo.model_adapter_name` and `ppo.ref_adapter_name`."""
    value: Value = ValueHead()
    """The critic."""


Method = Annotated[Full | Lora, Discriminator("type")]


# Rewards -----------------------------------------------------------------------------------------------


class RewardPart(Part):
    """What all rewards share. A row's score is the weighted sum over the rewards of a run."""

    name: str = Field(pattern=NAME)
    """Names the metric `reward/<name>`; unique in the run."""
    weight: Signed = 1.0
    """Of this reward in the sum; below 0 it punishes."""


class ModelReward(RewardPart):
    """The scalar of a sequence-classification model, read at the last token of prompt and response."""

    type: Literal["model"] = "model"
    """By a model."""
    source: ModelSource
    """The model; it has one label."""
    chat_template: bool = False
    """Render prompt and response with the reward model's own chat template."""


class StringCheck(RewardPart):
    """1 when the response compares with the reference as asked, else 0."""

    type: Literal["string_check"] = "string_check"
    """By comparison with a text."""
    operation: Literal["eq", "ne", "like", "ilike"] = "eq"
    """Equal, not equal, contains, contains ignoring case."""
    reference: str | None = None
    """The text compared with, the same for every row."""
    column: str | None = None
    """Or the column of the prompt file that holds it."""


class Regex(RewardPart):
    """`match` when the pattern is found in the response, else `no_match`."""

    type: Literal["regex"] = "regex"
    """By a pattern."""
    pattern: str = Field(min_length=1, max_length=1000)
    """In the syntax of Python's `regex`; found anywhere in the response."""
    match: Signed = 1.0
    """Where it is found."""
    no_match: Signed = 0.0
    """Where it is not."""


class Length(RewardPart):
    """Minus the relative distance from a target length: 0 at the target, -1 at twice the target."""

    type: Literal["length"] = "length"
    """By length."""
    target: Count
    """The best length."""
    unit: Literal["token", "text"] = "token"
    """Tokens of the response, or characters of its text."""


class Plugin(RewardPart):
    """A reward the operator installed: an entry point of the group `proxima.rewards`."""

    type: Literal["plugin"] = "plugin"
    """By a plug-in."""
    plugin: str = Field(min_length=1)
    """The entry point's name."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of its factory. `{"secret": "NAME"}` stands for a value that the operator gives the
    worker as `PROXIMA_SECRET_NAME`; a spec itself holds no secrets."""


Reward = Annotated[ModelReward | StringCheck | Regex | Length | Plugin, Discriminator("type")]


# PPO ---------------------------------------------------------------------------------------------------


class Hyperparameters(Part):
    """PPO under the names of TRL's `PPOConfig`, with its defaults. Steps are updates."""

    total_episodes: Count | None = None
    """Responses sampled in the whole run; by default `num_train_epochs` passes over the prompts."""
    num_train_epochs: Annotated[float, Field(gt=0, le=1e6)] = 3.0
    """Passes over the prompts, where `total_episodes` is not given."""
    per_device_train_batch_size: Count = 8
    """Rows of a micro-batch, per process: what bounds memory."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per process that make up a batch."""
    num_mini_batches: Count = 1
    """Optimizer steps per PPO epoch: the batch is cut into as many mini-batches."""
    num_ppo_epochs: Count = 4
    """Passes over each batch of responses."""
    local_rollout_forward_batch_size: Count = 64
    """Rows sampled and scored at a time, per process."""
    response_length: Count = 53
    """Most tokens of a response."""
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 0.7
    """Of sampling, and of every log-probability."""
    stop_token: Literal["eos"] | None = None
    """`eos`: responses end after the tokenizer's end-of-sequence token."""
    stop_token_id: Whole | None = None
    """Or the id of the token they end after."""
    missing_eos_penalty: Positive | None = None
    """Taken off the score of a response that did not reach its stop token."""
    kl_coef: NonNegative = 0.05
    """Weight of the divergence from the reference in the reward."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Schulman 2020: k1 = -log r; k3 = (r - 1) - log r, with r = reference / policy."""
    whiten_rewards: bool = False
    """Scale rewards to unit variance over the whole batch, mean kept."""
    cliprange: Positive = 0.2
    """Of the probability ratio."""
    cliprange_value: Positive = 0.2
    """Of the value's move from its old prediction."""
    vf_coef: NonNegative = 0.1
    """Weight of the value loss."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """Lambda of generalised advantage estimation."""
    learning_rate: Positive = 3e-6
    """Of AdamW, at its highest."""
    lr_scheduler_type: Literal["linear", "constant", "cosine", "constant_with_warmup"] = "linear"
    """How the learning rate moves over the updates of the run."""
    warmup_steps: Whole = 0
    """Updates over which the learning rate rises from 0."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: Annotated[float, Field(ge=1e-30, le=1)] = 1e-8
    """Keeps AdamW's division from 0."""
    weight_decay: NonNegative = 0.0
    """AdamW's pull of weights towards 0."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    seed: Whole = 42
    """Of every draw: order of prompts, sampling, shuffles, new weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    save_steps: Count = 50
    """Updates between checkpoints; the last update always makes one."""
    eval_steps: Count | None = None
    """Updates between evaluations on `prompts.eval`."""
    num_sample_generations: Whole = 10
    """How often in the run sample completions are reported."""
    model_adapter_name: str | None = Field(default=None, pattern=NAME)
    """The adapter that is trained; by default a new one."""
    ref_adapter_name: str | None = Field(default=None, pattern=NAME)
    """The adapter that is the reference, instead of the base without any."""


class Resources(Part):
    """What the run is given."""

    gpus: Annotated[int, Field(ge=1, le=1024)] = 1
    """Processes, one per GPU. An operator may allow them to run on CPUs."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO: what is sharded over the processes; 0 is plain data parallelism."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward and backward passes; log-probabilities, advantages, and losses are fp32."""


class RunSpec(Part):
    """A PPO fine-tuning run, whole."""

    version: Literal[1] = SPEC_VERSION
    """Of this vocabulary."""
    model: ModelSource
    """The policy before training, and the reference."""
    prompts: Prompts
    """What the policy answers."""
    method: Method = Lora()
    """Which weights are trained."""
    rewards: Annotated[tuple[Reward, ...], Field(strict=False, min_length=1, max_length=32)]
    """What makes a response good: a weighted sum."""
    ppo: Hyperparameters = Hyperparameters()
    """How it is trained."""
    resources: Resources = Resources()
    """What it is trained with."""


def sources(spec: RunSpec) -> Iterator[tuple[Loc, ModelSource]]:
    """Every model a spec names, with its place in the spec."""
    yield ("model",), spec.model
    if isinstance(spec.method.value, ValueModel) and spec.method.value.source is not None:
        yield ("method", "value", "source"), spec.method.value.source
    if isinstance(spec.method, Lora):
        for name, source in spec.method.adapters.items():
            yield ("method", "adapters", name), source
    for index, reward in enumerate(spec.rewards):
        if isinstance(reward, ModelReward):
            yield ("rewards", index, "source"), reward.source


def trained_from(lora: Lora, ppo: Hyperparameters) -> str | None:
    """The name in `method.adapters` that the trained adapter starts as; None: it is new.

    Where another adapter is the reference, the trained one starts as that, so that the KL starts at 0.
    """
    trained = ppo.model_adapter_name or DEFAULT_ADAPTER
    return trained if trained in lora.adapters else ppo.ref_adapter_name


def identity(spec: RunSpec) -> dict[str, JsonValue]:
    """What must be the same for a run to go on, beside its hyperparameters: fields by their dotted names.

    A local model is known by the last part of its path: where it lies may differ between machines.
    """
    raw = spec.model_dump(mode="json", include={"model": True, "method": True, "rewards": True})
    for loc, source in sources(spec):
        if isinstance(source, LocalModel):
            part: Any = raw
            for step in loc:
                part = part[step]
            part["path"] = PurePath(source.path).name
    return {"prompts.train": spec.prompts.train, **dict(_flat(raw))}


def _flat(value: JsonValue, *path: str) -> Iterator[tuple[str, JsonValue]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield from _flat(part, *path, str(name))
    if not isinstance(value, dict | list):
        yield ".".join(path), value


# Reading -----------------------------------------------------------------------------------------------


def parse(raw: object) -> RunSpec:
    """Read a spec from JSON data.

    Raises:
        SpecError: with every field that is unknown, missing, of a wrong type, or out of range, and,
            where the fields themselves are right, every rule between them that is broken.
    """
    try:
        spec = RunSpec.model_validate(raw)
    except ValidationError as error:
        raise SpecError(issues_of(error, raw)) from None
    issues = list(check_fields(spec))
    if issues:
        raise SpecError(shortened(issues, len(issues)))
    return spec


def upgrade(raw: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Bring a stored spec of an older version to `SPEC_VERSION`.

    Raises:
        SpecError: the version is not one this release can read.
    """
    if version != SPEC_VERSION:
        raise SpecError(
            [Issue(loc=("version",), msg=f"{version} given; this release reads version {SPEC_VERSION}.")]
        )
    return dict(raw)


def issues_of(error: ValidationError, raw: object) -> list[Issue]:
    """The issues of a failed validation, with the path as the user wrote it and what was given."""
    found: dict[Loc, Mapping[str, Any]] = {}
    for detail in error.errors(include_url=False, include_context=True):
        # A union reports each of its members; the first stands for the field.
        found.setdefault(_user_loc(detail["loc"], raw, detail["type"]), detail)
    # What is wrong inside a field makes pydantic complain of the field too.
    outer = {loc[:end] for loc in found for end in range(len(loc))}
    inner = {loc: detail for loc, detail in found.items() if loc not in outer}
    return shortened((Issue(loc=loc, msg=told(detail)) for loc, detail in inner.items()), len(inner))


def shortened(issues: Iterable[Issue], total: int) -> list[Issue]:
    """The first `MAX_ISSUES` of so many; where there are more, the last says how many."""
    first = list(islice(issues, MAX_ISSUES))
    more = total - len(first)
    last = [Issue(loc=(), msg=f"{more} more things are wrong; correct those named first.")] if more else []
    return first + last


def _user_loc(loc: Loc, raw: object, kind: str) -> Loc:
    """Drop the parts that pydantic adds for members of unions: they stand nowhere in the input."""
    path: list[str | int] = []
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        inside = (isinstance(raw, Mapping) and part in raw) or (
            isinstance(raw, Sequence) and not isinstance(raw, str) and isinstance(part, int)
        )
        if inside:
            raw = raw[part]  # type: ignore[index]
            path.append(part)
        elif last and kind == "missing":
            path.append(part)
    return tuple(path)


def told(detail: Mapping[str, Any]) -> str:
    """One of pydantic's findings as a message: what was given, the rule, and the fix."""
    kind, given = detail["type"], detail["input"]
    if kind == "missing":
        return "Nothing given; this field is required: add it."
    if kind == "extra_forbidden":
        return f"{shown(given)} given for an unknown field; remove it, or correct its name."
    return f"{shown(given)} given. {rule_and_fix(kind, detail['msg'], detail.get('ctx', {}))}"


def shown(value: object, limit: int = 80) -> str:
    """A value as an error message shows it: JSON, cut at `limit` characters.

    Written piece by piece, and no further than it is shown: so it takes values of any size and depth.
    """
    text = ""
    try:
        for piece in _JSON.iterencode(value):
            text += piece
            if len(text) > limit:
                return f"{text[:limit]}…"
    except (TypeError, ValueError):  # keys that are no text; integers of thousands of digits
        return f"{text}…"
    return text


# Rules between fields ------------------------------------------------------------------------------------


def check_fields(spec: RunSpec) -> Iterator[Issue]:
    """Every rule between the fields of a spec that needs no knowledge of the model."""
    yield from _check_rewards(spec.rewards)
    yield from _prefixed(("ppo",), check_hyperparameters(spec.ppo))
    yield from _check_adapters(spec)
    if spec.ppo.eval_steps is not None and spec.prompts.eval is None:
        yield Issue(
            loc=("ppo", "eval_steps"),
            msg=f"{spec.ppo.eval_steps} given without prompts.eval; name a file of held-out prompts, "
            "or leave eval_steps out.",
        )


def _prefixed(prefix: Loc, issues: Iterator[Issue]) -> Iterator[Issue]:
    for issue in issues:
        yield Issue(loc=prefix + issue.loc, msg=issue.msg)


def check_hyperparameters(ppo: Hyperparameters) -> Iterator[Issue]:
    """The rules between hyperparameters; locs are relative to them, as in `PPOConfig`."""
    if ppo.stop_token is not None and ppo.stop_token_id is not None:
        yield Issue(
            loc=("stop_token_id",),
            msg=f"{ppo.stop_token_id} given together with stop_token {shown(ppo.stop_token)}; "
            "they exclude each other: give one.",
        )
    if ppo.missing_eos_penalty is not None and ppo.stop_token is None and ppo.stop_token_id is None:
        yield Issue(
            loc=("missing_eos_penalty",),
            msg=f"{ppo.missing_eos_penalty} given without a stop token, so every response would pay it; "
            "give stop_token or stop_token_id.",
        )


def _check_rewards(rewards: Sequence[RewardPart]) -> Iterator[Issue]:
    names: set[str] = set()
    for index, reward in enumerate(rewards):
        if reward.name in names:
            yield Issue(
                loc=("rewards", index, "name"),
                msg=f"{shown(reward.name)} given twice; each reward of a run needs its own name.",
            )
        names.add(reward.name)
        if isinstance(reward, StringCheck) and (reward.reference is None) == (reward.column is None):
            yield Issue(
                loc=("rewards", index, "reference"),
                msg=f"reference {shown(reward.reference)} and column {shown(reward.column)} given; "
                "give exactly one of them.",
            )
        if isinstance(reward, Regex):
            yield from _check_pattern(reward, index)
        if isinstance(reward, Plugin):
            yield from _check_options(reward, index)


def _check_pattern(reward: Regex, index: int) -> Iterator[Issue]:
    if (why := fault(reward.pattern)) is not None:
        yield Issue(loc=("rewards", index, "pattern"), msg=f"{shown(reward.pattern)} given; {why}.")


def _check_options(reward: Plugin, index: int) -> Iterator[Issue]:
    for name, value in reward.options.items():
        loc: Loc = ("rewards", index, "options", name)
        if isinstance(value, dict) and "secret" in value and secret_name(value) is None:
            yield Issue(
                loc=loc,
                msg=f'{shown(value)} given; a secret is {{"secret": "NAME"}}, its name in capitals, '
                "digits, and _.",
            )
        elif isinstance(value, str) and _SECRET_OPTION.search(name):
            yield Issue(
                loc=loc,
                msg="A text given for what looks like a secret; a spec holds none, since it is stored and "
                'shown: have the operator set PROXIMA_SECRET_NAME, and give {"secret": "NAME"}.',
            )


def secret_name(option: JsonValue) -> str | None:
    """The name of the secret that an option stands for; None: it stands for itself."""
    if not isinstance(option, dict) or set(option) != {"secret"}:
        return None
    name = option["secret"]
    return name if isinstance(name, str) and _SECRET_NAME.fullmatch(name) else None


def secrets(spec: RunSpec) -> set[str]:
    """The names of all secrets that a run is given."""
    options = [reward.options.values() for reward in spec.rewards if isinstance(reward, Plugin)]
    return {name for values in options for value in values if (name := secret_name(value)) is not None}


def _check_adapters(spec: RunSpec) -> Iterator[Issue]:
    adapters = spec.method.adapters if isinstance(spec.method, Lora) else {}
    for field in ("model_adapter_name", "ref_adapter_name"):
        name = getattr(spec.ppo, field)
        if name is not None and not isinstance(spec.method, Lora):
            yield Issue(
                loc=("ppo", field),
                msg=f'{shown(name)} given, but nothing has adapters in full fine-tuning; use method "lora", '
                "or leave it out.",
            )
    ref = spec.ppo.ref_adapter_name
    if ref is None or not isinstance(spec.method, Lora):
        return
    if ref not in adapters:
        yield Issue(
            loc=("ppo", "ref_adapter_name"),
            msg=f"{shown(ref)} given; method.adapters has {shown(sorted(adapters))}: add it there.",
        )
    if ref == (spec.ppo.model_adapter_name or DEFAULT_ADAPTER):
        yield Issue(
            loc=("ppo", "ref_adapter_name"),
            msg=f"{shown(ref)} given, which is also the adapter that is trained; the reference must stay: "
            "give model_adapter_name another name.",
        )
