"""The servers that tests talk to: the machine's own where they answer, else ones started here.

Where neither is possible, a test that needs one is skipped; in CI (`CI=true`) it fails.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import psycopg
import pytest
import redis
from sqlalchemy import URL, make_url

DEADLINE_SECONDS = 300.0


def absent(what: str, how: str) -> NoReturn:
    """Skip the test, or fail it in CI."""
    reason = f"{what} is not here: {how}"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def free_port() -> int:
    """A TCP port of this machine that nobody listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], what: str) -> None:
    """Wait for a server that was just started."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not start; its exit status is {process.poll()}")
        time.sleep(0.05)


# Postgres --------------------------------------------------------------------------------------------------


@contextmanager
def postgres() -> Iterator[URL]:
    """A Postgres server: `PROXIMA_TEST_POSTGRES_URL`, the one of this machine, or one of our own."""
    if given := os.environ.get("PROXIMA_TEST_POSTGRES_URL"):
        yield make_url(given)
        return
    local = make_url("postgresql://postgres@127.0.0.1:5432/postgres")
    if _answers(local):
        yield local
        return
    programs = _postgres_programs()
    if programs is None:
        absent("Postgres", "set PROXIMA_TEST_POSTGRES_URL, or install postgresql")
    with _own_postgres(programs) as url:
        yield url


def _answers(url: URL) -> bool:
    try:
        psycopg.connect(dsn(url), connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def dsn(url: URL) -> str:
    """The URL as libpq reads it."""
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


def _postgres_programs() -> Path | None:
    """The directory of initdb and postgres: Debian keeps them off the PATH."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return installed[-1].parent if installed else None


@contextmanager
def _own_postgres(programs: Path) -> Iterator[URL]:
    """A server that ends with the tests. It refuses to run as root, so root runs it as somebody else."""
    user = "nobody" if os.geteuid() == 0 else None
    with TemporaryDirectory(prefix="proxima-postgres-", ignore_cleanup_errors=True) as directory:
        if user:
            shutil.chown(directory, user)
        data, port = str(Path(directory, "data")), free_port()
        init = [programs / "initdb", "-D", data, "-A", "trust", "-U", "postgres", "--no-sync"]
        subprocess.run(init, check=True, stdout=subprocess.DEVNULL, user=user, cwd=directory)
        serve = [programs / "postgres", "-D", data, "-p", str(port), "-k", directory]
        with Path(directory, "log").open("wb") as log:
            server = subprocess.Popen(serve, user=user, cwd=directory, stdout=log, stderr=log)
        url = make_url(f"postgresql://postgres@127.0.0.1:{port}/postgres")
        try:
            wait_until(lambda: _answers(url), server, "Postgres")
            yield url
        finally:
            server.send_signal(subprocess.signal.SIGQUIT)  # at once; nothing of it is kept
            server.wait(DEADLINE_SECONDS)


def execute(server: URL, statement: str) -> None:
    """Run a statement that stands in no transaction, such as CREATE DATABASE."""
    with psycopg.connect(dsn(server), autocommit=True) as connection:
        connection.execute(statement.encode())


def new_name() -> str:
    """A name for a database that no other run of the tests uses."""
    return f"proxima_test_{secrets.token_hex(6)}"


# Redis -----------------------------------------------------------------------------------------------------


@contextmanager
def redis_database() -> Iterator[str]:
    """The URL of an empty Redis database: `PROXIMA_TEST_REDIS_URL`, or on this machine's or our server."""
    if given := os.environ.get("PROXIMA_TEST_REDIS_URL"):
        yield given
    elif _pings(6379):
        with _reserved(6379) as url:
            yield url
    elif program := shutil.which("redis-server"):
        with _own_redis(program) as url:
            yield url
    else:
        absent("Redis", "set PROXIMA_TEST_REDIS_URL, or install redis-server")


def _pings(port: int) -> bool:
    with redis.Redis(port=port, socket_connect_timeout=2) as client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False


@contextmanager
def _reserved(port: int) -> Iterator[str]:
    """One of the server's databases that nobody uses, ours until the end of the tests."""
    for number in range(15, 0, -1):
        with redis.Redis(port=port, db=number) as client:
            if client.dbsize() == 0 and client.set("proxima-test-owner", os.getpid(), nx=True, ex=3600):
                yield f"redis://127.0.0.1:{port}/{number}"
                client.flushdb()
                return
    absent("An empty Redis database", f"all 15 of the server on port {port} are in use")


@contextmanager
def _own_redis(program: str) -> Iterator[str]:
    with TemporaryDirectory(prefix="proxima-redis-") as directory:
        port = free_port()
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", directory, "--save", ""]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            wait_until(lambda: _pings(port), server, "Redis")
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()
            server.wait(DEADLINE_SECONDS)
