"""Programs below their guard: they end as they end, and nothing of them is ever left."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker.waiting import eventually, nothing_left, processes_with, until
from worker.process import Program, running

pytestmark = pytest.mark.anyio

# Says "ready", then: starts a child in a session of its own, ignores or obeys SIGTERM, and waits.
PROGRAM = """
import signal, subprocess, sys, time
token, obeys = sys.argv[1], sys.argv[2] == "obeys"
def stop(number, frame):
    print("asked", flush=True)
    if obeys:
        sys.exit(7)
signal.signal(signal.SIGTERM, stop)
child = '''
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
'''
subprocess.Popen([sys.executable, "-c", child, token], start_new_session=True)
while True:
    time.sleep(0.1)
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def token() -> Iterator[str]:
    """A word that marks the processes of one test; whatever a failed test left is ended."""
    word = f"proxima-test-{uuid.uuid4()}"
    yield word
    for process in processes_with(word):
        process.kill()


def program(tmp_path: Path, *command: str, lease: Path | None = None, grace_seconds: float = 30.0) -> Program:
    return Program(
        command=[sys.executable, "-c", *command],
        environment=dict(os.environ),
        directory=tmp_path,
        output=tmp_path / "output",
        lease=lease,
        grace_seconds=grace_seconds,
    )


async def said(tmp_path: Path, word: str) -> None:
    async def look() -> bool:
        return word in (tmp_path / "output").read_text()

    await eventually(look, f"the program says {word!r}")


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("raise SystemExit(0)", 0),
        ("raise SystemExit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os, signal; os.kill(os.getpid(), signal.SIGABRT)", -6),
    ],
)
async def test_a_program_ends_with_its_own_status(tmp_path: Path, code: str, status: int) -> None:
    async with running(program(tmp_path, code)) as process:
        assert await process.wait() == status


async def test_what_cannot_be_started_says_so(tmp_path: Path) -> None:
    missing = Program(["no-such-program"], {}, tmp_path, tmp_path / "output")
    async with running(missing) as process:
        assert await process.wait() == 127
    assert "cannot start no-such-program" in (tmp_path / "output").read_text()


async def test_output_is_appended_and_the_environment_is_only_what_is_given(tmp_path: Path) -> None:
    (tmp_path / "output").write_text("before\n")
    code = "import os, sys; print(os.environ['A'], os.getcwd()); print('HOME' in os.environ, file=sys.stderr)"
    given = Program([sys.executable, "-c", code], {"A": "b"}, tmp_path, tmp_path / "output")
    async with running(given) as process:
        await process.wait()
    assert sorted((tmp_path / "output").read_text().split("\n")) == ["", "False", f"b {tmp_path}", "before"]


async def test_a_polite_stop_lets_the_program_end_itself(tmp_path: Path, token: str) -> None:
    async with running(program(tmp_path, PROGRAM, token, "obeys")) as process:
        await said(tmp_path, "ready")
        process.stop()
        assert await process.wait() == 7
        assert processes_with(token) == []


async def test_a_program_that_ignores_the_stop_is_ended(tmp_path: Path, token: str) -> None:
    async with running(program(tmp_path, PROGRAM, token, "ignores", grace_seconds=0.5)) as process:
        await said(tmp_path, "ready")
        process.stop()
        assert await process.wait() == -signal.SIGKILL
        assert processes_with(token) == []
    assert "asked" in (tmp_path / "output").read_text()


async def test_a_kill_does_not_ask(tmp_path: Path, token: str) -> None:
    async with running(program(tmp_path, PROGRAM, token, "ignores")) as process:
        await said(tmp_path, "ready")
        process.kill()
        assert await process.wait() == -signal.SIGKILL
        assert processes_with(token) == []
    assert "asked" not in (tmp_path / "output").read_text()


async def test_leaving_the_block_ends_the_program(tmp_path: Path, token: str) -> None:
    async def run(started: asyncio.Event) -> None:
        async with running(program(tmp_path, PROGRAM, token, "ignores")):
            await said(tmp_path, "ready")
            started.set()
            await asyncio.Event().wait()

    started = asyncio.Event()
    task = asyncio.create_task(run(started))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert processes_with(token) == []


async def test_what_a_program_leaves_behind_is_ended(tmp_path: Path, token: str) -> None:
    code = PROGRAM.replace("while True:", "while len(open('output').read()) == 0:")
    async with running(program(tmp_path, code, token, "obeys")) as process:
        assert await process.wait() == 0
        assert processes_with(token) == []


async def test_a_lease_that_is_over_ends_a_program_that_hangs(tmp_path: Path, token: str) -> None:
    lease = tmp_path / "control.json"
    lease.write_text(json.dumps({"wanted": "run", "lease_until": time.time() + 600}))
    hanging = program(tmp_path, PROGRAM, token, "ignores", lease=lease, grace_seconds=0.1)
    async with running(hanging) as process:
        await said(tmp_path, "ready")
        lease.write_text(json.dumps({"wanted": "run", "lease_until": time.time()}))
        assert await process.wait() == -signal.SIGKILL
        assert processes_with(token) == []


async def test_a_killed_guard_takes_the_program_with_it(tmp_path: Path, token: str) -> None:
    code = "import time; print('ready', flush=True); time.sleep(600)"
    async with running(program(tmp_path, code, token)) as process:
        await said(tmp_path, "ready")
        os.kill(process.pid, signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL
        nothing_left(token)


PARENT = """
import asyncio, sys
from pathlib import Path
from worker.process import Program, running

async def main(program, directory, token):
    command = [sys.executable, "-c", program, token, "ignores"]
    async with running(Program(command, {}, directory, directory / "output", grace_seconds=0.2)) as process:
        await process.wait()

asyncio.run(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
"""


def test_a_killed_parent_leaves_nothing(tmp_path: Path, token: str) -> None:
    (tmp_path / "output").touch()
    parent = subprocess.Popen([sys.executable, "-c", PARENT, PROGRAM, str(tmp_path), token])
    until(lambda: "ready" in (tmp_path / "output").read_text(), "the program says 'ready'")
    assert len(processes_with(token)) == 4, "parent, guard, program, and its child"
    parent.kill()
    parent.wait()
    nothing_left(token)
