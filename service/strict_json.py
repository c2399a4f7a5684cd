"""JSON as it comes in: read as RFC 8259 has it, and refused where readers would not agree on what it says.

Names that stand twice in an object are refused, since every reader would keep another one; so is NaN, which
JSON does not have; and so are values nested deeper than anything needs, before what is recursive sees them.
Knows nothing of HTTP, files, or specs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

from ppo_engine.issues import Issue, Loc, shown

MAX_DEPTH = 64
_TOO_DEEP = f"values nested more than {MAX_DEPTH} deep given, which is the most; flatten them."


class BadJson(ValueError):
    """What is no JSON, or ambiguous. issues: with their places in it."""

    def __init__(self, *issues: Issue) -> None:
        self.issues = list(issues)
        super().__init__("\n".join(map(str, issues)))


class _Wrong(str):
    """Stands where something cannot be taken, and says why."""


def loads(text: str | bytes) -> Any:
    """Read JSON.

    Raises:
        json.JSONDecodeError: it has not the form of JSON.
        BadJson: it cannot be taken for another reason.
    """
    try:
        value = json.loads(
            text if isinstance(text, str) else text.decode(),
            object_pairs_hook=_object,
            parse_constant=_constant,
        )
    except RecursionError:
        raise BadJson(Issue(loc=(), msg=_TOO_DEEP)) from None
    except UnicodeDecodeError as error:
        raise BadJson(Issue(loc=(), msg=not_utf8(error, "send text in the encoding UTF-8"))) from None
    except json.JSONDecodeError:
        raise
    except ValueError:
        # The only one left: Python reads no integers of thousands of digits.
        raise BadJson(Issue(loc=(), msg="an integer of thousands of digits given; shorten it.")) from None
    if issues := list(_check(value)):
        raise BadJson(*issues)
    return value


def not_utf8(error: UnicodeDecodeError, fix: str) -> str:
    """What to say of bytes that are no text."""
    byte = error.object[error.start]
    return f"byte 0x{byte:02X} given at position {error.start + 1}, which is not UTF-8; {fix}."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = Counter(name for name, _ in pairs)
        for name, times in names.items():
            if times > 1:
                found[name] = _Wrong(f"{shown(name)} given {times} times in one object; keep one of them.")
    return found


def _constant(name: str) -> _Wrong:
    return _Wrong(f"{name} given, which JSON does not have; give a finite number, or null.")


def _check(value: Any) -> Iterator[Issue]:
    """All that cannot be taken, level by level: recursion is what is to be kept from deep values."""
    level: list[tuple[Loc, Any]] = [((), value)]
    for depth in count():
        yield from (Issue(loc=loc, msg=part) for loc, part in level if isinstance(part, _Wrong))
        whole = [(loc, part) for loc, part in level if isinstance(part, dict | list)]
        if not whole:
            return
        if depth == MAX_DEPTH:
            yield Issue(loc=whole[0][0][:2], msg=_TOO_DEEP)
            return
        level = [
            ((*loc, key), inner)
            for loc, part in whole
            for key, inner in _parts(part)
            if isinstance(inner, dict | list | _Wrong)
        ]


def _parts(value: dict[str, Any] | list[Any]) -> Iterable[tuple[str | int, Any]]:
    return value.items() if isinstance(value, dict) else enumerate(value)
