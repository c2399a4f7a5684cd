"""`python -m service.embedded`: the whole stack on one machine, with nothing installed beside it.

API and worker run as processes of their own, with SQLite and a broker in a directory, all in one data
directory. It prints where the API is and the first project's key, and stays until Ctrl-C or SIGTERM; then
none of their processes is left. A second signal does not wait for a running job to save.

It starts the worker and its guard as processes: nothing of the worker is imported here.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from service import migrate
from service.admin import create_key
from service.errors import Unauthenticated
from service.settings import Settings, create_private, of_environment
from service.store import keys
from service.store.session import Store

CHECKOUT = Path(__file__).parents[1]
GUARD = CHECKOUT / "worker" / "guard.py"
PREFERRED_PORT = 8000
START_SECONDS = 60.0
STOP_SECONDS = 90.0  # a worker has its engine save, and waits for it
POLL_SECONDS = 0.1


class Signals:
    """Counts requests to leave, from the moment it is made."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


class Leave(Exception):
    """A signal asked for the end."""


class Broken(Exception):
    """A part of the stack ended by itself, or did not start."""


def main(argv: Sequence[str] | None = None) -> int:
    signals = Signals()
    options = _options(argv)
    data_dir = options.data_dir.absolute()
    environment = {
        **os.environ,
        "PROXIMA_DATA_DIR": str(data_dir),
        "PROXIMA_ALLOW_CPU": os.environ.get("PROXIMA_ALLOW_CPU", "true"),
    }
    os.environ.update(environment)
    settings = of_environment(Settings)
    migrate.upgrade(settings.database_url)
    (settings.data_dir / "models").mkdir(exist_ok=True)
    key = _first_key(settings)
    try:
        _run(options.host, options.port, environment, key, signals)
    except Leave:
        return 0
    except Broken as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m service.embedded", description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path(".proxima"), help="holds everything")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, help=f"default: {PREFERRED_PORT}, or any free one")
    return parser.parse_args(argv)


def _first_key(settings: Settings) -> str:
    """A key of the project "default", kept in a file that only its owner reads.

    A new one is made where there is none, or where the one in the file opens nothing (any more).
    """
    path, secret = settings.data_dir / "api.key", settings.read_key_secret()

    async def find_or_make() -> str:
        store = Store.open(settings.database_url)
        try:
            if path.exists() and await _opens(store, secret, path.read_text().strip()):
                return path.read_text().strip()
            path.unlink(missing_ok=True)
            create_private(path, await create_key(store, secret, "default", "first") + "\n")
            return path.read_text().strip()
        finally:
            await store.close()

    return asyncio.run(find_or_make())


async def _opens(store: Store, secret: bytes, key: str) -> bool:
    try:
        async with store.read() as session:
            await keys.find_key(session, secret, key)
    except Unauthenticated:
        return False
    return True


def _run(host: str, port: int | None, environment: Mapping[str, str], key: str, signals: Signals) -> None:
    """Start both parts, say so, and stay.

    Raises:
        Leave: asked to. Broken: a part ended.
    """
    listening = _listen(host, port)
    url = f"http://{host}:{listening.getsockname()[1]}"
    api = [*("-m", "uvicorn", "service.main:create_app", "--factory", "--no-access-log")]
    # Streams of events are open as long as their jobs: without a limit, they would hold up the end.
    api += ["--timeout-graceful-shutdown", "5"]
    with ExitStack() as parts:
        running = {
            "The API": parts.enter_context(
                _process([*api, "--fd", str(listening.fileno())], environment, signals, listening.fileno())
            ),
            "The worker": parts.enter_context(_process(["-m", "worker"], environment, signals)),
        }
        _wait_until_answering(url, running, signals)
        print(f"Proxima listens at  {url}")
        print(f"Documentation       {url}/docs")
        print(f"API key             {key}", flush=True)
        _stay(running, signals)


def _stay(running: Mapping[str, subprocess.Popen[bytes]], signals: Signals) -> NoReturn:
    try:
        while True:
            _check(running, signals)
            time.sleep(POLL_SECONDS)
    except Leave:
        print("Stopping: a running job is saved first. Once more to stop at once.", flush=True)
        raise


def _listen(host: str, port: int | None) -> socket.socket:
    """A socket on the port asked for; with none asked for, on the preferred one, or any."""
    for candidate in (PREFERRED_PORT, 0) if port is None else (port,):
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # uvicorn takes a descriptor for a Unix socket; asyncio leaves Nagle's delay of 40 ms on for those.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            listening.bind((host, candidate))
            # Not left to uvicorn: until somebody listens, another stack could bind the same port.
            listening.listen()
        except OSError as error:
            listening.close()
            problem = error
        else:
            return listening
    raise SystemExit(f"Cannot listen on {host}:{port}: {problem.strerror}; choose another --port.")


@contextmanager
def _process(
    arguments: Sequence[str], environment: Mapping[str, str], signals: Signals, *descriptors: int
) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program in a session of its own; afterwards it is gone, and all it has started.

    A Ctrl-C in the terminal reaches this process only, which ends the others in order. It is seen through a
    guard, which ends it, too, when this process is killed; a second SIGTERM makes the guard end it at once.
    """
    guard = ["-I", "-S", str(GUARD), "--parent", str(os.getpid()), "--grace", str(STOP_SECONDS), "--"]
    process = subprocess.Popen(
        [sys.executable, *guard, sys.executable, *arguments],
        cwd=CHECKOUT,
        env=environment,
        stdin=subprocess.DEVNULL,
        pass_fds=descriptors,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        while process.poll() is None and signals.count < 2:
            time.sleep(POLL_SECONDS)
        process.terminate()
        process.wait()


def _wait_until_answering(url: str, running: Mapping[str, subprocess.Popen[bytes]], signals: Signals) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        _check(running, signals)
        try:
            # Short: while the API starts, its port already takes connections, and a signal is to be seen.
            with urllib.request.urlopen(f"{url}/livez", timeout=1):
                return
        except OSError:
            time.sleep(POLL_SECONDS)
    raise Broken(f"The API did not answer within {START_SECONDS:.0f} s.")


def _check(running: Mapping[str, subprocess.Popen[bytes]], signals: Signals) -> None:
    if signals.count:
        raise Leave
    for name, process in running.items():
        if process.poll() is not None:
            raise Broken(f"{name} ended with status {process.returncode}; the stack stops.")


if __name__ == "__main__":
    sys.exit(main())
