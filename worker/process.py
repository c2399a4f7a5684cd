"""A program in a process group of its own: started, awaited, stopped politely, then firmly.

Every program runs below a guard (`guard.py`), which leaves nothing of it behind, even when this process
is killed. This module knows nothing of jobs.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

GUARD = Path(__file__).with_name("guard.py")


@dataclass(frozen=True)
class Program:
    """What to start.

    output:
        The file that gets what it prints, on both streams.
    lease:
        The control file whose lease also binds the guard.
    grace_seconds:
        From the polite signal to the firm one.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    directory: Path
    output: Path
    lease: Path | None = None
    grace_seconds: float = 10.0


class Process:
    """A running program, seen through its guard."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Of the guard; the program is its only child."""
        return self._process.pid

    async def wait(self) -> int:
        """Until nothing of the program is left. Its exit status; negative: the signal that ended it."""
        return await self._process.wait()

    def stop(self) -> None:
        """Ask it to end (SIGTERM); the guard ends it after the grace period."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it, and all it started, now."""
        self._signal(signal.SIGQUIT)

    def _signal(self, number: int) -> None:
        if self._process.returncode is None:
            self._process.send_signal(number)


@asynccontextmanager
async def running(program: Program) -> AsyncIterator[Process]:
    """Start a program; on the way out, whatever the reason, nothing of it is left."""
    with program.output.open("ab") as output:
        process = Process(
            await asyncio.create_subprocess_exec(
                *_guarded(program),
                env=program.environment,
                cwd=program.directory,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        )
    try:
        yield process
    finally:
        process.kill()
        await asyncio.shield(process.wait())


def _guarded(program: Program) -> list[str]:
    lease = [] if program.lease is None else ["--lease", str(program.lease)]
    return [
        *(sys.executable, "-I", "-S", str(GUARD)),
        *("--parent", str(os.getpid())),
        *("--grace", str(program.grace_seconds)),
        *lease,
        "--",
        *program.command,
    ]
