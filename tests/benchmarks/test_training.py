"""The benchmark's own parts: trainers take turns, a failure is told, ratios are taken within rounds."""

import sys
import time
from pathlib import Path

import pytest

from benchmarks import report, training, workload

SIZE = workload.Size("tiny", vocabulary=64, hidden=16, layers=1, heads=2, intermediate=32)
OURS = training.Contender("Proxima", "proxima", "lora-head")
COMPARISON = training.Comparison("tiny LoRA", SIZE, (OURS,), rounds=2)
INTERPRETERS = {"proxima": sys.executable}


def row(label: str, *seconds: float, peak_mib: int = 100) -> training.Row:
    contender = training.Contender(label, "proxima", "full")
    return training.Row(COMPARISON, contender, list(seconds), peak_mib * 2**20)


def test_a_trainer_does_its_updates_in_a_process_of_its_own(tmp_path: Path) -> None:
    workload.make(SIZE, tmp_path / SIZE.name)
    (measured,) = training.compare(COMPARISON, INTERPRETERS, tmp_path, deadline=time.monotonic() + 600)
    assert len(measured.seconds) == COMPARISON.rounds
    assert measured.peak_rss_bytes > 50 * 2**20
    assert measured.versions["torch"]


def test_a_trainer_that_fails_is_told_with_its_last_lines(tmp_path: Path) -> None:
    (tmp_path / SIZE.name).mkdir()
    with pytest.raises(RuntimeError, match=r"(?s)tiny LoRA, Proxima ended.*prompts\.json"):
        training.compare(COMPARISON, INTERPRETERS, tmp_path, deadline=time.monotonic() + 600)


def test_speed_is_the_median_of_the_ratios_within_rounds() -> None:
    theirs, ours = row("TRL", 2.0, 20.0, 4.0), row("ours", 1.0, 4.0, 1.0)
    assert ours.speed_against(theirs) == 4.0
    assert ours.updates_per_second == 1.0


def test_the_table_shows_speed_and_memory_against_the_first_contender() -> None:
    lines = report.training_table(
        [row("TRL", 2.0, peak_mib=400), row("ours", 0.5, peak_mib=100)]
    ).splitlines()
    assert lines[1].split()[-6:] == ["0.5000", "1.00x", "400", "MiB", "1.00x", "1"]
    assert lines[2].split() == [
        "tiny",
        "LoRA",
        "ours",
        "2.0000",
        "2.0000",
        "4.00x",
        "100",
        "MiB",
        "0.25x",
        "1",
    ]
