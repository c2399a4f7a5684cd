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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import trl_environment, workload

CELL = Path(__file__).with_name("training_cell.py")
WARM_UP = 1
# Past this many seconds no further round is begun, nor a comparison: what is left out is said.
BUDGET_SECONDS = 1200


@dataclass(frozen=True)
class Contender:
    """One side of a comparison."""

    label: str
    library: str
    method: str


@dataclass(frozen=True)
class Comparison:
    """Contenders that train the same model in the same rounds; the first is the yardstick."""

    title: str
    size: workload.Size
    contenders: tuple[Contender, ...]
    rounds: int


@dataclass
class Row:
    """What was measured of one contender: seconds of each timed update, and the peak of its memory."""

    comparison: Comparison
    contender: Contender
    seconds: list[float] = field(default_factory=list)
    peak_rss_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def updates_per_second(self) -> float:
        return 1 / statistics.median(self.seconds)

    def speed_against(self, yardstick: "Row") -> float:
        """How many times as fast as the yardstick: the median over the rounds."""
        pairs = zip(yardstick.seconds, self.seconds, strict=True)
        return statistics.median(theirs / own for theirs, own in pairs)


FULL = (Contender("TRL 1.12", "trl", "full"), Contender("Proxima", "proxima", "full"))
LORA = (
    Contender("TRL 1.12", "trl", "lora"),
    Contender("Proxima", "proxima", "lora"),
    Contender("Proxima, value head on the trunk", "proxima", "lora-head"),
)
ROUNDS = {"0.4M": 12, "33M": 3}


def comparisons() -> Iterator[Comparison]:
    for size in workload.SIZES:
        yield Comparison(f"{size.name} full", size, FULL, ROUNDS[size.name])
        yield Comparison(f"{size.name} LoRA", size, LORA, ROUNDS[size.name])


def run() -> list[Row]:
    """Measures everything; prints a line per round."""
    interpreters = {"trl": str(trl_environment.python()), "proxima": sys.executable}
    deadline = time.monotonic() + BUDGET_SECONDS
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="proxima-bench-") as scratch:
        for size in workload.SIZES:
            parameters = workload.make(size, Path(scratch) / size.name)
            print(f"made a Llama of {parameters:,} parameters ({size.name})", flush=True)
        for comparison in comparisons():
            if time.monotonic() > deadline:
                print(f"  {comparison.title} left out: {BUDGET_SECONDS} s are spent", flush=True)
                continue
            rows += compare(comparison, interpreters, Path(scratch), deadline)
    return rows


def compare(
    comparison: Comparison, interpreters: dict[str, str], scratch: Path, deadline: float
) -> list[Row]:
    """All contenders of a comparison, in turns."""
    rows = [Row(comparison, contender) for contender in comparison.contenders]
    with ExitStack() as stack:
        turns = [
            stack.enter_context(started(row, interpreters[row.contender.library], scratch)) for row in rows
        ]
        for number in range(WARM_UP + comparison.rounds):
            if number > WARM_UP and time.monotonic() > deadline:
                break
            for row, turn in zip(rows, turns, strict=True):
                note(row, turn.update(), is_timed=number >= WARM_UP)
            if number >= WARM_UP:
                timings = "   ".join(f"{row.contender.label} {row.seconds[-1]:.2f} s" for row in rows)
                print(f"  {comparison.title:10} {timings}", flush=True)
    return rows


def note(row: Row, told: dict[str, Any], is_timed: bool) -> None:
    row.peak_rss_bytes = told["peak_rss_bytes"]
    if is_timed:
        row.seconds.append(told["seconds"])


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
            raise RuntimeError(f"{self._title} ended before its time; its last lines:\n{tail}")
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
        *("--output", str(output), "--referee", str(referee)),
    ]


def environment() -> dict[str, str]:
    """The same two threads and no accelerator for all; nothing is looked up on a network."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "2")
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    root = str(trl_environment.ROOT)
    return {**os.environ, **threads, **quiet, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": root}
