"""Schemas that are taken, those that are not, and values held against them: the library's answer, bounded."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from ppo_engine.json_schemas import DIALECT, MAX_NESTING, Checker, TooMuch, fault

DOUBLING = {
    "$ref": "#/$defs/0",
    "$defs": {
        **{str(level): {"allOf": [{"$ref": f"#/$defs/{level + 1}"}] * 2} for level in range(40)},
        "40": {},
    },
}
"""Two references to two references to …: 2^40 steps."""


@pytest.mark.parametrize(
    ("schema", "path", "why"),
    [
        ({"type": "strin"}, ("type",), "no JSON Schema there"),
        ({"required": "a"}, ("required",), "the type should be array"),
        (
            {"properties": {"a": {"minimum": "1"}}},
            ("properties", "a", "minimum"),
            "the type should be number",
        ),
        ({"$schema": "http://json-schema.org/draft-07/schema#"}, ("$schema",), "Draft 2020-12"),
        ({"items": {"$schema": "x"}}, ("items", "$schema"), "at the top of a schema only"),
        ({"$defs": {"a": {"$id": "x"}}}, ("$defs", "a", "$id"), "at the top of a schema only"),
        ({"$ref": "https://example.com/x"}, ("$ref",), "none is fetched"),
        ({"$ref": "file:///etc/passwd"}, ("$ref",), "none is fetched"),
        ({"$ref": "#/$defs/none"}, ("$ref",), "inside of this one"),
        ({"const": {"a": {}}, "$ref": "#/const/a"}, ("$ref",), "inside of this one"),
        ({"$dynamicRef": "#x"}, ("$dynamicRef",), "not taken"),
        ({"not": {"$anchor": "x"}}, ("not", "$anchor"), "not taken"),
        ({"unevaluatedProperties": False}, ("unevaluatedProperties",), "not taken"),
        ({"anyOf": [{"pattern": "(a"}]}, ("anyOf", 0, "pattern"), "missing )"),
        ({"pattern": "((a{999}){999}){999}"}, ("pattern",), "parts"),
        ({"patternProperties": {"[": {}}}, ("patternProperties", "["), "not a regular expression"),
        ({"$ref": "#"}, ("$ref",), "leads back to itself"),
        ({"$defs": {"a": {"not": {"$ref": "#/$defs/a"}}}}, ("$defs", "a", "not", "$ref"), "back to itself"),
    ],
)
def test_schemas_that_are_not_taken(schema: dict[str, Any], path: tuple[str | int, ...], why: str) -> None:
    found = fault(schema)
    assert found is not None
    assert found.path == path
    assert why in found.why


def test_deep_schemas_are_not_taken() -> None:
    schema: dict[str, Any] = {}
    for _ in range(MAX_NESTING - 1):
        schema = {"not": schema}
    assert fault(schema) is None
    found = fault({"not": schema})
    assert found is not None
    assert "32 deep" in found.why


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "https://example.com/x"},
        {"properties": {"$ref": {"type": "string"}, "pattern": {"type": "string"}}},
        {"enum": [{"$ref": "https://example.com"}, {"pattern": "("}]},
        {"items": {"$ref": "#"}},
        {"properties": {"next": {"$ref": "#/$defs/a~1b%25"}}, "$defs": {"a/b%": {"type": "null"}}},
        {"$defs": {"a": {"properties": {"b": {"$ref": "#/$defs/a"}}}}, "$ref": "#/$defs/a"},
        DOUBLING,
    ],
)
def test_schemas_that_are_taken(schema: dict[str, Any]) -> None:
    assert fault(schema) is None


# Held against values -------------------------------------------------------------------------------------

SCHEMAS: list[dict[str, Any]] = [
    {"type": ["integer", "array"]},
    {"enum": [1, True, "a", [1], {"a": None}]},
    {"const": [1.0, {"a": False}]},
    {"minimum": 0, "exclusiveMaximum": 2},
    {"multipleOf": 0.5},
    {"minLength": 1, "maxLength": 2, "pattern": "^a"},
    {"uniqueItems": True},
    {"prefixItems": [{"type": "integer"}], "items": {"type": "string"}},
    {"contains": {"const": 1}, "minContains": 2, "maxContains": 2},
    {"minItems": 1, "maxItems": 1},
    {"properties": {"a": {"type": "integer"}}, "additionalProperties": False},
    {"patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": {"type": "null"}},
    {"required": ["a"], "dependentRequired": {"a": ["b"]}},
    {"propertyNames": {"maxLength": 1}, "maxProperties": 1},
    {"dependentSchemas": {"a": {"required": ["b"]}}},
    {"allOf": [{"type": "array"}, {"minItems": 1}]},
    {"anyOf": [{"type": "integer"}, {"minItems": 1, "type": "array"}]},
    {"oneOf": [{"type": "number"}, {"minimum": 1}, {"type": "array"}]},
    {"not": {"type": "object"}},
    {"if": {"type": "integer"}, "then": {"minimum": 1}, "else": {"type": "array"}},
    {"items": {"$ref": "#"}, "type": ["array", "null"]},
    {"additionalProperties": {"$ref": "#/$defs/x"}, "$defs": {"x": False}},
]
ATOMS = st.sampled_from([None, True, False, 0, 1, 1.0, -1.5, 2, "", "a", "ab", "abc", "b"])
VALUES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "ab", "b"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.sampled_from(SCHEMAS), VALUES)
def test_the_answer_is_the_librarys(schema: dict[str, Any], value: Any) -> None:
    assert fault(schema) is None
    assert Checker(schema).allows(json.dumps(value)) is Draft202012Validator(schema).is_valid(value)


@pytest.mark.parametrize(
    ("schema", "text", "allowed"),
    [
        ({"multipleOf": 0.1}, "0.3", True),
        ({"multipleOf": 0.1}, "0.35", False),
        # A reference to the whole stays with our own keywords, though it names its dialect.
        ({"$schema": DIALECT, "items": {"$ref": "#"}, "multipleOf": 0.1}, "[0.3]", True),
        ({"multipleOf": 3}, "9" * 400, True),
        ({"multipleOf": 0.5}, "9" * 400, True),  # no float holds it
        ({"uniqueItems": True}, "[1, 1.0]", False),
        ({"uniqueItems": True}, "[1, true]", True),
        ({"uniqueItems": True}, '[{"a": 1, "b": 2}, {"b": 2, "a": 1}]', False),
        ({}, "1e999", False),
        ({}, "Infinity", False),
        ({}, "9" * 5000, False),
        ({}, '"\\ud800"', True),
        ({"items": {"$ref": "#"}}, "[" * MAX_NESTING + "]" * MAX_NESTING, True),
        ({"items": {"$ref": "#"}}, "[" * (MAX_NESTING + 1) + "]" * (MAX_NESTING + 1), False),
        ({}, "[" * 100_000, False),
        ({"format": "email"}, '"no"', True),  # an annotation, in this dialect
    ],
)
def test_values_at_the_edges(schema: dict[str, Any], text: str, allowed: bool) -> None:
    assert Checker(schema).allows(text) is allowed


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (DOUBLING, "1"),
        ({"pattern": r"^(a|aa|a.a|\w+)+$"}, json.dumps("a" * 200 + "!")),
        ({"patternProperties": {r"^(a|aa|a.a|\w+)+$": {}}}, json.dumps({"a" * 200 + "!": 1})),
        (
            {"patternProperties": {r"^(a|aa|a.a|\w+)+$": {}}, "additionalProperties": False},
            json.dumps({"a" * 200 + "!": 1}),
        ),
    ],
)
def test_a_check_ends(schema: dict[str, Any], text: str) -> None:
    checker = Checker(schema, seconds_per_text=0.1)
    with pytest.raises(TooMuch, match=r"more than 0\.1 s"):
        checker.allows(text)


def test_a_check_that_goes_too_deep_ends() -> None:
    with pytest.raises(TooMuch, match="too deep"):
        Checker({"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}}).allows("1")


def test_no_reference_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*args: object) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(Exception, match="Unresolvable"):
        Checker({"$ref": "http://127.0.0.1:9/x"}).allows("1")


def test_equal_items_are_found_without_comparing_each_with_each() -> None:
    # Numbers and lists cannot be sorted together: the library would compare 200 million pairs.
    items = [value for number in range(10_000) for value in (number, [number])]
    assert Checker({"uniqueItems": True}).allows(json.dumps(items))
    assert not Checker({"uniqueItems": True}).allows(json.dumps([*items, [17]]))
