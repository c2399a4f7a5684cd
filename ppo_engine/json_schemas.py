"""JSON Schemas that cannot hang whoever checks them, and the check: Draft 2020-12, by `jsonschema`.

A schema comes from anybody, and so does what it is held against. References may double the work with each
other, or lead in circles; patterns may backtrack without end; a reference may name somebody's server. So only
references inside of the schema are taken, patterns are those of `patterns.py`, and every step looks at the
clock. Knows JSON only.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from fractions import Fraction
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple
from urllib.parse import unquote

import regex
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend
from referencing import Registry

from ppo_engine.patterns import fault as pattern_fault

DIALECT = "https://json-schema.org/draft/2020-12/schema"
MAX_CHARACTERS = 16_384
MAX_NESTING = 32
"""Of schemas, and of the values that are held against them: more is not looked into."""

_AT_THE_TOP = ("$id", "$schema")
_NOT_TAKEN = {
    **dict.fromkeys(_AT_THE_TOP, "it stands at the top of a schema only; leave it out"),
    **dict.fromkeys(
        ("$anchor", "$dynamicAnchor", "$dynamicRef", "$vocabulary"),
        'this keyword is not taken; refer by "#/$defs/NAME"',
    ),
    **dict.fromkeys(
        ("unevaluatedItems", "unevaluatedProperties"),
        "this keyword is not taken; say items or additionalProperties in each alternative",
    ),
}
"""What would lead elsewhere, or look at everything once more."""
_ELSEWHERE = (
    'a reference leads to a schema inside of this one, and none is fetched; give one like "#/$defs/NAME"'
)
_CIRCLE = "it leads back to itself without going into the value; refer inside of properties or items"
_ONE = ("additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then")
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
"""Keywords that hold a schema; a list of them; schemas by name."""
_SAME_VALUE = frozenset(("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas"))
"""Of these, those whose schemas look at the value itself and not at a part of it."""

Path = tuple[str | int, ...]


class Fault(NamedTuple):
    """What is wrong with a schema: where, and the rule and the fix."""

    path: Path
    given: object
    why: str


class TooMuch(Exception):
    """A value could not be checked within what that may take."""


# What a schema may be -------------------------------------------------------------------------------------


def size(schema: Mapping[str, Any]) -> int:
    """Characters of a schema, written as JSON; `MAX_CHARACTERS` are the most that are looked at."""
    return len(json.dumps(schema))


def fault(schema: Mapping[str, Any]) -> Fault | None:
    """What is wrong with a schema of bounded size; None: it can be used."""
    if _nesting(schema) > MAX_NESTING:
        return Fault((), schema, f"it is nested more than {MAX_NESTING} deep; move parts of it to $defs")
    if schema.get("$schema", DIALECT) not in (DIALECT, DIALECT + "#"):
        why = f"the dialect taken is Draft 2020-12; give {DIALECT}, or leave it out"
        return Fault(("$schema",), schema["$schema"], why)
    return _fault_of_form(schema) or _fault_of_keywords(schema)


def _nesting(value: object) -> int:
    """Levels, counted no further than matters."""
    level, levels = [value], 0
    while level and levels <= MAX_NESTING:
        level, levels = [part for one in level for part in _parts(one)], levels + 1
    return levels


def _parts(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _fault_of_form(schema: Mapping[str, Any]) -> Fault | None:
    """Where the schema breaks the schema of schemas."""
    error = next(Draft202012Validator(Draft202012Validator.META_SCHEMA).iter_errors(schema), None)
    if error is None:
        return None
    # Of alternatives, the one that came furthest tells more.
    while error.context:
        error = max(error.context, key=lambda inner: len(inner.absolute_path))
    path = tuple(error.absolute_path)
    return Fault(path, error.instance, f"it is no JSON Schema there: {_told(error)}; correct it")


def _told(error: ValidationError) -> str:
    if error.validator == "type":
        return f"the type should be {error.validator_value}"
    return f"the rule broken is {error.validator} {json.dumps(error.validator_value)[:100]}"


def _fault_of_keywords(schema: Mapping[str, Any]) -> Fault | None:
    places = dict(_places((), schema))
    by_pointer = {_pointer(path): path for path in places}
    for path, part in places.items():
        for keyword, why in _NOT_TAKEN.items():
            if keyword in part and (path or keyword not in _AT_THE_TOP):
                return Fault((*path, keyword), part[keyword], why)
        for where, pattern in _patterns(part):
            if (why_not := pattern_fault(pattern)) is not None:
                return Fault((*path, *where), pattern, why_not)
        if "$ref" in part and unquote(part["$ref"]) not in by_pointer:
            return Fault((*path, "$ref"), part["$ref"], _ELSEWHERE)
    return _fault_of_circles(places, by_pointer)


def _places(path: Path, schema: object) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Every schema in the schema, with its path; what stands in enum, const, or examples is none."""
    keywords = schema if isinstance(schema, Mapping) else {}  # true and false are schemas, too
    yield path, keywords
    for where, part in _held(keywords):
        yield from _places((*path, *where), part)


def _held(schema: Mapping[str, Any]) -> Iterator[tuple[Path, object]]:
    """The schemas that its keywords hold."""
    for keyword, held in schema.items():
        if keyword in _ONE:
            yield (keyword,), held
        elif keyword in _LISTED:
            yield from (((keyword, index), part) for index, part in enumerate(held))
        elif keyword in _NAMED:
            yield from (((keyword, name), part) for name, part in held.items())


def _pointer(path: Path) -> str:
    """As RFC 6901 writes it in a fragment, before percent-encoding."""
    return "#" + "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def _patterns(schema: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    if "pattern" in schema:
        yield ("pattern",), schema["pattern"]
    for pattern in schema.get("patternProperties", {}):
        yield ("patternProperties", pattern), pattern


