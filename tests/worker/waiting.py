"""Waiting for what is bound to happen, with a deadline, and looking at the machine's processes."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import psutil

T = TypeVar("T")

DEADLINE_SECONDS = 300.0
POLL_SECONDS = 0.05


def until(look: Callable[[], T | None], what: str, seconds: float = DEADLINE_SECONDS) -> T:
    """The first true answer of `look`."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what}; last seen: {found!r}")
        time.sleep(POLL_SECONDS)
    return found


async def eventually(
    look: Callable[[], Awaitable[T | None]], what: str, seconds: float = DEADLINE_SECONDS
) -> T:
    """The first true answer of `look`, asked without blocking the loop."""
    deadline = time.monotonic() + seconds
    while not (found := await look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what}; last seen: {found!r}")
        await asyncio.sleep(POLL_SECONDS)
    return found


def processes_with(word: str) -> list[psutil.Process]:
    """Running processes with the word in their command line, zombies and this one left out."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        alive = process.info["status"] != psutil.STATUS_ZOMBIE
        if alive and process.pid != psutil.Process().pid and any(word in text for text in words):
            found.append(process)
    return found


def nothing_left(word: str, seconds: float = DEADLINE_SECONDS) -> None:
    """Wait until no process has the word in its command line."""
    until(lambda: not processes_with(word), f"no process with {word!r} left", seconds)
