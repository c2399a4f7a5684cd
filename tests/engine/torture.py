"""Runs that are killed again and again, anywhere, beside the run that nobody touched: the same bytes?

    python -m tests.engine.torture --runs 200 --seed 1     a table of many runs
    python -m tests.engine.torture --runs 1 --seed 57      one of them once more
    python -m tests.engine.torture --seeds 3 57 58         some of them

A seed tells what is trained, by how many processes, and what is killed where: inside the rollout, the
update, the writing of a checkpoint and so on, after a share of the calls that it makes in an undisturbed run.
Time has no part in it. Now and then the newest checkpoint is damaged besides.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import ppo_engine.program  # noqa: F401  (loaded before processes are forked: it takes longer than a run)
from ppo_engine.__main__ import main as engine
from ppo_engine.events import read_complete
from ppo_engine.run_dir import MANIFEST, RunDir
from tests.engine import tiny
from tests.engine.ranks import none_too_small
from tests.engine.training import make_run

UPDATES = 4
DAMAGES = ("truncated", "flipped", "missing", "no manifest")

# The functions that a phase is, by file and name.
PHASES = {
    ("trainer.py", "_sample"): "rollout",
    ("trainer.py", "_score"): "reward",
    ("learn.py", "score"): "scoring",
    ("learn.py", "update"): "update",
    ("trainer.py", "evaluate"): "evaluation",
    ("program.py", "_export"): "export",
    ("saving.py", "save_checkpoint"): "checkpoint",
    ("program.py", "_say_checkpoint"): "word of it",
    ("program.py", "_drop_old_checkpoints"): "retention",
}
PLACES = tuple(PHASES.values())


@dataclass(frozen=True)
class Kind:
    """What is trained, and by how many processes."""

    method: str
    processes: int = 1
    zero_stage: int = 0

    def __str__(self) -> str:
        several = f" x{self.processes}" if self.processes > 1 else ""
        return f"{self.method}{several}{f' zero {self.zero_stage}' if self.zero_stage else ''}"


@dataclass(frozen=True)
class Kill:
    """In the `time`-th of a phase, after a share of its calls, on one of the processes."""

    phase: str
    time: int
    share: float
    rank: int
    damage: str | None

    def __str__(self) -> str:
        damaged = f" + {self.damage}" if self.damage else ""
        return f"{self.phase} {self.time} at {self.share:.0%}{damaged}"


ALONE = (Kind("lora"), Kind("full"))
TOGETHER = tuple(Kind(method, 2, stage) for method in ("lora", "full") for stage in range(4))


def kills_of(seed: int) -> tuple[Kind, list[Kill]]:
    """What a seed stands for."""
    draw = random.Random(seed)
    kind = draw.choice(TOGETHER) if draw.random() < 0.4 else draw.choice(ALONE)
    kills = [
        Kill(
            phase=draw.choice(PLACES),
            time=draw.randint(1, 3),
            share=draw.random(),
            rank=draw.randrange(kind.processes),
            damage=draw.choice(DAMAGES) if draw.random() < 0.25 else None,
        )
        for _ in range(draw.randint(1, 3))
    ]
    return kind, kills


class Counter:
    """Counts the calls, of Python and of C, that each phase makes; at one of them, the process is no more."""

    def __init__(self, deadly: tuple[str, int, int] | None = None) -> None:
        self.deadly = deadly
        self.calls: dict[str, list[int]] = {phase: [] for phase in PLACES}
        self._within: list[tuple[FrameType, str]] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            code = frame.f_code
            phase = PHASES.get((os.path.basename(code.co_filename), code.co_name))
            if phase is not None:
                self._within.append((frame, phase))
                self.calls[phase].append(0)
        elif event == "return" and self._within and self._within[-1][0] is frame:
            self._within.pop()
        if event in ("call", "c_call"):
            for _, phase in self._within:
                self.calls[phase][-1] += 1
                if (phase, len(self.calls[phase]), self.calls[phase][-1]) == self.deadly:
                    os.kill(os.getpid(), signal.SIGKILL)


def new_run(directory: Path, kind: Kind) -> RunDir:
    """All that has a memory is on: adaptive KL, running normalisation, evaluation; the base has dropout."""
    policy_dir = directory.parent / "policy"
    if not policy_dir.exists():
        tiny.save(tiny.policy(), tiny.tokenizer(), policy_dir)
    ppo = {
        "total_episodes": 8 * UPDATES,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4 // kind.processes,
        "save_steps": 1,
        "eval_steps": 2,
        "adaptive_kl_target": 0.1,
        "normalize_scores": True,
        "metric_for_best_model": "objective/scores",
        "save_total_limit": 2,
    }
    run_dir = make_run(
        directory,
        policy_dir,
        ppo=ppo,
        prompts={"train": "file_1", "eval": "file_2"},
        method={"type": kind.method},
        resources={"gpus": kind.processes, "zero_stage": kind.zero_stage},
    )
    rows = run_dir.data("file_1").read_text().splitlines(keepends=True)
    run_dir.data("file_2").write_text("".join(rows[:3]))
    return run_dir


def start(run_dir: RunDir, kind: Kind, rank: int = 0, deadly: tuple[str, int, int] | None = None) -> bool:
    """Run the program to its end; whether it came there. Of several processes, one may die, and takes all."""
    if kind.zero_stage:  # loaded before processes are forked, too
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401, PLC0415  (most of DeepSpeed's time)
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    places = {
        _fork(run_dir, kind, each, port, deadly if each == rank else None): each
        for each in range(kind.processes)
    }
    is_well = True
    while places:
        process, status = os.wait()
        places.pop(process)
        if status and is_well:
            is_well = False
            for other in places:
                os.kill(other, signal.SIGKILL)
    return is_well


def _fork(run_dir: RunDir, kind: Kind, rank: int, port: int, deadly: tuple[str, int, int] | None) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        log = os.open(run_dir.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if kind.processes > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": kind.processes, "LOCAL_WORLD_SIZE": 2}
            os.environ |= {name: str(value) for name, value in place.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if kind.zero_stage:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
            os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(kind.zero_stage)
        torch.set_num_threads(1)
        counter = Counter(deadly)
        with none_too_small() if kind.zero_stage else nullcontext():
            sys.setprofile(counter)
            status = engine([str(run_dir.path)])
            sys.setprofile(None)
        (run_dir.path / f"calls.{rank}.json").write_text(json.dumps(counter.calls))
    finally:
        os._exit(status)


@dataclass(frozen=True)
class Whole:
    """What a run that nobody touched leaves: its policy's digest, its events, the calls of each process."""

    digest: str
    events: list[dict[str, Any]]
    calls: list[dict[str, list[int]]]


