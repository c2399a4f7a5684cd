"""Events survive the way through a file, whatever numbers they hold and wherever a write was cut."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue, ValidationError

from ppo_engine.events import Event, decode, encode, finite, read_complete


def event(update: int, data: dict[str, JsonValue] | None = None) -> Event:
    return Event(key=f"metrics:{update}", type="metrics", update=update, time=1.5, data=data or {})


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.dictionaries(st.text(), values, max_size=4))
def test_what_is_said_is_what_is_read(data: dict[str, JsonValue]) -> None:
    line = encode(event(1, data))

    assert line.count(b"\n") == 1
    assert decode(line).data == finite(data)


def test_non_finite_numbers_are_words() -> None:
    line = encode(event(1, {"a": math.nan, "b": [math.inf, {"c": -math.inf}]}))

    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["data"] == {"a": "NaN", "b": ["Infinity", {"c": "-Infinity"}]}


def test_a_line_that_is_being_written_is_left(tmp_path: Path) -> None:
    path, lines = tmp_path / "events.jsonl", [encode(event(n)) for n in range(3)]
    whole = b"".join(lines)

    assert read_complete(path) == ([], 0)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        events, offset = read_complete(path)
        assert [e.update for e in events] == list(range(whole[:cut].count(b"\n")))
        assert whole[:offset] == b"".join(lines[: len(events)])
    path.write_bytes(whole)
    assert read_complete(path, len(lines[0]))[0] == [event(1), event(2)]


def test_what_is_no_event_is_refused() -> None:
    with pytest.raises(ValidationError):
        decode(b'{"key": "a", "type": "gossip", "update": 1, "time": 0, "data": {}}')
