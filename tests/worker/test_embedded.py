"""The whole stack from one command: it says where it is, keeps its key, and never leaves a process behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from service import embedded, migrate
from service.settings import Settings
from service.storage import Storage
from service.store import keys
from service.store.session import Store
from tests.servers import free_port
from tests.worker.fleet import ROOT, Fleet, stand_in
from tests.worker.waiting import DEADLINE_SECONDS, nothing_left, processes_with, until
from worker.settings import WorkerSettings

pytestmark = pytest.mark.anyio


class Stack:
    """`python -m service.embedded` in a directory, and what it printed."""

    def __init__(self, directory: Path, **settings: object) -> None:
        self.data_dir = directory / "data"
        self.output = directory / "output"
        environment = {
            **os.environ,
            # What marks every process of the stack, whatever its command line says.
            "PROXIMA_TEST_MARK": str(self.data_dir),
            "PROXIMA_ENGINE_COMMAND": json.dumps(stand_in("--hang-at", 2)),
            "PROXIMA_KILL_GRACE_SECONDS": "1",
            "OMP_NUM_THREADS": "1",
            **{f"PROXIMA_{name.upper()}": str(value) for name, value in settings.items()},
        }
        command = [sys.executable, "-m", "service.embedded", "--data-dir", str(self.data_dir), "--port", "0"]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def told(self, pattern: str) -> str:
        """Wait for it to print something."""

        def look() -> re.Match[str] | None:
            assert self.process.poll() is None, self.output.read_text()
            return re.search(pattern, self.output.read_text())

        return until(look, f"the stack prints {pattern}")[0]

    def processes(self) -> list[int]:
        """All that were started with the mark in their environment, this stack's own process included."""
        mark = f"PROXIMA_TEST_MARK={self.data_dir}\0".encode()
        return [int(entry.name) for entry in Path("/proc").iterdir() if mark in _environment(entry)]

    def nothing_left(self) -> None:
        until(lambda: not self.processes(), "no process of the stack is left")
        nothing_left(str(self.data_dir))


def _environment(entry: Path) -> bytes:
    try:
        return (entry / "environ").read_bytes() if entry.name.isdigit() else b""
    except OSError:
        return b""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Stack]]:
    made: list[Stack] = []

    def start(**settings: object) -> Stack:
        made.append(Stack(tmp_path, **settings))
        return made[-1]

    yield start
    for stack in made:
        stack.process.kill()
        stack.process.wait()
        for process in processes_with(str(tmp_path)):
            process.kill()


def ask(url: str, key: str) -> int:
    with urllib.request.urlopen(
        urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    ) as answer:
        status: int = answer.status
        return status


def test_it_says_where_it_is_and_its_key_opens_it_again_and_again(start: Callable[..., Stack]) -> None:
    keys = []
    for _ in range(2):
        stack = start()
        url, key = stack.told(r"http://127\.0\.0\.1:\d+"), stack.told(r"pxm_\w+")
        assert ask(f"{url}/v1/jobs", key) == 200
        assert ask(f"{url}/docs", "") == 200
        keys.append(key)
        stack.process.send_signal(signal.SIGINT)
        assert stack.process.wait(DEADLINE_SECONDS) == 0, stack.output.read_text()
        stack.nothing_left()
        stack.output.unlink()
    assert keys[0] == keys[1]


@asynccontextmanager
async def running(stack: Stack) -> AsyncIterator[None]:
    """The worker of the stack runs an engine, which hangs."""
    stack.told("pxm_")
    settings = WorkerSettings(data_dir=stack.data_dir)
    store = Store.open(settings.database_url)
    fleet = Fleet(stack.data_dir, settings, store, Storage.open(settings.storage_url))
    await fleet.found()
    await fleet.gets_to(await fleet.submit(), 2)
    assert fleet.engines()
    yield
    await store.close()


async def test_a_kill_leaves_nothing(start: Callable[..., Stack]) -> None:
    stack = start(stop_grace_seconds=1)
    async with running(stack):
        stack.process.kill()
        stack.process.wait()
        stack.nothing_left()


async def test_a_second_ctrl_c_does_not_wait_for_the_job(start: Callable[..., Stack]) -> None:
    stack = start(stop_grace_seconds=3600)
    async with running(stack):
        stack.process.send_signal(signal.SIGINT)
        stack.told("Once more to stop at once")
        stack.process.send_signal(signal.SIGINT)
        assert stack.process.wait(DEADLINE_SECONDS) == 0
        assert stack.processes() == []


MOMENTS: dict[str, Callable[[Stack], bool]] = {
    "at once": lambda stack: True,
    "the database is made": lambda stack: (stack.data_dir / "proxima.db").exists(),
    "a part has started": lambda stack: len(stack.processes()) > 1,
    "all parts have started": lambda stack: len(stack.processes()) > 4,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ended_while_it_starts_it_leaves_nothing(start: Callable[..., Stack], moment: str) -> None:
    stack = start()
    until(lambda: MOMENTS[moment](stack), moment)
    stack.process.send_signal(signal.SIGINT)
    stack.process.wait(DEADLINE_SECONDS)
    stack.nothing_left()


def test_two_stacks_never_take_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "PREFERRED_PORT", free_port())
    with embedded._listen("127.0.0.1", None) as first, embedded._listen("127.0.0.1", None) as second:
        assert first.getsockname()[1] == embedded.PREFERRED_PORT
        assert second.getsockname()[1] != embedded.PREFERRED_PORT


@pytest.mark.parametrize("kept", ["", keys.generate()], ids=["nothing", "a key of another database"])
def test_a_kept_key_that_opens_nothing_is_replaced(tmp_path: Path, kept: str) -> None:
    settings = Settings(data_dir=tmp_path)
    migrate.upgrade(settings.database_url)
    (tmp_path / "api.key").write_text(kept)
    key = embedded._first_key(settings)
    assert key not in ("", kept)
    assert embedded._first_key(settings) == key, "it opens the project, and is kept"
    assert (tmp_path / "api.key").stat().st_mode & 0o777 == 0o600


def test_a_port_in_use_is_told(start: Callable[..., Stack], tmp_path: Path) -> None:
    url = start().told(r"http://127\.0\.0\.1:\d+")
    command = [
        sys.executable,
        "-m",
        "service.embedded",
        "--data-dir",
        str(tmp_path / "b"),
        "--port",
        url.split(":")[2],
    ]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "choose another --port" in refused.stderr
