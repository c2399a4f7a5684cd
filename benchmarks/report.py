"""The benchmark's tables, as text, and its raw numbers, as JSON."""

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
    """Speed, memory, and distance from the floor; ratios are to the first contender of each comparison."""
    titles = f"{'cell':21}{'trainer':19}{'updates/s':>10}{'speed':>8}{'tokens/s':>10}"
    lines = [titles + f"{'peak RSS':>11}{'memory':>8}{'x floor':>9}{'timed':>7}"]
    for _, group in groupby(rows, key=lambda row: row.comparison.title):
        contenders = list(group)
        lines += [training_line(row, contenders[0]) for row in contenders]
    lines += [
        "updates/s: of the median update. speed: median over the rounds of (TRL's seconds / own's).",
        "tokens/s: of responses, while sampling. peak RSS: high-water mark of a fresh process, interpreter",
        "and libraries included; memory: own / TRL's. x floor: the update's time over that of its matrix",
        "products at the rate measured just before.",
    ]
    return "\n".join(lines)


def training_line(row: Row, yardstick: Row) -> str:
    name = f"{row.comparison.title:21}{row.contender.label:19}"
    if row.failure is not None or not row.seconds:
        return f"{name} could not run it: {(row.failure or 'no time was left').splitlines()[-1]}"
    compares = yardstick.failure is None and len(yardstick.seconds) == len(row.seconds)
    speed = f"{row.speed_against(yardstick):7.2f}x" if compares else f"{'-':>8}"
    memory = f"{row.peak_rss_bytes / yardstick.peak_rss_bytes:7.2f}x" if compares else f"{'-':>8}"
    peak = f"{row.peak_rss_bytes / 2**20:.0f} MiB"
    return (
        f"{name}{row.updates_per_second:10.4f}{speed}{row.rollout_tokens_per_second:10.0f}"
        f"{peak:>11}{memory}{row.over_floor:9.2f}{len(row.seconds):7}"
    )


def phases_table(rows: list[Row]) -> str:
    """Median seconds of each phase of our updates."""
    told = [row for row in rows if row.phases]
    names = list(told[0].phases[0]) if told else []
    lines = [f"{'cell':21}{'trainer':19}" + "".join(f"{name:>10}" for name in names)]
    for row in told:
        medians = [statistics.median(phases[name] for phases in row.phases) for name in names]
        cells = "".join(f"{median:10.3f}" for median in medians)
        lines.append(f"{row.comparison.title:21}{row.contender.label:19}{cells}")
    return "\n".join(lines)


def growth_table(rows: list[Row]) -> str:
    """Seconds of our update as responses and batches grow, and per token of text."""
    lines = [f"{'what grows':21}{'s / update':>12}{'tokens':>9}{'ms / token':>12}{'peak RSS':>11}"]
    for row in rows:
        seconds = statistics.median(row.seconds)
        tokens = statistics.median(told["text_tokens"] for told in row.rollouts)
        peak = f"{row.peak_rss_bytes / 2**20:.0f} MiB"
        lines.append(
            f"{row.comparison.title:21}{seconds:12.3f}{tokens:9.0f}{1000 * seconds / tokens:12.3f}{peak:>11}"
        )
    return "\n".join(lines)


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


def keep(rows: list[Row], growth: list[Row], figures: ServiceFigures | None) -> Path:
    """Writes everything measured to `benchmarks/results/<time>.json` and returns that path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    raw = {
        "machine": {"cores": os.cpu_count(), "platform": platform.platform()},
        "training": [asdict(row) for row in rows],
        "growth": [asdict(row) for row in growth],
        "service": None if figures is None else asdict(figures),
    }
    path.write_text(json.dumps(raw, indent=1))
    return path