def left_by(run_dir: RunDir) -> tuple[str, list[dict[str, Any]]]:
    """The digest of the final policy, and the events without times, and without words of damage."""
    weights = next(run_dir.export(UPDATES).glob("*model.safetensors"))
    events = [event.model_dump(exclude={"time"}) for event in read_complete(run_dir.events)[0]]
    for event in events:
        event["data"] = {n: v for n, v in event["data"].items() if not n.startswith("time/") and n != "eps"}
    kept = [event for event in events if event["data"].get("code") != "damaged_checkpoint"]
    return hashlib.sha256(weights.read_bytes()).hexdigest(), kept


def undisturbed(directory: Path, kind: Kind) -> Whole:
    run_dir = new_run(directory, kind)
    assert start(run_dir, kind), run_dir.log.read_text()
    calls = [json.loads((run_dir.path / f"calls.{rank}.json").read_text()) for rank in range(kind.processes)]
    return Whole(*left_by(run_dir), calls)


def damage(run_dir: RunDir, how: str) -> bool:
    """Damage the newest checkpoint, where there is one."""
    updates = run_dir.complete_checkpoints()
    if not updates:
        return False
    directory = run_dir.checkpoint(updates[-1])
    largest = max(
        (path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    content = largest.read_bytes()
    match how:
        case "truncated":
            largest.write_bytes(content[: len(content) // 2])
        case "flipped":
            largest.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
        case "missing":
            largest.unlink()
        case "no manifest":
            (directory / MANIFEST).unlink()
    return True


def tortured(directory: Path, kind: Kind, kills: Sequence[Kill], whole: Whole) -> tuple[int, list[str]]:
    """How often it was killed, and what is wrong with how it ended: nothing, as it should be."""
    run_dir, killed, damaged = new_run(directory, kind), 0, 0
    for kill in kills:
        rank = kill.rank if whole.calls[kill.rank][kill.phase] else 0  # which alone does some of them
        calls = whole.calls[rank][kill.phase]
        count = calls[min(kill.time, len(calls)) - 1]
        deadly = (kill.phase, kill.time, 1 + int(kill.share * count))
        if start(run_dir, kind, rank, deadly):
            break
        killed += 1
        damaged += kill.damage is not None and damage(run_dir, kill.damage)
    if not start(run_dir, kind):
        return killed, [f"it did not end well:\n{run_dir.log.read_text()[-3000:]}"]
    digest, events = left_by(run_dir)
    wrong = [] if digest == whole.digest else ["the policy is another"]
    wrong += (
        [] if events == whole.events else [f"the events differ: {_first_difference(events, whole.events)}"]
    )
    return killed, wrong


def _first_difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            return f"{mine} instead of {theirs}"
    return f"{len(one)} instead of {len(other)}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the next ones count on")
    parser.add_argument("--seeds", type=int, nargs="+", help="of all runs, instead")
    options = parser.parse_args(argv)
    seeds = options.seeds or range(options.seed, options.seed + options.runs)
    wholes: dict[Kind, Whole] = {}
    kills_done = failures = 0
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        for seed in seeds:
            kind, kills = kills_of(seed)
            if kind not in wholes:
                wholes[kind] = undisturbed(Path(name) / f"whole {kind}", kind)
            directory = Path(name) / f"run {seed}"
            killed, wrong = tortured(directory, kind, kills, wholes[kind])
            shutil.rmtree(directory)
            kills_done, failures = kills_done + killed, failures + bool(wrong)
            told = "; ".join(map(str, kills[:killed]))
            line = f"{seed:>5}  {kind!s:<14} {killed} kills  {'; '.join(wrong) or 'same'}  ({told})\n"
            sys.stdout.write(line)
            sys.stdout.flush()
    sys.stdout.write(f"{len(seeds)} runs, {kills_done} kills, {failures} failures\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
