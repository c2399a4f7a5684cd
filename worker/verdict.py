"""From how an engine ended, and what was wanted of it, to what becomes of the job.

A pure function of facts; `train.py` writes its answer to the store. `result.json` is the only truth about
an engine's end: launchers swallow exit codes.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ppo_engine.issues import Issue
from ppo_engine.run_dir import Result

LOG_LINES = 40
LOG_BYTES = 8_000

# What an engine was asked to stop for. `leave`: the worker was told to go. `lease`: it could not renew.
Wish = Literal["cancel", "pause", "leave", "lease"]
State = Literal["succeeded", "failed", "cancelled", "paused", "queued"]


@dataclass(frozen=True)
class Verdict:
    """What becomes of a job.

    state:
        Where it goes; `queued`: another attempt takes it up.
    code:
        For `failed`: why, in a word that programs read. For `queued`: the reason of going back.
    message:
        For people, in a sentence.
    spend_attempt:
        For `queued`: whether the attempt counts against those without progress.
    """

    state: State
    code: str = ""
    message: str = ""
    issues: tuple[Issue, ...] = ()
    spend_attempt: bool = False


def judge(result: Result | None, status: int, wish: Wish | None) -> Verdict:
    """Decide.

    status:
        The exit status of the engine, or of its launcher; negative: minus the signal that ended it.
    """
    if result is not None and result.outcome == "succeeded":
        return Verdict("succeeded")
    if wish == "cancel":
        return Verdict("cancelled")
    if result is not None and result.outcome == "failed":
        return _failed(result)
    if wish is not None:
        return stopped(wish)
    if result is not None:
        return Verdict("queued", code=result.reason, message=result.message, spend_attempt=True)
    return Verdict("failed", code="crash", message=_describe(status))


def starts_again(result: Result | None, wish: Wish | None) -> bool:
    """Whether the engine is started once more where it is: memory ended, and it left word to take less.

    It does so only while it can take less, so it is not started for ever.
    """
    return wish is None and result is not None and (result.outcome, result.reason) == ("stopped", "oom")


def stopped(wish: Wish) -> Verdict:
    """What becomes of a job whose engine stopped, or never started, because it was wished."""
    match wish:
        case "cancel":
            return Verdict("cancelled")
        case "pause":
            return Verdict("paused")
        case "leave":
            return Verdict("queued", code="worker_stopped", message="The worker was asked to stop.")
        case "lease":
            return Verdict("queued", code="database", message="The worker could not reach the database.")


def invalid(issues: tuple[Issue, ...]) -> Verdict:
    """For a spec that breaks a rule."""
    count = "1 rule is broken" if len(issues) == 1 else f"{len(issues)} rules are broken"
    return Verdict("failed", code="invalid_spec", message=f"{count}: {issues[0]}", issues=issues)


def _failed(result: Result) -> Verdict:
    if result.reason == "spec":
        return Verdict("failed", code="invalid_spec", message=result.message, issues=result.issues)
    return Verdict("failed", code=result.reason, message=result.message)


def _describe(status: int) -> str:
    if status >= 0:
        return f"The engine ended with exit status {status} and said nothing about why; see the log."
    often = " Often that means that the machine had no memory left." if -status == signal.SIGKILL else ""
    return f"The engine was ended by signal {-status} ({signal.strsignal(-status)}).{often}"


def log_tail(log: Path, lines: int = LOG_LINES, size: int = LOG_BYTES) -> str:
    """The last lines of an engine's log, within so many bytes; empty when there is none, or no disk."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - size))
            text = file.read().decode(errors="replace").replace("\x00", "\ufffd")
    except OSError:
        return ""  # how a run ended is told all the same
    return "\n".join(text.splitlines()[-lines:])
