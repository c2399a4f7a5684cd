"""What a run is: the one vocabulary shared by the HTTP API, the worker, and the engine.

A `RunSpec` is frozen JSON. Hyperparameters carry the names of TRL's `PPOConfig`. The rules here need
nothing but the spec itself; rules that need a model or a number of processes stand in `plan.py`.
This module knows no torch, no files, no network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import regex
from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, ValidationError

SPEC_VERSION: Literal[1] = 1

SECRET_PREFIX = "PROXIMA_SECRET_"
"""Of the variables in a worker's environment that hold the secrets specs may name."""
_SECRET_NAME = regex.compile(r"[A-Z][A-Z0-9_]{0,63}")
_SECRET_OPTION = regex.compile(
    r"(?i)secret|passw|credential|(api|access|private|signing)_?key|(auth|access|api|bearer)_?token"
)

Loc = tuple[str | int, ...]


class Issue(BaseModel):
    """One thing that is wrong with a spec.

    loc:
        Path of the field, from the spec's root: `("ppo", "stop_token_id")`.
    msg:
        What was given, the rule, and the fix, in one or two sentences.
    """

    model_config = ConfigDict(frozen=True)

    loc: Loc
    msg: str

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


# Models ------------------------------------------------------------------------------------------------


class LocalModel(Part):
    """A directory in the layout of `save_pretrained`, on a disk the worker sees."""

    type: Literal["local"] = "local"
    path: str = Field(min_length=1)
    """The directory. The service allows only paths inside the roots its operator names."""


class HubModel(Part):
    """A model repository on the Hugging Face hub."""

    type: Literal["hub"] = "hub"
    repo: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
    """`owner/name`."""
    revision: str = Field(default="main", min_length=1)
    """Branch, tag, or commit; a commit makes the run repeatable."""


ModelSource = Annotated[LocalModel | HubModel, Discriminator("type")]


# Data --------------------------------------------------------------------------------------------------


class Prompts(Part):
    """The prompt files of a run, by id. In a run directory they lie at `data/<id>.jsonl`."""

    train: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    """Prompts to train on."""
    eval: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]+$")
    """Held-out prompts, scored every `ppo.eval_steps` updates."""


# What is trained ---------------------------------------------------------------------------------------


class ValueHead(Part):
    """A linear head on the policy's own trunk: one forward serves policy and value."""

    type: Literal["head"] = "head"


class ValueModel(Part):
    """A critic with a trunk of its own, trained in full."""

    type: Literal["model"] = "model"
    source: ModelSource | None = None
    """Where the critic starts; by default the policy's model with a new head of zeros."""


Value = Annotated[ValueHead | ValueModel, Discriminator("type")]


class Full(Part):
    """Every weight of the policy is trained."""

    type: Literal["full"] = "full"
    value: Value = ValueModel()


class Lora(Part):
    """Low-rank adapters on a frozen base (peft's names); the base without them is the reference."""

    type: Literal["lora"] = "lora"
    r: int = Field(default=16, ge=1, le=4096)
    lora_alpha: int = Field(default=32, ge=1)
    target_modules: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | Literal["all-linear"] = (
        "all-linear"
    )
    """Names of linear modules, matched by their last component(s), or all of them but the output layer."""
    adapters: dict[str, ModelSource] = Field(default_factory=dict)
    """Adapters to load under a name, for `ppo.model_adapter_name` and `ppo.ref_adapter_name`."""
    value: Value = ValueHead()


Method = Annotated[Full | Lora, Discriminator("type")]


# Rewards -----------------------------------------------------------------------------------------------


class RewardPart(Part):
    """What all rewards share. A row's score is the weighted sum over the rewards of a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    """Names the metric `reward/<name>`; unique in the run."""
    weight: float = 1.0


class ModelReward(RewardPart):
    """The scalar of a sequence-classification model, read at the last token of prompt and response."""

    type: Literal["model"] = "model"
    source: ModelSource
    chat_template: bool = False
    """Render prompt and response with the reward model's own chat template."""


class StringCheck(RewardPart):
    """1 when the response compares with the reference as asked, else 0."""

    type: Literal["string_check"] = "string_check"
    operation: Literal["eq", "ne", "like", "ilike"] = "eq"
    """Equal, not equal, contains, contains ignoring case."""
    reference: str | None = None
    """The text compared with, the same for every row."""
    column: str | None = None
    """Or the column of the prompt file that holds it."""


