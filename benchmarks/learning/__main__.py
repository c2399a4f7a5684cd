"""`python -m benchmarks.learning [--seeds N] [TASK ...]`: trains, draws, and fills in docs/learning.md.

Runs are processes of one thread each, as many at a time as there are cores; curves that an interrupted call
left in `benchmarks/results/learning/` are taken up by `--resume`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks import trl_environment
from benchmarks.learning import digits, plots, stories, walks
from benchmarks.learning.curve import Curve

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "learning"
PAGE = ROOT / "docs" / "learning.md"
PICTURES = ROOT / "docs" / "learning"
TASKS = ("walks", "digits", "stories")
STORY_MODEL = ROOT.parent / "shared" / "models" / "stories260k"


@dataclass(frozen=True)
class Run:
    """One training run to be made."""

    task: str
    variant: str
    seed: int
    model: Path
    library: str = "proxima"

    @property
    def curve(self) -> Path:
        name = f"{self.task}-{self.library}-{self.variant}-{self.seed}"
        return RESULTS / f"{''.join(c if c.isalnum() or c in '-.' else '_' for c in name)}.json"


def runs(tasks: Iterable[str], seeds: int, story_model: Path) -> Iterator[Run]:
    for task in tasks:
        variants, model = {
            "walks": (walks.VARIANTS, RESULTS / "walks-base"),
            "digits": (digits.VARIANTS, ROOT),
            "stories": (stories.VARIANTS, story_model),
        }[task]
        for seed in range(1, seeds + 1):
            yield from (Run(task, variant, seed, model) for variant in variants)
            if task == "walks":
                yield Run(task, walks.PEERS, seed, model, "trl")


def make(run: Run) -> Curve:
    """Train in a process of its own; its last lines are told where it fails."""
    interpreter = trl_environment.python() if run.library == "trl" else Path(sys.executable)
    command = [interpreter, "-m", "benchmarks.learning.one", "--task", run.task, "--library", run.library]
    command += ["--variant", run.variant, "--seed", str(run.seed), "--model", run.model, "--curve", run.curve]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    path = os.pathsep.join(map(str, (ROOT, ROOT / "examples" / "randomwalks", ROOT / "examples" / "stories")))
    began = time.monotonic()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **one_thread, **quiet, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-20:])
        raise RuntimeError(f"{run} failed; its last lines:\n{tail}")
    curve = Curve.load(run.curve)
    print(
        f"{run.task:8}{curve.variant:34} seed {run.seed}: {curve.final:.4f} "
        f"({time.monotonic() - began:.0f} s)",
        flush=True,
    )
    return curve


def table(curves: Sequence[Curve]) -> str:
    """Of each variant, the final score over seeds, and the divergence at the end."""
    lines = [
        "| variant | seeds | median | mean | range | KL at the end, median |",
        "|---|---|---|---|---|---|",
    ]
    for variant, group in plots.by_variant(curves).items():
        finals = [curve.final for curve in group]
        divergence = statistics.median(curve.kl[-1] for curve in group)
        lines.append(
            f"| {variant} | {len(finals)} | {statistics.median(finals):.4f} | {statistics.mean(finals):.4f} "
            f"| {min(finals):.4f} to {max(finals):.4f} | {divergence:.2f} |"
        )
    return "\n".join(lines)


def draw(task: str, curves: Sequence[Curve]) -> list[str]:
    """Draws the pictures of a task; returns their names."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    if task == "walks":
        peers = [curve for curve in curves if curve.variant.startswith(walks.PEERS)]
        own = [curve for curve in curves if curve not in peers]
        plots.rewards(own, "Random walks", "mean optimality", PICTURES / "walks.svg")
        plots.rewards(peers, "Random walks, the same settings", "mean optimality", PICTURES / "peer.svg")
        return ["walks", "peer"]
    if task == "digits":
        plots.rewards(curves, "Digit completion", "mean reward", PICTURES / "digits.svg")
        return ["digits"]
    plots.rewards(curves, "Stories", "mean sentiment", PICTURES / "stories.svg")
    plots.reward_against_kl(
        curves, "Stories: reward against KL", "mean sentiment", PICTURES / "stories-kl.svg"
    )
    return ["stories-kl", "stories"]


def write_into_page(task: str, text: str) -> None:
    """Between the task's two markers; the rest of the page is written by hand."""
    begin, end = f"<!-- {task}: begin -->", f"<!-- {task}: end -->"
    page = PAGE.read_text()
    before, rest = page.split(begin)
    _, after = rest.split(end)
    PAGE.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    parser.add_argument(
        "tasks", nargs="*", choices=TASKS, default=TASKS, metavar="TASK", help=", ".join(TASKS)
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--stories", type=Path, default=STORY_MODEL, help="a small story model")
    parser.add_argument("--resume", action="store_true", help="keep the curves that are there")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if "stories" in options.tasks and not options.stories.is_dir():
        print(f"stories left out: {options.stories} is no directory; give a small story model by --stories")
        options.tasks = [task for task in options.tasks if task != "stories"]
    if "walks" in options.tasks:
        trl_environment.python()
        if not (RESULTS / "walks-base" / "config.json").exists():
            walks.make_base(RESULTS / "walks-base")
    planned = list(runs(options.tasks, options.seeds, options.stories))
    if not options.resume:
        for run in planned:
            run.curve.unlink(missing_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        curves = list(
            pool.map(lambda run: Curve.load(run.curve) if run.curve.exists() else make(run), planned)
        )
    for task in options.tasks:
        own = [curve for curve in curves if curve.task == task]
        text = table(own)
        print(f"\n{task}\n{text}")
        pictures = [f"![{name}]({PICTURES.name}/{name}.svg)\n" for name in draw(task, own)]
        write_into_page(task, "\n".join(["", *pictures, text, ""]))


if __name__ == "__main__":
    main()
