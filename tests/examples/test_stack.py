"""Starting and stopping the stack around the demo: signals that come at the worst moment."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from randomwalks import stack

from service import embedded

# Leaves when it is asked for the second time.
STUBBORN = """
import signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
print("ready", flush=True)
while len(asked) < 2:
    time.sleep(0.02)
sys.exit(2)
"""


def test_a_signal_waits_until_the_lines_are_done() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), stack.held_back((signal.SIGINT,)):  # noqa: PT012 - the point
        os.kill(os.getpid(), signal.SIGINT)
        done.append(1)
    assert done == [1]


def test_without_a_signal_nothing_happens_and_the_handler_is_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stack.held_back((signal.SIGINT,)):
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stack_that_cannot_start_says_what_it_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROXIMA_LEASE_SECONDS", "-1")
    with pytest.raises(stack.StackFailed, match="PROXIMA_LEASE_SECONDS"), stack.running(tmp_path, tmp_path):
        pytest.fail("it started")


def test_a_stack_that_takes_too_long_is_asked_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "STOP_SECONDS", 1.0)
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        stack._stop(process)
        assert process.returncode == 2


def test_the_stack_has_time_to_end_its_parts_itself() -> None:
    assert stack.STOP_SECONDS > embedded.STOP_SECONDS
