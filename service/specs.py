"""The JSON at the HTTP boundary: what is sent around the engine's spec, and what comes back.

Bodies are strict: no unknown fields, no silent conversions. The spec inside a body is left as it came, for
`ppo_engine.spec.parse` to read: its rules stand in one place. This module knows no routes and no database.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, JsonValue
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from ppo_engine.issues import Issue, Loc
from ppo_engine.plan import Plan
from ppo_engine.spec import RunSpec

State = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")

T = TypeVar("T")

SPEC_EXAMPLE: dict[str, Any] = {
    "model": {"type": "local", "path": "Qwen2.5-0.5B-Instruct"},
    "prompts": {"train": "file_0190f3a2b4c57d8e9f00112233445566"},
    "method": {"type": "lora", "r": 16, "lora_alpha": 32},
    "rewards": [{"type": "regex", "name": "polite", "pattern": "(?i)\\b(please|thank you)\\b"}],
    "ppo": {
        "total_episodes": 4096,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 8,
        "num_mini_batches": 4,
        "response_length": 64,
        "stop_token": "eos",
        "missing_eos_penalty": 1.0,
        "learning_rate": 1e-5,
    },
    "resources": {"gpus": 1, "precision": "bf16"},
}


class _SpecSchema:
    """Documents a raw JSON object as a `RunSpec`."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.dict_schema(core_schema.str_schema(), core_schema.any_schema())

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return handler(RunSpec.__pydantic_core_schema__)


SpecJson = Annotated[dict[str, Any], _SpecSchema]


class Body(BaseModel):
    """Base of request bodies."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class Answer(BaseModel):
    """Base of response bodies."""

    model_config = ConfigDict(use_attribute_docstrings=True)


MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class JobCreate(Body):
    """A job: a run to do, and what its owner calls it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"name": "polite", "spec": SPEC_EXAMPLE, "metadata": {"team": "support"}}]
        }
    )

    name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Any name; it need not be unique."""
    spec: SpecJson
    """What to train, on which prompts, by which rewards."""
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] = Field(default_factory=dict)
    """Up to 16 pairs of text, kept and given back."""


class EstimateRequest(Body):
    """A spec to plan, without making a job."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"spec": SPEC_EXAMPLE}]})

    spec: SpecJson
    """What would be trained."""


class JobError(Answer):
    """Why a job failed."""

    code: str
    """A word for programs: `oom`, `nan`, `spec`, `reward`, `crash`, `lost`, …"""
    message: str
    """What happened, and where it can be told, what to do."""
    log_tail: str | None = None
    """The last lines of the engine's log."""
    issues: list[Issue] = Field(default_factory=list)
    """What is wrong with the spec, where that is why."""


class Job(Answer):
    """A PPO fine-tuning job."""

    object: Literal["job"] = "job"
    """What this is."""
    id: str
    """What it is asked for by."""
    name: str | None
    """As it was given."""
    state: State
    """Where it is: `succeeded`, `failed`, and `cancelled` are final."""
    wanted: Literal["run", "pause", "cancel"]
    """What its owner asked for; a running job obeys at its next update."""
    attempt: int
    """How often a worker has taken it up."""
    created_at: datetime
    """When it was posted."""
    started_at: datetime | None
    """When a worker first took it up."""
    finished_at: datetime | None
    """When it came to its final state."""
    update: int
    """Updates completed."""
    total_updates: int | None
    """Updates of the whole run; null as `plan` is."""
    error: JobError | None
    """Why it failed, if it did."""
    spec: SpecJson
    """The spec as it was given, with every default filled in; once a worker has read a data set of the hub,
    with the commit that it found."""
    plan: Plan | None
    """The numbers that follow from the spec; null while they need the number of rows that a data set of the
    hub has, which a worker counts."""
    metadata: dict[str, str]
    """As it was given."""


