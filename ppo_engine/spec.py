"""What a run is: the one vocabulary shared by the HTTP API, the worker, and the engine.

A `RunSpec` is frozen JSON. Hyperparameters carry the names of TRL's `PPOConfig`. The rules here need
nothing but the spec itself; rules that need a model or a number of processes stand in `plan.py`.
This module knows no torch, no files, no network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, JsonValue, ValidationError

from ppo_engine.findings import IDENTIFIER
from ppo_engine.hyperparameters import (
    Count,
    Hyperparameters,
    Part,
    check_hyperparameters,
    check_missing_stop,
)
from ppo_engine.issues import Issue, Loc, SpecError, issues_of, shortened, shown
from ppo_engine.model_sources import HubData, LocalModel, ModelSource, public_name
from ppo_engine.reward_kinds import (
    AdapterReward,
    Http,
    ModelReward,
    Plugin,
    Reward,
    check_rewards,
    secret_name,
)

SPEC_VERSION: Literal[1] = 1
DEFAULT_ADAPTER = "default"  # as peft calls an adapter without a name

# Data --------------------------------------------------------------------------------------------------


class PromptLengths(Part):
    """How long a prompt may be, and what becomes of a longer one."""

    overlong: Literal["refuse", "drop", "truncate"] = "refuse"
    """What becomes of prompts above `max_length`: the run is refused, and names them; they are left out; or
    their first tokens are cut off, so that the end is kept. Epochs, and all that follows from them, count the
    rows as given: where some are left out, the others come more often."""
    max_length: Count | None = None
    """Most tokens of a prompt; by default, and at most, the model's context less `ppo.response_length`."""


PromptSource = Annotated[str, Field(pattern=IDENTIFIER)] | HubData


class Prompts(PromptLengths):
    """The prompts of a run: uploaded files, by id, or data sets of the hub."""

    train: PromptSource = Field(
        examples=["file_0190f3a2b4c57d8e9f00112233445566", {"type": "hub", "repo": "org/prompts"}]
    )
    """Prompts to train on: the id of a file, or a data set of the hub."""
    eval: PromptSource | None = Field(
        default=None, examples=[{"type": "hub", "repo": "org/prompts", "split": "test"}]
    )
    """Held-out prompts, scored every `ppo.eval_steps` updates and after the last one."""

    def sources(self) -> dict[str, str | HubData]:
        """What is given, by its field."""
        given = {"train": self.train, "eval": self.eval}
        return {field: source for field, source in given.items() if source is not None}

    def files(self) -> set[str]:
        """The ids of uploaded files."""
        return {source for source in self.sources().values() if isinstance(source, str)}


def data_id(field: str, source: str | HubData) -> str:
    """What the prompts of a field are called in a run directory, where they lie at `data/<id>.jsonl`."""
    return source if isinstance(source, str) else f"hub-{field}"


# What is trained ---------------------------------------------------------------------------------------


class ValueHead(Part):
    """A linear head on the policy's own trunk: one forward serves policy and value."""

    type: Literal["head"] = "head"
    """On the policy's trunk."""


class ValueAdapter(Part):
    """An adapter of its own on the policy's base, shaped as the policy's, with a head: a second forward."""

    type: Literal["adapter"] = "adapter"
    """An adapter of its own."""


class ValueModel(Part):
    """A critic with a trunk of its own, trained in full."""

    type: Literal["model"] = "model"
    """A model of its own."""
    source: ModelSource | None = None
    """Where the critic starts; by default the policy's model with a new head of zeros."""


Critic: TypeAlias = ValueHead | ValueAdapter | ValueModel


class Full(Part):
    """Every weight of the policy is trained."""

    type: Literal["full"] = "full"
    """Full fine-tuning."""
    value: Annotated[ValueHead | ValueModel, Discriminator("type")] | None = None
    """The critic; where it is not given, and the advantages need one, a model of its own."""


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
    modules_to_save: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False, examples=[["lm_head"]])
    ] = ()
    """Modules that are trained whole beside them and exported with them, matched by the end of their names as
    in peft. A small model may need `lm_head`, so that its output layer can move; where that is tied to the
    embedding, the embedding stays. The reference keeps the modules as they were."""
    adapters: dict[str, ModelSource] = Field(default_factory=dict, max_length=64)
    """Adapters to load under a name, for `ppo.model_adapter_name`, `ppo.ref_adapter_name`, and
    `ppo.reward_adapter_name`."""
    value: Annotated[ValueHead | ValueAdapter | ValueModel, Discriminator("type")] | None = None
    """The critic; where it is not given, and the advantages need one, a head on the policy's trunk."""
    merge: bool = False
    """Export a whole model, into a copy of which the adapter is merged, instead of the adapter."""


