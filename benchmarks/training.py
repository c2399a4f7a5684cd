"""Our trainer and TRL's on the same workload, taking turns update by update: TRL, ours, TRL, ours, ...

Each trainer is a fresh process (`training_cell.py`): none inherits another's memory. While one does an
update the others wait, so a machine that grows slower or faster meanwhile does so for all of them: ratios are
taken within a round, and their median is reported.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import trl_environment, workload
from benchmarks.cells import Comparison, Contender
from benchmarks.floor import matrix_rate, operations

CELL = Path(__file__).with_name("training_cell.py")
WARM_UP = 1
THREADS, PPO_EPOCHS = 2, 4


@dataclass
class Row:
    """What was measured of one contender.

    seconds: of each timed update. rollouts: of each, the seconds of sampling, the tokens of responses, and
    those of responses with their prompts. phases: seconds of each phase of each update, where a trainer tells
    them.
    matrix_rate: floating-point operations a second, as measured before.
    """

    comparison: Comparison
    contender: Contender
    seconds: list[float] = field(default_factory=list)
    rollouts: list[dict[str, float]] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    matrix_rate: float = 0.0
    peak_rss_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    failure: str | None = None

    @property
    def updates_per_second(self) -> float:
        return 1 / statistics.median(self.seconds)

    @property
    def rollout_tokens_per_second(self) -> float:
        """Tokens of responses that count, over the seconds of sampling: the median update's."""
        return statistics.median(told["response_tokens"] / told["seconds"] for told in self.rollouts)

    @property
    def over_floor(self) -> float:
        """How many times the floor an update took: the median."""
        epochs, method = PPO_EPOCHS, self.contender.method
        pairs = zip(self.seconds, self.rollouts, strict=True)
        return statistics.median(
            seconds * self.matrix_rate / operations(self.comparison.size, method, told["text_tokens"], epochs)
            for seconds, told in pairs
        )

    def speed_against(self, yardstick: "Row") -> float:
        """How many times as fast as the yardstick: the median over the rounds."""
        pairs = zip(yardstick.seconds, self.seconds, strict=True)
        return statistics.median(theirs / own for theirs, own in pairs)


def run(comparisons: Sequence[Comparison], budget_seconds: float) -> list[Row]:
    """Measures them, in order; prints a line per round. Past its budget it begins none, and says so."""
    interpreters = {"proxima": sys.executable}
    if any(contender.library == "trl" for one in comparisons for contender in one.contenders):
        interpreters["trl"] = str(trl_environment.python())
    deadline = time.monotonic() + budget_seconds
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="proxima-bench-") as scratch:
        for comparison in comparisons:
            if time.monotonic() > deadline:
                print(f"  {comparison.title} left out: {budget_seconds:.0f} s are spent", flush=True)
                continue
            directory = Path(scratch) / comparison.size.name
            if not directory.exists():
                parameters = workload.make(comparison.size, directory)
                print(f"made a Llama of {parameters:,} parameters ({comparison.size.name})", flush=True)
            rows += compare(comparison, interpreters, Path(scratch), deadline)
    return rows


def compare(
    comparison: Comparison, interpreters: dict[str, str], scratch: Path, deadline: float
) -> list[Row]:
    """All contenders of a comparison, in turns. One that fails takes no more turns, and says why."""
    rate = matrix_rate(THREADS)
    rows = [Row(comparison, contender, matrix_rate=rate) for contender in comparison.contenders]
    with ExitStack() as stack:
        turns: dict[int, Turn] = {}
        for index, row in enumerate(rows):
            with told_as_failure(row):
                started_one = started(row, interpreters[row.contender.library], scratch)
                turns[index] = stack.enter_context(started_one)
        for number in range(WARM_UP + comparison.rounds):
            if number > WARM_UP and time.monotonic() > deadline:
                break
            for index, row in enumerate(rows):
                if row.failure is None:
                    with told_as_failure(row):
                        note(row, turns[index].update(), is_timed=number >= WARM_UP)
            if number >= WARM_UP:
                print(f"  {comparison.title:14} {'   '.join(map(of_round, rows))}", flush=True)
        for index, row in enumerate(rows):
            if row.failure is None and len(row.seconds) == comparison.rounds:
                row.phases = turns[index].update()["phases"][WARM_UP:]
    return rows


def of_round(row: Row) -> str:
    took = f"{row.seconds[-1]:.2f} s" if row.failure is None else "failed"
    return f"{row.contender.label} {took}"


@contextmanager
def told_as_failure(row: Row) -> Iterator[None]:
    """A trainer that ends before its time is a result of the cell, not the end of the benchmark."""
    try:
        yield
    except TrainerEnded as error:
        row.failure = str(error)
        print(f"  {error}", flush=True)


def note(row: Row, told: dict[str, Any], is_timed: bool) -> None:
    row.peak_rss_bytes = told["peak_rss_bytes"]
    if is_timed:
        row.seconds.append(told["seconds"])
        row.rollouts.append(told["rollout"])


class TrainerEnded(RuntimeError):
    """A trainer's process has ended before its time; the message has its last lines of output."""


class Turn:
    """The line to one trainer's process: one JSON object a line."""

    def __init__(self, title: str, line: socket.socket, log: Path) -> None:
        self._title = title
        self._lines = line.makefile("rw", buffering=1)
        self._log = log

    def update(self) -> dict[str, Any]:
        """Lets it do one update; returns what it tells."""
        self._lines.write("go\n")
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """What it tells next; raises with its last lines of output where it has ended instead."""
        line = self._lines.readline()
        if not line:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])
            raise TrainerEnded(f"{self._title} ended before its time; its last lines:\n{tail}")
        told: dict[str, Any] = json.loads(line)
        return told


@contextmanager
def started(row: Row, interpreter: str, scratch: Path) -> Iterator[Turn]:
    """A trainer's process, built and waiting for its first turn."""
    directory = Path(tempfile.mkdtemp(dir=scratch))
    log = directory / "log"
    ours, theirs = socket.socketpair()
    with ours, log.open("wb") as output:
        with theirs:
            process = subprocess.Popen(
                [interpreter, "-P", str(CELL), *options(row, scratch, directory, theirs.fileno())],
                env=environment(),
                pass_fds=[theirs.fileno()],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            turn = Turn(f"{row.comparison.title}, {row.contender.label}", ours, log)
            row.versions = turn.hear()["versions"]
            yield turn
        finally:
            process.terminate()
            process.wait()


def options(row: Row, scratch: Path, output: Path, referee: int) -> list[str]:
    contender, comparison = row.contender, row.comparison
    return [
        *("--library", contender.library, "--method", contender.method),
        *("--workload", str(scratch / comparison.size.name)),
        *("--updates", str(WARM_UP + comparison.rounds)),
        *("--batch", str(comparison.batch), "--response", str(comparison.response)),
        *("--output", str(output), "--referee", str(referee)),
    ]


def environment() -> dict[str, str]:
    """The same two threads and no accelerator for all; nothing is looked up on a network."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "2")
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    root = str(trl_environment.ROOT)
    return {**os.environ, **threads, **quiet, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": root}
