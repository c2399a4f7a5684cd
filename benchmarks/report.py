"""The benchmark's two tables, as text, and its raw numbers, as JSON."""

import json
import os
import platform
import statistics
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from benchmarks.service import ServiceFigures
from benchmarks.training import Row

RESULTS = Path(__file__).with_name("results")


def training_table(rows: list[Row]) -> str:
    """Updates per second and peak memory; ratios are to the first contender of each comparison."""
    titles = f"{'model, method':16}{'trainer':34}{'updates/s':>11}{'best':>9}"
    lines = [titles + f"{'speed':>8}{'peak RSS':>12}{'memory':>9}{'timed':>7}"]
    for _, group in groupby(rows, key=lambda row: row.comparison.title):
        contenders = list(group)
        lines += [training_line(row, contenders[0]) for row in contenders]
    lines += [
        "updates/s: of the median update; best: of the fastest; speed: median over the rounds of",
        "(TRL's seconds / own seconds). peak RSS: high-water mark of a fresh process, interpreter and",
        "libraries included; memory: own / TRL's.",
    ]
    return "\n".join(lines)


def training_line(row: Row, yardstick: Row) -> str:
    memory = f"{row.peak_rss_bytes / 2**20:.0f} MiB"
    return (
        f"{row.comparison.title:16}{row.contender.label:34}"
        f"{row.updates_per_second:11.4f}{1 / min(row.seconds):9.4f}{row.speed_against(yardstick):7.2f}x"
        f"{memory:>12}{row.peak_rss_bytes / yardstick.peak_rss_bytes:8.2f}x{len(row.seconds):7}"
    )


def service_table(figures: ServiceFigures) -> str:
    """Jobs per second by number of connections, and how long submitted jobs wait."""
    lines = [f"{'connections':>12}{'jobs/s':>9}{'median ms':>11}{'p99 ms':>9}"]
    for load in figures.loads:
        lines.append(
            f"{load.connections:12}{load.jobs_per_second:9.1f}{load.median_ms:11.1f}{load.p99_ms:9.1f}"
        )
    for waited, seconds in (("running", figures.running), ("first update done", figures.updated)):
        every = ", ".join(f"{one:.2f}" for one in seconds)
        lines.append(f"submit to {waited}: median {statistics.median(seconds):.2f} s of {every}")
    return "\n".join(lines)


def keep(rows: list[Row], figures: ServiceFigures | None) -> Path:
    """Writes everything measured to `benchmarks/results/<time>.json` and returns that path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    raw = {
        "machine": {"cores": os.cpu_count(), "platform": platform.platform()},
        "training": [asdict(row) for row in rows],
        "service": None if figures is None else asdict(figures),
    }
    path.write_text(json.dumps(raw, indent=1))
    return path