Method = Annotated[Full | Lora, Discriminator("type")]


class Resources(Part):
    """What the run is given."""

    gpus: Annotated[int, Field(ge=1, le=1024)] = 1
    """Processes, one per GPU. An operator may allow them to run on CPUs."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO: what is sharded over the processes; 0 is plain data parallelism."""
    offload: Literal["none", "optimizer"] = "none"
    """What a sharded run keeps in the machine's memory instead of the GPU's: `optimizer`, its states."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward and backward passes; log-probabilities, advantages, and losses are fp32."""


Tracker = Literal["tensorboard", "wandb", "mlflow"]


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
    report_to: Annotated[tuple[Tracker, ...], Field(strict=False, examples=[["wandb"]])] = ()
    """Trackers that also get its metrics; the operator's workers have them, and the way to them."""

    def at(self, commits: Mapping[Loc, str]) -> RunSpec:
        """The same, with what is on the hub at these commits, by its place in the spec."""
        raw: Any = self.model_dump(mode="json")
        for loc, commit in commits.items():
            source = raw
            for step in loc:
                source = source[step]
            source["revision"] = commit
        return parse(raw)


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


def critic(spec: RunSpec) -> Critic | None:
    """What gives the values; None: the advantages need none."""
    if not spec.ppo.has_critic:
        return None
    if spec.method.value is not None:
        return spec.method.value
    return ValueHead() if isinstance(spec.method, Lora) else ValueModel()


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
    method = spec.method.model_copy(
        update={"value": critic(spec)}
    )  # not given, and given as it is by default
    shown = public(spec.model_copy(update={"method": method}))
    raw = {name: part for name, part in shown.items() if name in ("model", "method", "rewards")}
    own = {f"resources.{name}": getattr(spec.resources, name) for name in ("precision", "zero_stage")}
    prompts: JsonValue = spec.prompts.model_dump(mode="json")["train"]
    return {**dict(_flat(prompts, "prompts", "train")), **own, **dict(_flat(raw))}


def public(spec: RunSpec) -> dict[str, JsonValue]:
    """The spec as everybody may read it: of a local model, what it is called and not where it lies."""
    raw: dict[str, JsonValue] = spec.model_dump(mode="json")
    for loc, source in sources(spec):
        if isinstance(source, LocalModel):
            part: Any = raw
            for step in loc:
                part = part[step]
            name, revision = public_name(source.path)
            part["path"] = name if revision is None else f"{name}@{revision}"
    return raw


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


# Rules between fields ------------------------------------------------------------------------------------


def check_fields(spec: RunSpec) -> Iterator[Issue]:
    """Every rule between the fields of a spec that needs no knowledge of the model."""
    yield from check_rewards(spec.rewards)
    yield from _prefixed(("ppo",), check_hyperparameters(spec.ppo))
    yield from _prefixed(("ppo",), check_missing_stop(spec.ppo))
    if spec.method.value is not None and not spec.ppo.has_critic:
        yield Issue(
            loc=("method", "value"),
            msg=f"{shown(spec.method.value.model_dump())} given with ppo.advantage_estimator "
            f"{shown(spec.ppo.advantage_estimator)}, which needs no critic: leave it out.",
        )
    yield from _check_adapters(spec)
    if spec.resources.offload != "none" and spec.resources.zero_stage == 0:
        yield Issue(
            loc=("resources", "offload"),
            msg=f"{shown(spec.resources.offload)} given with zero_stage 0, and only sharded runs "
            'have it: give zero_stage 1, 2, or 3, or "none".',
        )
    for index, tracker in enumerate(spec.report_to):
        if tracker in spec.report_to[:index]:
            yield Issue(
                loc=("report_to", index), msg=f"{shown(tracker)} given twice; once is enough: leave it out."
            )
    evaluations = ["eval"] if spec.prompts.eval is not None and spec.ppo.eval_steps is not None else []
    names = [reward.name for reward in spec.rewards]
    yield from _prefixed(("ppo",), check_best_metric(spec.ppo, names, evaluations))
    if spec.ppo.eval_steps is not None and spec.prompts.eval is None:
        yield Issue(
            loc=("ppo", "eval_steps"),
            msg=f"{spec.ppo.eval_steps} given without prompts.eval; name a file of held-out prompts, "
            "or leave eval_steps out.",
        )


