"""The operator's part: start Proxima's embedded stack for a while, and stop it whatever happens."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

CHECKOUT = Path(__file__).parents[3]
START_SECONDS = 300.0
STOP_SECONDS = 120.0  # beyond what the stack gives its own parts
STOP_NOW_SECONDS = 60.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StackFailed(Exception):
    """The stack did not start; the message holds what it printed last."""


@dataclass(frozen=True)
class Service:
    """Where the stack listens, and a key of its first project."""

    url: str
    key: str


@contextmanager
def running(data_dir: Path, models: Path) -> Iterator[Service]:
    """API, worker, and broker in one directory, on a free port; jobs may name models in `models`.

    What they print goes to `stack.log` in `data_dir`. When this returns, none of their processes is left.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    log = data_dir / "stack.log"
    settings = {
        "PROXIMA_MODEL_ROOTS": json.dumps([str(models)]),
        "PROXIMA_STOP_GRACE_SECONDS": "5",  # a job that is cut short here is not meant to be resumed
    }
    process = None
    try:
        with held_back(SIGNALS):  # between its start and our knowing of it, nothing may come
            process = _start(data_dir, log, os.environ | settings)
        yield _when_ready(process, log)
    finally:
        if process is not None:
            _stop(process)


def _start(data_dir: Path, log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "service.embedded", "--data-dir", str(data_dir)]
    with log.open("wb") as output:
        # In a session of its own: a Ctrl-C in the terminal reaches the demo only, which stops the stack.
        return subprocess.Popen(
            command,
            cwd=CHECKOUT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _when_ready(process: subprocess.Popen[bytes], log: Path) -> Service:
    """Wait until the stack has printed its URL and its first API key."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        printed = log.read_text()
        url, key = re.search(r"http://[\w.:]+", printed), re.search(r"\bpxm_\w+", printed)
        if url and key:
            return Service(url[0], key[0])
        time.sleep(0.1)
    raise StackFailed("\n".join(["The embedded stack did not start:", *log.read_text().splitlines()[-20:]]))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the stack to end; a second time, which makes it end its parts at once; then end it alone.

    A further Ctrl-C does not cut this short.
    """
    with held_back(SIGNALS):
        for seconds in (STOP_SECONDS, STOP_NOW_SECONDS):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
                return
        process.kill()
        process.wait()


@contextmanager
def held_back(signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Keep signals waiting while a few lines run; then handle the last that came, if one did.

    They are not blocked, since a child started meanwhile would inherit that.
    """
    came: list[int] = []

    def keep(number: int, _frame: FrameType | None) -> None:
        came.append(number)

    handlers = {number: signal.signal(number, keep) for number in signals}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[-1])