def _fault_of_circles(
    places: Mapping[Path, Mapping[str, Any]], by_pointer: Mapping[str, Path]
) -> Fault | None:
    """A reference that comes back to itself at the same value would never end."""
    leads = TopologicalSorter[Path]()
    for path, part in places.items():
        for where, _ in _held(part):
            if where[0] in _SAME_VALUE:
                leads.add(path, (*path, *where))
        if "$ref" in part:
            leads.add(path, by_pointer[unquote(part["$ref"])])
    try:
        leads.prepare()
    except CycleError as error:
        place = next(path for path in error.args[1] if "$ref" in places[path])
        return Fault((*place, "$ref"), places[place]["$ref"], _CIRCLE)
    return None


# Checking -------------------------------------------------------------------------------------------------


class Checker:
    """Tells whether texts are JSON that a schema allows. schema: one without a `fault`.

    A text with a number that no float holds, with NaN, or nested deeper than `MAX_NESTING` is not allowed.
    """

    def __init__(self, schema: Mapping[str, Any], seconds_per_text: float = 10.0) -> None:
        self._seconds, self._deadline = seconds_per_text, math.inf
        # Where a schema names its dialect, the library goes over to its own keywords at a reference to it.
        schema = {keyword: held for keyword, held in schema.items() if keyword not in _AT_THE_TOP}
        keywords = {**Draft202012Validator.VALIDATORS, **_OURS, **self._of_patterns()}
        bounded = {keyword: self._bounded(check) for keyword, check in keywords.items()}
        # An empty registry: what is not in the schema is not asked for anywhere.
        kind = extend(Draft202012Validator, bounded)  # type: ignore[no-untyped-call]
        self._validator = kind(schema, registry=Registry())

    def allows(self, text: str) -> bool:
        """Raises TooMuch where it takes longer than `seconds_per_text`, or goes too deep."""
        try:
            value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        except (ValueError, RecursionError):
            return False
        if _nesting(value) > MAX_NESTING:
            return False
        self._deadline = time.monotonic() + self._seconds
        try:
            return bool(self._validator.is_valid(value))
        except TimeoutError:
            raise TooMuch(f"it took more than {self._seconds:g} s") from None
        except RecursionError:
            raise TooMuch("it went too deep") from None

    def _bounded(self, check: Callable[..., Any]) -> Callable[..., Iterator[ValidationError]]:
        def checked(*args: Any) -> Iterator[ValidationError]:
            self._left()
            yield from check(*args) or ()

        return checked

    def _left(self) -> float:
        """Seconds. Raises TimeoutError where there are none."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    # The library searches with `re`, which nothing can stop.

    def _of_patterns(self) -> dict[str, Callable[..., Iterator[ValidationError]]]:
        def found(pattern: str, text: str) -> bool:
            return regex.compile(pattern, regex.VERSION0).search(text, timeout=self._left()) is not None

        def pattern(validator: Any, wanted: str, value: object, schema: Any) -> Iterator[ValidationError]:
            if isinstance(value, str) and not found(wanted, value):
                yield ValidationError("pattern")

        def pattern_properties(
            validator: Any, parts: Mapping[str, Any], value: object, schema: Any
        ) -> Iterator[ValidationError]:
            for wanted, part in parts.items():
                for name, one in value.items() if isinstance(value, dict) else ():
                    if found(wanted, name):
                        yield from validator.descend(one, part)

        def additional_properties(
            validator: Any, part: Any, value: object, schema: Mapping[str, Any]
        ) -> Iterator[ValidationError]:
            known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
            for name, one in value.items() if isinstance(value, dict) else ():
                if name not in known and not any(found(wanted, name) for wanted in patterns):
                    yield from validator.descend(one, part)

        return {
            "pattern": pattern,
            "patternProperties": pattern_properties,
            "additionalProperties": additional_properties,
        }


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _any_of(validator: Any, parts: list[Any], value: object, schema: Any) -> Iterator[ValidationError]:
    if not any(validator.evolve(schema=part).is_valid(value) for part in parts):
        yield ValidationError("anyOf")


def _one_of(validator: Any, parts: list[Any], value: object, schema: Any) -> Iterator[ValidationError]:
    if sum(validator.evolve(schema=part).is_valid(value) for part in parts) != 1:
        yield ValidationError("oneOf")


def _unique_items(validator: Any, wanted: bool, value: object, schema: Any) -> Iterator[ValidationError]:
    if wanted and isinstance(value, list) and len({_key(one) for one in value}) < len(value):
        yield ValidationError("uniqueItems")


def _key(value: object) -> Hashable:
    """The same for values that JSON Schema calls equal: 1 and 1.0, but not 1 and true."""
    if isinstance(value, dict):
        return "object", frozenset((name, _key(one)) for name, one in value.items())
    if isinstance(value, list):
        return "array", tuple(_key(one) for one in value)
    return isinstance(value, bool), value if isinstance(value, Hashable) else repr(value)


def _multiple_of(validator: Any, unit: float, value: object, schema: Any) -> Iterator[ValidationError]:
    """Of numbers as they are written: 0.3 is a multiple of 0.1."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and (Fraction(str(value)) / Fraction(str(unit))).denominator != 1:
        yield ValidationError("multipleOf")


_OURS: dict[str, Callable[..., Iterator[ValidationError]]] = {
    "anyOf": _any_of,
    "oneOf": _one_of,
    "uniqueItems": _unique_items,
    "multipleOf": _multiple_of,
}
"""Where the library keeps all that is wrong with each alternative, compares each with each, or raises."""
