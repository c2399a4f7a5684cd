"""What is wrong with what a user gave: `Issue` by `Issue`, each with its field, the rule, and the fix.

Pydantic's findings are told in the same words as our own rules. This module knows no specs and no fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ppo_engine.findings import rule_and_fix

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
    tag = None
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        if isinstance(raw, Mapping) and raw is not tag and part == raw.get("type"):
            tag = raw  # the member's name comes first; a field may have the same
            continue
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
