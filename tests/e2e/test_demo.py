"""The demo, interrupted: whenever that is, none of its processes is left."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.worker.waiting import nothing_left, until

PATIENCE_SECONDS = 600.0
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


class Demo:
    """The demo as a process of its own, with what it has printed so far."""

    def __init__(self, directory: Path) -> None:
        self.place, self.output = directory / "place", directory / "output"
        command = [sys.executable, "-m", "randomwalks", "--keep", str(self.place)]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=ENVIRONMENT)

    def printed(self, text: str) -> bool:
        assert self.process.poll() is None, self.output.read_text()
        return text in self.output.read_text()

    def has_children(self) -> bool:
        assert self.process.poll() is None, self.output.read_text()
        return bool(psutil.Process(self.process.pid).children())


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    demo = Demo(tmp_path)
    yield demo
    demo.process.kill()
    demo.process.wait()


@pytest.mark.parametrize(
    ("moment", "came", "number"),
    [
        ("the stack starts", Demo.has_children, signal.SIGINT),
        ("the policy is fitted", lambda demo: demo.printed("Proxima listens at"), signal.SIGTERM),
        ("the job runs", lambda demo: demo.printed("update 1/"), signal.SIGINT),
    ],
)
def test_a_signal_leaves_no_process(
    demo: Demo, moment: str, came: Callable[[Demo], bool], number: signal.Signals
) -> None:
    until(lambda: came(demo), moment, PATIENCE_SECONDS)
    below = psutil.Process(demo.process.pid).children(recursive=True)
    assert below
    demo.process.send_signal(number)
    assert demo.process.wait(PATIENCE_SECONDS) == 130
    assert not psutil.wait_procs(below, timeout=PATIENCE_SECONDS)[1]
    nothing_left(str(demo.place))


def test_an_impatient_ctrl_c_leaves_no_process_either(demo: Demo) -> None:
    until(lambda: demo.printed("Proxima listens at"), "the stack is up", PATIENCE_SECONDS)
    while demo.process.poll() is None:
        demo.process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            demo.process.wait(0.05)
    nothing_left(str(demo.place))


def test_a_directory_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    command = [sys.executable, "-m", "randomwalks", "--keep", str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "not empty" in refused.stderr