class Regex(RewardPart):
    """`match` when the pattern is found in the response, else `no_match`."""

    type: Literal["regex"] = "regex"
    pattern: str = Field(min_length=1, max_length=1000)
    match: float = 1.0
    no_match: float = 0.0


class Length(RewardPart):
    """Minus the relative distance from a target length: 0 at the target, -1 at twice the target."""

    type: Literal["length"] = "length"
    target: int = Field(ge=1)
    unit: Literal["token", "text"] = "token"
    """Tokens of the response, or characters of its text."""


class Plugin(RewardPart):
    """A reward the operator installed: an entry point of the group `proxima.rewards`."""

    type: Literal["plugin"] = "plugin"
    plugin: str = Field(min_length=1)
    """The entry point's name."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of its factory. `{"secret": "NAME"}` stands for a value that the operator gives the
    worker as `PROXIMA_SECRET_NAME`; a spec itself holds no secrets."""


Reward = Annotated[ModelReward | StringCheck | Regex | Length | Plugin, Discriminator("type")]


# PPO ---------------------------------------------------------------------------------------------------

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


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
    temperature: Positive = 0.7
    """Of sampling, and of every log-probability."""
    stop_token: Literal["eos"] | None = None
    """`eos`: responses end after the tokenizer's end-of-sequence token."""
    stop_token_id: Annotated[int, Field(ge=0)] | None = None
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
    lr_scheduler_type: Literal["linear", "constant", "cosine", "constant_with_warmup"] = "linear"
    """How the learning rate moves over the updates of the run."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Updates over which the learning rate rises from 0."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    max_grad_norm: NonNegative = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """Of every draw: order of prompts, sampling, shuffles, new weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    save_steps: Count = 50
    """Updates between checkpoints; the last update always makes one."""
    eval_steps: Count | None = None
    """Updates between evaluations on `prompts.eval`."""
    num_sample_generations: Annotated[int, Field(ge=0)] = 10
    """How often in the run sample completions are reported."""
    model_adapter_name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]{1,64}$")
    """The adapter that is trained; by default a new one."""
    ref_adapter_name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]{1,64}$")
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
    model: ModelSource
    """The policy before training, and the reference."""
    prompts: Prompts
    method: Method = Lora()
    rewards: Annotated[tuple[Reward, ...], Field(strict=False, min_length=1, max_length=32)]
    ppo: Hyperparameters = Hyperparameters()
    resources: Resources = Resources()


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
        raise SpecError(issues)
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
    issues: dict[Loc, Issue] = {}
    for detail in error.errors(include_url=False, include_context=True):
        loc = _user_loc(detail["loc"], raw, detail["type"])
        # A union reports each of its members; the first stands for the field.
        issues.setdefault(loc, Issue(loc=loc, msg=_message(detail["type"], detail["msg"], detail["input"])))
    # What is wrong inside a field makes pydantic complain of the field too.
    return [issue for loc, issue in issues.items() if not any(_is_inside(other, loc) for other in issues)]


def _is_inside(loc: Loc, outer: Loc) -> bool:
    return len(loc) > len(outer) and loc[: len(outer)] == outer


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


def _message(kind: str, msg: str, given: object) -> str:
    if kind == "missing":
        return "Nothing given; this field is required."
    if kind == "extra_forbidden":
        return f"{shown(given)} given for an unknown field; remove it, or correct its name."
    return f"{shown(given)} given. {msg}."


def shown(value: object, limit: int = 80) -> str:
    """A value as an error message shows it: JSON, cut at `limit` characters."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[:limit]}…"


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
    try:
        regex.compile(reward.pattern)
    except regex.error as error:
        yield Issue(
            loc=("rewards", index, "pattern"),
            msg=f"{shown(reward.pattern)} given; not a regular expression of Python's regex module: {error}.",
        )


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
    if ref == (spec.ppo.model_adapter_name or "default"):
        yield Issue(
            loc=("ppo", "ref_adapter_name"),
            msg=f"{shown(ref)} given, which is also the adapter that is trained; the reference must stay: "
            "give model_adapter_name another name.",
        )
