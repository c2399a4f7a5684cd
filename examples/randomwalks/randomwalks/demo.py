"""Proxima's demo: a small model learns the shortest ways through a graph, as a job of a service.

First the operator's part: start the embedded stack, which allows models of one directory. All the rest is
a customer's, over HTTP: upload prompts, ask what a job would cost, submit it, follow it live, download the
adapter, and use it. Nothing is left running, and without `--keep` nothing is left on disk.
"""

import argparse
import json
import logging
import signal
import uuid
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from randomwalks import policy, stack
from randomwalks.client import Problem, Proxima
from randomwalks.graph import Graph, random_walks
from randomwalks.progress import watch
from randomwalks.sampling import sample

SPEC = Path(__file__).with_name("spec.json")
MODEL = "random-walks"
THREADS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; its exit status."""
    keep = _parse(arguments)
    for ending in stack.SIGNALS:
        signal.signal(ending, _interrupt)
    torch.set_num_threads(THREADS)
    _silence_libraries()
    console = Console(highlight=False, soft_wrap=True)
    place = TemporaryDirectory(prefix="proxima-demo-") if keep is None else nullcontext(str(keep))
    try:
        with place as directory:
            run(Path(directory), console)
    except KeyboardInterrupt:
        console.print("\nStopped; nothing is left running.")
        return 130
    except (Problem, stack.StackFailed, httpx.HTTPError) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> Path | None:
    parser = argparse.ArgumentParser(prog="python -m randomwalks", description=__doc__)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep models, adapter, and logs here")
    keep: Path | None = parser.parse_args(arguments).keep
    if keep is not None and keep.is_dir() and any(keep.iterdir()):
        parser.error(f"--keep {keep}: the directory is not empty; name a new one.")
    return keep


def _silence_libraries() -> None:
    """What they log, warn of, and count is no part of the show."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    disable_progress_bar()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run(directory: Path, console: Console) -> None:
    """The whole story; the last line printed is the result."""
    graph, walks = random_walks()
    models, adapter = directory / "models", directory / "adapter"
    base = models / MODEL
    with stack.running(directory / "data", models) as service, Proxima(service.url, service.key) as proxima:
        console.print(f"Proxima listens at {service.url}")
        fit_policy(walks, base, console)
        job_id = submit(proxima, graph, console)
        train(proxima, job_id, console)
        proxima.download_adapter(job_id, adapter)
        console.print("The adapter is downloaded, and every digest is right.")
    before, after = sample(graph, base), sample(graph, base, adapter)
    console.print(table_of(graph, before.walks, after.walks))
    print(f"optimality: {before.optimality:.2f} -> {after.optimality:.2f}")


def fit_policy(walks: Sequence[str], directory: Path, console: Console) -> None:
    """Make the model to fine-tune: a GPT-2 that has seen random walks, good and bad."""
    steps = policy.fit(walks, directory)
    for _ in track(steps, "Fitting a small GPT-2 to random walks", policy.STEPS, console=console):
        pass


def submit(proxima: Proxima, graph: Graph, console: Console) -> str:
    """Upload the prompts, show what the job would take, and submit it; returns its id."""
    spec: dict[str, Any] = json.loads(SPEC.read_text())
    rows = [{"prompt": start} for start in graph.starts]
    spec["prompts"]["train"] = proxima.upload("starts.jsonl", rows)
    plan = proxima.estimate(spec)
    megabytes = sum(plan["memory"].values()) / 2**20
    console.print(
        f"Estimate: {plan['num_total_batches']} updates of {plan['batch_size']} walks, "
        f"{plan['parameters_trained']:,} parameters trained, {megabytes:.0f} MiB of weights and optimizer"
    )
    job = proxima.create("random walks", spec, idempotency_key=str(uuid.uuid4()))
    console.print(f"Submitted as {job['id']}")
    return str(job["id"])


def train(proxima: Proxima, job_id: str, console: Console) -> None:
    """Follow the job to its end. Raises `Problem` if that is not success."""
    state = watch(proxima.follow(job_id), proxima.job(job_id)["total_updates"], console)
    if state != "succeeded":
        error = proxima.job(job_id)["error"] or {}
        raise Problem(f"The job {state}. {error.get('message', '')}\n{error.get('log_tail') or ''}")


def table_of(graph: Graph, before: Sequence[str], after: Sequence[str]) -> Table:
    """A walk from each of some starts, before and after, with its optimality."""
    table = Table("before", "", "after", "", title="Walks to the goal, a")
    for old, new in list(zip(before, after, strict=True))[:8]:
        table.add_row(old, f"{graph.optimality(old):.2f}", new, f"{graph.optimality(new):.2f}")
    return table
