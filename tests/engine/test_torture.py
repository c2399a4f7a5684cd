"""Runs killed at seeded random points, some robbed of a checkpoint besides, end as if nothing had been."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.engine import torture
from tests.engine.test_program import ENVIRONMENT, PATIENCE, ROOT
from tests.engine.torture import Kind, kills_of

ALONE = (20, 26, 30, 35, 92, 105)
TOGETHER = (71, 89, 127, 51, 88, 100)  # adapters: plain, ZeRO-1, 2, 3; full fine-tuning: plain, ZeRO-3
SEEDS = (*ALONE, *TOGETHER)


def test_the_seeds_are_of_every_kind_that_is_promised() -> None:
    kinds = {kills_of(seed)[0] for seed in SEEDS}

    assert kinds == {
        *torture.ALONE,
        Kind("full", 2),
        Kind("full", 2, 3),
        *(Kind("lora", 2, z) for z in range(4)),
    }


def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes_and_events() -> None:
    # A process of its own, since it forks: this one may have threads.
    command = [sys.executable, "-m", "tests.engine.torture", "--seeds", *map(str, SEEDS)]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=3 * PATIENCE, check=False
    )

    counted = re.search(rf"{len(SEEDS)} runs, (\d+) kills, 0 failures", done.stdout)
    assert counted is not None, done.stdout + done.stderr[-4000:]
    assert int(counted[1]) >= 20