def _prefixed(prefix: Loc, issues: Iterator[Issue]) -> Iterator[Issue]:
    for issue in issues:
        yield Issue(loc=prefix + issue.loc, msg=issue.msg)


def secrets(spec: RunSpec) -> set[str]:
    """The names of all secrets that a run is given."""
    options = [reward.options.values() for reward in spec.rewards if isinstance(reward, Plugin)]
    named = {name for values in options for value in values if (name := secret_name(value)) is not None}
    keys = [reward.signing_key for reward in spec.rewards if isinstance(reward, Http)]
    return named | {key.secret for key in keys if key is not None}


def _check_adapters(spec: RunSpec) -> Iterator[Issue]:
    """Rules of the adapters that hyperparameters name, and of the reward by one of them."""
    adapters = spec.method.adapters if isinstance(spec.method, Lora) else {}
    for field in ("model_adapter_name", "ref_adapter_name", "reward_adapter_name"):
        name = getattr(spec.ppo, field)
        if name is not None and not isinstance(spec.method, Lora):
            yield Issue(
                loc=("ppo", field),
                msg=f'{shown(name)} given, but nothing has adapters in full fine-tuning; use method "lora", '
                "or leave it out.",
            )
        elif name is not None and field != "model_adapter_name":
            yield from _check_frozen_adapter(spec, field, name, adapters)
    yield from _check_adapter_rewards(spec)


def _check_frozen_adapter(
    spec: RunSpec, field: str, name: str, adapters: Mapping[str, ModelSource]
) -> Iterator[Issue]:
    if name not in adapters:
        yield Issue(
            loc=("ppo", field),
            msg=f"{shown(name)} given; method.adapters has {shown(sorted(adapters))}: add it there.",
        )
    if name == (spec.ppo.model_adapter_name or DEFAULT_ADAPTER):
        role = "reference" if field == "ref_adapter_name" else "reward"
        yield Issue(
            loc=("ppo", field),
            msg=f"{shown(name)} given, which is also the adapter that is trained; the {role} must stay: "
            "give model_adapter_name another name.",
        )


def _check_adapter_rewards(spec: RunSpec) -> Iterator[Issue]:
    places = [index for index, reward in enumerate(spec.rewards) if isinstance(reward, AdapterReward)]
    if places and spec.ppo.reward_adapter_name is None:
        yield Issue(
            loc=("rewards", places[0], "type"),
            msg='"adapter" given without ppo.reward_adapter_name: name the adapter there.',
        )
    if len(places) > 1:
        yield Issue(
            loc=("rewards", places[1], "type"),
            msg='"adapter" given twice; ppo.reward_adapter_name names one adapter: give one such reward.',
        )
    if not places and spec.ppo.reward_adapter_name is not None:
        yield Issue(
            loc=("ppo", "reward_adapter_name"),
            msg=f'{shown(spec.ppo.reward_adapter_name)} given, and no reward of type "adapter" uses it: add '
            "one to rewards, or leave it out.",
        )


def best_metrics(rewards: Sequence[str], evaluations: Sequence[str]) -> list[str]:
    """The metrics that can tell which checkpoint is the best.

    rewards: their names. evaluations: what the metrics of each begin with, such as "eval".
    """
    own = [
        "objective/scores",
        "objective/rlhf_reward",
        "objective/kl",
        *(f"reward/{name}" for name in rewards),
    ]
    kinds = [prefix + kind for prefix in evaluations for kind in ("", "/greedy")]
    return own + [
        f"{kind}/{what}" for kind in kinds for what in ("scores", *(f"reward/{name}" for name in rewards))
    ]


def check_best_metric(
    ppo: Hyperparameters, rewards: Sequence[str], evaluations: Sequence[str]
) -> Iterator[Issue]:
    """Rules of `metric_for_best_model`; locs as in `PPOConfig`. The rest as in `best_metrics`."""
    metric = ppo.metric_for_best_model
    if metric is None:
        return
    known = best_metrics(rewards, evaluations)
    if metric not in known:
        yield Issue(
            loc=("metric_for_best_model",),
            msg=f"{shown(metric)} given; the metrics of this run that can tell are {shown(known, 400)}: "
            "choose of these" + (", or have it evaluated." if metric.startswith("eval") else "."),
        )
    elif metric.startswith("eval") and ppo.eval_steps is not None and ppo.save_steps % ppo.eval_steps:
        yield Issue(
            loc=("save_steps",),
            msg=f"{ppo.save_steps} given with eval_steps {ppo.eval_steps} and metric_for_best_model "
            f"{shown(metric)}; a checkpoint is judged by the evaluation of its own update: give a multiple.",
        )
