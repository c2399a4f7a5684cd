"""What a run says: one JSON line per event, appended to `events.jsonl`.

Each event has a key that is unique in the life of a job: an event that a resumed run says again is
dropped by whoever already has it. JSON has no NaN; non-finite numbers travel as strings.
This module knows no torch and nothing of who listens.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

EventType = Literal[
    "started", "metrics", "samples", "evaluation", "checkpoint", "rewound", "warning", "finished"
]

BEGUN_AGAIN = "warning:begun_again:"
"""How the key begins of the warning that memory has ended, and that this engine was told to take less. Its
numbers are the `Halvings`."""


class Event(BaseModel):
    """One thing a run said.

    key:
        `<type>`, or `<type>:<what distinguishes it>`, such as `metrics:12`.
    update:
        Updates completed when it was said.
    time:
        Unix seconds.
    data:
        `metrics`: name → number. `samples`: all of an update, as
        `{"samples": [{kind, prompt, response, score, rewards}]}`, where `rewards` has what each gave, without
        weights, and `kind` is "train", "eval" (sampled), or "eval/greedy" (the most likely response).
        `checkpoint`: `{"update", "metrics"}`. `rewound`: `{"to"}`. `warning`: `{"code", "message"}`, and
        numbers. `started`: `{"plan", "made_with", "prompts"}`, the last with the rows given, kept, dropped,
        and truncated of each data set. `finished`: `{"outcome", "reason"}`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    type: EventType
    update: int
    time: float
    data: dict[str, JsonValue]


def finite(value: JsonValue) -> JsonValue:
    """The value with every non-finite number written as "NaN", "Infinity", or "-Infinity"."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return value


def encode(event: Event) -> bytes:
    """One line of `events.jsonl`, its newline included."""
    plain = finite(event.model_dump(mode="python"))
    return json.dumps(plain, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def decode(line: bytes) -> Event:
    """Read one line. Raises pydantic's ValidationError for a line that is no event."""
    return Event.model_validate_json(line)


def read_complete(path: Path, offset: int = 0) -> tuple[list[Event], int]:
    """The events of all whole lines from byte `offset` on, and the offset after them.

    A last line without its newline is still being written, and is left for the next call.
    A file that does not exist yet has no events.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            text = file.read()
    except FileNotFoundError:
        return [], offset
    whole = text[: text.rfind(b"\n") + 1]
    return [decode(line) for line in whole.splitlines()], offset + len(whole)
