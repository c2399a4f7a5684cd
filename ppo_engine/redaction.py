"""Keeps the values of secrets out of what a run tells: an error of somebody else's code may hold them.

Knows this process's environment and no spec; an engine has just the secrets that its own spec names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from urllib.parse import quote, quote_plus, urlsplit

from ppo_engine.reward_kinds import SECRET_PREFIX

_CREDENTIALS = re.compile(r"\w+_(API_KEY|ACCESS_KEY|TOKEN|PASSWORD|SECRET|CONNECTION_STRING)")
"""Of variables that are no secrets of a spec, but of the trackers and hubs of an operator."""
_SHORTEST_PART = 8
"""Characters of a credential, or of one line of a secret, that is looked for: less may be any word."""


def redacted(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text with every value of a secret replaced by the secret's name, as in `<secret JUDGE>`."""
    names = {
        spelling: name
        for name, value in _secrets(environment)
        for spelling in _spellings(value)
        if spelling.strip()
    }
    if not names:
        return text
    longest_first = sorted(names, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    return re.sub(pattern, lambda found: f"<secret {names[found[0]]}>", text)


def _secrets(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for variable, value in environment.items():
        if variable.startswith(SECRET_PREFIX):
            yield variable.removeprefix(SECRET_PREFIX), value
        elif _CREDENTIALS.fullmatch(variable) and len(value) >= _SHORTEST_PART:
            yield variable, value
        elif (password := _password(value)) and len(password) >= _SHORTEST_PART:
            yield variable, password


def _password(value: str) -> str | None:
    """That of an address; None: it is none, or has none."""
    try:
        return urlsplit(value).password if "://" in value else None
    except ValueError:
        return None


def _spellings(value: str) -> Iterator[str]:
    """How a message may have it: whole or a line of it; plain, or as Python, JSON, or a URL quotes it."""
    lines = [line.strip() for line in value.splitlines()]
    for part in (value, value.strip(), *(line for line in lines if len(line) >= _SHORTEST_PART)):
        yield part
        yield repr(part)[1:-1]
        yield json.dumps(part)[1:-1]
        yield quote(part, safe="", errors="surrogateescape")
        yield quote(part, errors="surrogateescape")
        yield quote_plus(part, errors="surrogateescape")
