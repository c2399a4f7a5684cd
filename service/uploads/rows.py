"""What a row of a prompt file is: a prompt as text, as chat messages, or as token ids, and further columns.

The rules here need nothing but the row itself; whether a prompt fits the model's context, only the engine
can tell. This module knows no file formats.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ppo_engine.issues import Issue, Loc, shown

PROMPT_COLUMNS = ("prompt", "messages", "input_ids")
ROLES = ("system", "developer", "user", "assistant", "tool")

_MAX_TOKEN_ID = 2**31 - 1
_FIX = 'give exactly one of "prompt" (text), "messages" (chat), and "input_ids" (token ids)'


def check_row(row: object) -> Iterator[Issue]:
    """Everything wrong with a row; locs start at the row."""
    if not isinstance(row, dict):
        yield Issue(loc=(), msg=f"{shown(row)} given; a row is a JSON object with its prompt in it: {_FIX}.")
        return
    named = [name for name in PROMPT_COLUMNS if row.get(name) is not None]
    if len(named) != 1:
        given = f"{' and '.join(named)} given" if named else f"no prompt given, only {shown(sorted(row))}"
        yield Issue(loc=(), msg=f"{given}; {_FIX}.")
    elif named == ["prompt"]:
        yield from _check_prompt(row["prompt"])
    elif named == ["messages"]:
        yield from _check_messages(row["messages"])
    else:
        yield from _check_input_ids(row["input_ids"])


def canonical(row: dict[str, Any]) -> bytes:
    """The row as one line of canonical JSONL: compact UTF-8, columns in their order, newline included.

    Prompt columns that hold null are left out: a table has every column in every row, a row one prompt.

    Raises:
        ValueError: the row holds what JSON or Unicode has no form for; the message says what.
    """
    kept = {name: value for name, value in row.items() if value is not None or name not in PROMPT_COLUMNS}
    try:
        text = json.dumps(kept, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode() + b"\n"
    except UnicodeEncodeError as error:
        lone = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{lone} given, half of a surrogate pair; write the whole character") from None
    except ValueError:
        raise ValueError("a number that is NaN or infinite given; JSON has neither: give null") from None
    except TypeError as error:
        raise ValueError(f"a value JSON has no form for ({error}); give text or a number") from None


def _check_prompt(prompt: object) -> Iterator[Issue]:
    if not isinstance(prompt, str) or not prompt:
        yield Issue(loc=("prompt",), msg=f"{shown(prompt)} given; a prompt is text that is not empty.")


def _check_messages(messages: object) -> Iterator[Issue]:
    if not isinstance(messages, list) or not messages:
        yield Issue(
            loc=("messages",),
            msg=f'{shown(messages)} given; messages are a list of {{"role", "content"}}, the last from the '
            "user.",
        )
        return
    issues = [issue for index, message in enumerate(messages) for issue in _check_message(message, index)]
    yield from issues
    last = messages[-1]
    if not issues and last["role"] != "user":
        yield Issue(
            loc=("messages", len(messages) - 1, "role"),
            msg=f"{shown(last['role'])} given in the last message; the policy answers the user: "
            'end with a message of role "user".',
        )
    elif not issues and not last["content"]:
        yield Issue(
            loc=("messages", len(messages) - 1, "content"),
            msg='"" given in the last message; give the text the policy shall answer.',
        )


def _check_message(message: object, index: int) -> Iterator[Issue]:
    loc: Loc = ("messages", index)
    if not isinstance(message, dict):
        yield Issue(loc=loc, msg=f'{shown(message)} given; a message is an object {{"role", "content"}}.')
        return
    if message.get("role") not in ROLES:
        yield Issue(
            loc=(*loc, "role"), msg=f"{shown(message.get('role'))} given; a role is one of {shown(ROLES)}."
        )
    if not isinstance(message.get("content"), str):
        yield Issue(loc=(*loc, "content"), msg=f"{shown(message.get('content'))} given; content is text.")


def _check_input_ids(ids: object) -> Iterator[Issue]:
    if not isinstance(ids, list) or not ids:
        yield Issue(
            loc=("input_ids",), msg=f"{shown(ids)} given; input_ids are a list of token ids, not empty."
        )
        return
    for index, token in enumerate(ids):
        # A bool is an int to Python, and no token id.
        if type(token) is not int or not 0 <= token <= _MAX_TOKEN_ID:
            yield Issue(
                loc=("input_ids", index),
                msg=f"{shown(token)} given; a token id is a whole number from 0 to {_MAX_TOKEN_ID}.",
            )
            return
