"""Conditional and range requests (RFC 9110, sections 13 and 14) as functions of a request's headers.

What is served is named by its content: the entity tag is strong, and is the sha256 of all its bytes.
This module knows no storage and sends nothing.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

_RANGE = re.compile(r"bytes[ \t]*=[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*", re.IGNORECASE)
_TAG = re.compile(r'(W/)?"([^"]*)"')


@dataclass(frozen=True)
class Span:
    """Bytes `start` (included) to `stop` (excluded)."""

    start: int
    stop: int


@dataclass(frozen=True)
class Verdict:
    """How to answer: 200 all, 206 the span, 304 nothing new, 412 a failed If-Match, 416 no such bytes."""

    status: Literal[200, 206, 304, 412, 416]
    span: Span


def entity_tag(sha256: str) -> str:
    return f'"{sha256}"'


def repr_digest(sha256: str) -> str:
    """The value of Repr-Digest (RFC 9530) for a hexadecimal sha256."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"


def judge(headers: Mapping[str, str], sha256: str, size: int) -> Verdict:
    """Decide how a GET of `size` bytes is answered.

    headers:
        The request's, by lower-case name.
    """
    everything = Span(0, size)
    if (wanted := headers.get("if-match")) is not None and not _matches(wanted, sha256, weakly=False):
        return Verdict(412, everything)
    if (known := headers.get("if-none-match")) is not None and _matches(known, sha256, weakly=True):
        return Verdict(304, everything)
    # A partial answer must continue what the client already has.
    condition = headers.get("if-range")
    if condition is not None and condition.strip() != entity_tag(sha256):
        return Verdict(200, everything)
    return _judge_range(headers.get("range"), size)


def _judge_range(header: str | None, size: int) -> Verdict:
    """Several ranges, other units, and malformed ones are answered whole, as the RFC allows."""
    everything = Span(0, size)
    match = _RANGE.fullmatch(header.strip()) if header is not None else None
    if match is None or match.groups() == ("", ""):
        return Verdict(200, everything)
    first, last = match.groups()
    if not first:
        span = Span(max(size - int(last), 0), size)
    elif last and int(last) < int(first):
        return Verdict(200, everything)
    else:
        span = Span(int(first), min(int(last) + 1, size) if last else size)
    return Verdict(206, span) if span.start < span.stop else Verdict(416, everything)


def _matches(header: str, sha256: str, *, weakly: bool) -> bool:
    if header.strip() == "*":
        return True
    return any(tag == sha256 and (weakly or not weak) for weak, tag in _TAG.findall(header))
