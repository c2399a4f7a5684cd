"""Names of rows: a prefix that tells the kind, a time, and chance; sorted by name, rows are sorted by age."""

from __future__ import annotations

import re
import secrets
import time


def new_id(kind: str) -> str:
    """A new id such as `job_01932f6a4c7d8e9f00112233445566aa`: 12 digits of milliseconds, 20 of chance."""
    return f"{kind}_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


def is_id(kind: str, text: str) -> bool:
    """Whether a text has the form of an id of this kind."""
    return re.fullmatch(rf"{kind}_[0-9a-f]{{32}}", text) is not None