class Event(Answer):
    """One thing that happened to a job."""

    seq: int
    """Its number in the job, from 1, without gaps: the cursor of pages, and the id in a stream."""
    key: str
    """Unique in the job: `metrics:12`."""
    type: str
    """`state`, `artifact` (something is safe in storage), or what the engine says: `started`, `metrics`,
    `samples`, `evaluation`, `checkpoint`, `rewound`, `warning`, `finished`."""
    attempt: int
    """The attempt at the job that it is of; 0 before the first."""
    update: int
    """Updates completed when it was said."""
    created_at: datetime
    """When it was said."""
    data: dict[str, JsonValue]
    """What is said. Non-finite numbers are the texts "NaN", "Infinity", and "-Infinity"."""


class MetricsRow(Answer):
    """The metrics of one update."""

    update: int
    """The update that they measure: the cursor of pages."""
    metrics: dict[str, JsonValue]
    """Numbers by name; non-finite ones are the texts "NaN", "Infinity", and "-Infinity"."""


class SamplesRow(Answer):
    """Completions sampled at one update."""

    update: int
    """The update that they were sampled at: the cursor of pages."""
    samples: list[JsonValue]
    """Each with its `kind` (`train`; `eval`: sampled for an evaluation; `eval/greedy`: the most likely
    response), `prompt`, `response`, `score`, and `rewards`: what each reward gave, without its weight."""


class StoredFile(Answer):
    """A file of a checkpoint."""

    name: str
    """Its path in the checkpoint."""
    size: int
    """Bytes."""
    sha256: str
    """Its digest, hexadecimal."""


class Checkpoint(Answer):
    """The policy after an update: an adapter, or a whole model, in the layout of `save_pretrained`."""

    object: Literal["checkpoint"] = "checkpoint"
    """What this is."""
    update: int
    """Updates completed when it was exported: the cursor of pages."""
    attempt: int
    """The attempt at the job that exported it."""
    created_at: datetime
    """Since when all of it is in storage."""
    files: list[StoredFile]
    """What it consists of."""
    metrics: dict[str, JsonValue]
    """Those of its update, as far as there are any."""


class File(Answer):
    """A prompt file, as canonical JSONL: that is what its size and digest describe."""

    object: Literal["file"] = "file"
    """What this is."""
    id: str
    """What specs name it by."""
    filename: str
    """As it was uploaded."""
    purpose: Literal["prompts"] = "prompts"
    """What it is for."""
    bytes: int
    """Its size."""
    sha256: str
    """Its digest, hexadecimal."""
    rows: int
    """How many prompts there are."""
    columns: list[str]
    """What its rows have: the prompt, and columns for rewards."""
    format: Literal["jsonl", "csv", "parquet"]
    """What it was uploaded as."""
    created_at: datetime
    """When it was uploaded."""


class Page(Answer, Generic[T]):
    """A piece of a list. The next piece: the same request with `after` set to the last item's cursor."""

    # Said again, since the schemas of `Page[Job]` and the like do not inherit it.
    model_config = ConfigDict(json_schema_extra={"description": __doc__})

    object: Literal["list"] = "list"
    """What this is."""
    data: list[T]
    """The items."""
    has_more: bool
    """Whether there are more behind them."""


class Deleted(Answer):
    """What was deleted."""

    object: Literal["job", "file"]
    """What it was."""
    id: str
    """What it was asked for by."""
    deleted: Literal[True] = True
    """It is gone."""


def unstorable(value: Any, loc: Loc = ()) -> Iterator[Issue]:
    """Text that no database keeps, anywhere in JSON data: NUL, and halves of surrogate pairs."""
    if isinstance(value, str):
        if found := _UNSTORABLE.search(value):
            given = f"\\u{ord(found.group()):04x}"
            yield Issue(loc=loc, msg=f"Text with {given} given, which no text may contain; take it out.")
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from unstorable(key, (*loc, key))
            yield from unstorable(part, (*loc, key))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from unstorable(part, (*loc, index))
