"""The service as it runs embedded (SQLite, file broker, one worker), measured from a client's process.

Two questions: how many jobs a second an API process takes in, and how long a job waits from its POST until a
worker that idles has taken it up, and until its first update is done.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import workload

ROOT = Path(__file__).resolve().parent.parent
CONNECTIONS = (1, 8)
JOBS = 200
SUBMITTED = 5
START_SECONDS = 60


@dataclass(frozen=True)
class Load:
    """Jobs created over some number of connections; latencies in seconds."""

    connections: int
    seconds: float
    latencies: list[float]

    @property
    def jobs_per_second(self) -> float:
        return len(self.latencies) / self.seconds

    @property
    def median_ms(self) -> float:
        return 1000 * statistics.median(self.latencies)

    @property
    def p99_ms(self) -> float:
        return 1000 * statistics.quantiles(self.latencies, n=100)[98]


@dataclass(frozen=True)
class ServiceFigures:
    """running, updated: seconds from each POST until the job was seen running, and its first update was."""

    loads: list[Load]
    running: list[float]
    updated: list[float]


def run() -> ServiceFigures:
    """Measures both; the load runs without a worker, so that nothing competes for the database."""
    with tempfile.TemporaryDirectory(prefix="proxima-bench-") as scratch:
        model = Path(scratch) / "models" / "tiny"
        workload.make(workload.SMALL, model)
        with api(Path(scratch) / "load", model.parent) as (url, key, _):
            loads = [load(url, key, model, connections) for connections in CONNECTIONS]
        with (
            api(Path(scratch) / "submit", model.parent) as (url, key, environment),
            started([sys.executable, "-m", "worker"], environment, Path(scratch) / "worker.log"),
        ):
            ask("submit", url, key, model, 1)  # until the worker idles, and its files are in the page cache
            seen = ask("submit", url, key, model, SUBMITTED)
    return ServiceFigures(loads, seen["running"], seen["updated"])


def load(url: str, key: str, model: Path, connections: int) -> Load:
    measured = Load(**ask("create", url, key, model, JOBS, connections))
    print(f"  {connections} connections: {measured.jobs_per_second:.1f} jobs/s", flush=True)
    return measured


def ask(task: str, url: str, key: str, model: Path, jobs: int, connections: int = 1) -> dict[str, Any]:
    """Runs the client in its own process; returns what it measured."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.service_load", task),
            *("--url", url, "--key", key, "--model", str(model / "policy")),
            *("--jobs", str(jobs), "--connections", str(connections)),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


@contextmanager
def api(data: Path, models: Path) -> Iterator[tuple[str, str, dict[str, str]]]:
    """A migrated database and one uvicorn process on it: its URL, an API key, and its environment."""
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PROXIMA_")},
        "PROXIMA_DATA_DIR": str(data),
        "PROXIMA_MODEL_ROOTS": json.dumps([str(models)]),
        "PROXIMA_ALLOW_CPU": "true",
    }
    operator = {"cwd": ROOT, "env": environment, "check": True}
    subprocess.run([sys.executable, "-m", "service.migrate"], **operator)
    create_key = [sys.executable, "-m", "service.admin", "create-key", "--project", "benchmark"]
    key = subprocess.run(create_key, **operator, stdout=subprocess.PIPE, text=True).stdout.strip()
    command = [sys.executable, "-m", "uvicorn", "--factory", "service.main:create_app", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with started([*command, "--no-access-log"], environment, data / "api.log") as process:
        wait_until_ready(url, process)
        yield url, key, environment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def started(
    command: list[str], environment: dict[str, str], log: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that is told to leave, and waited for, at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"{url} did not get ready within {START_SECONDS} s")
