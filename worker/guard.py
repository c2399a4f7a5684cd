"""A small program around a command: however things end, it leaves no process of that command behind.

    guard.py --parent PID [--lease control.json] [--grace SECONDS] -- COMMAND [ARGUMENT ...]

The worker starts every engine through it, because a worker that was killed can stop nothing, and because
launchers put their ranks into sessions of their own, where no signal to a process group finds them. The guard
adopts every descendant that loses its parent (it is a "subreaper"), so it can find and end them all.

It asks the command to stop (SIGTERM), and ends it after the grace period, when it gets SIGTERM, or when the
process `--parent` is gone. It ends the command at once when it gets a second signal or SIGQUIT, or when
the lease in the file is over for longer than the grace period. When the command has ended, the rest of its
descendants are ended too, and the guard ends the same way, with the same status or signal.

Standard library only, and run by its path: it starts in milliseconds and knows nothing of Proxima but the
`lease_until` of a control file. Where there is no Linux, it knows the command's process group only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

POLL_SECONDS = 0.25
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LINUX = sys.platform == "linux"


class Asked:
    """Counts what the signals ask for, and wakes the loop for each of them."""

    def __init__(self) -> None:
        self.times = 0
        self.awake, wake = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(self.awake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGQUIT, self._stop_now)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.times += 1

    def _stop_now(self, number: int, frame: FrameType | None) -> None:
        self.times += 2

    def wait(self, seconds: float) -> None:
        """Return at the next signal, or after so many seconds."""
        if select.select([self.awake], [], [], seconds)[0]:
            os.read(self.awake, 512)


class Child:
    """The command's process, and everything below this guard, which is collected along with it.

    status: the wait status of the command once it has ended.
    """

    def __init__(self, command: list[str]) -> None:
        self.status: int | None = None
        self.pid = _spawn(command)

    def reap(self) -> bool:
        """Collect whatever has ended; whether anything below this guard is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.pid:
                self.status = status


def main(argv: list[str]) -> int:
    options = _options(argv)
    asked = Asked()
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = Child(options.command)
    _watch(child, options, asked)
    _end_descendants(child)
    return _end_as(signal.SIGKILL if child.status is None else child.status)


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="guard")
    parser.add_argument("--parent", type=int, required=True, help="stop when this process is gone")
    parser.add_argument("--lease", type=Path, help="a control file with lease_until (unix seconds)")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds from SIGTERM to SIGKILL")
    parser.add_argument("command", nargs="+")
    return parser.parse_args(argv)


def _spawn(command: list[str]) -> int:
    """Start the command in a session of its own; it dies at once if this guard is killed.

    Returns when the command runs: the pipe is closed by exec. A signal sent any earlier would be lost.
    """
    guard = os.getpid()
    started, starting = os.pipe()
    child = os.fork()
    if child:
        os.close(starting)
        os.read(started, 1)
        os.close(started)
        return child
    try:
        os.setsid()
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == guard:
            os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"cannot start {command[0]}: {error}\n")
        sys.stderr.flush()
    os._exit(127)


def _watch(child: Child, options: argparse.Namespace, asked: Asked) -> None:
    """Return when the command has ended, or is to be ended now."""
    deadline: float | None = None
    while child.reap() and child.status is None:
        if asked.times > 1 or _over(options.lease, options.grace):
            return
        if deadline is None and (asked.times or os.getppid() != options.parent):
            deadline = time.monotonic() + options.grace
            _signal(child.pid, signal.SIGTERM, os.killpg)
        if deadline is not None and time.monotonic() >= deadline:
            return
        asked.wait(POLL_SECONDS)


def _over(lease: Path | None, grace: float) -> bool:
    """Whether the lease in the file ended more than the grace period ago."""
    if lease is None:
        return False
    try:
        until = json.loads(lease.read_bytes()).get("lease_until")
    except (OSError, ValueError):
        return False
    return until is not None and time.time() > until + grace


def _end_descendants(child: Child, patience: float = 20.0) -> None:
    """Kill everything below this process, also what left the command's group, until nothing is left."""
    deadline = time.monotonic() + patience
    while child.reap() and time.monotonic() < deadline:
        if LINUX:
            for pid in _descendants(os.getpid()):
                _signal(pid, signal.SIGKILL, os.kill)
        else:
            _signal(child.pid, signal.SIGKILL, os.killpg)
        time.sleep(0.01)


def _descendants(root: int) -> list[int]:
    """The processes below `root`, children before grandchildren."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent_of(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    level = children.get(root, [])
    while level:
        found += level
        level = [pid for parent in level for pid in children.get(parent, [])]
    return found


def _parent_of(entry: Path) -> int | None:
    try:
        return int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return None


def _signal(target: int, number: int, send: Callable[[int, int], None]) -> None:
    with contextlib.suppress(ProcessLookupError):
        send(target, number)


def _prctl(option: int, value: int) -> None:
    if LINUX:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _end_as(status: int) -> int:
    """The exit status of the command, or death by the same signal."""
    if not os.WIFSIGNALED(status):
        return os.waitstatus_to_exitcode(status)
    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
