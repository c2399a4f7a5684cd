"""Runs killed at seeded random points, some robbed of a checkpoint besides, end as if nothing had been."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.engine.test_program import ENVIRONMENT, PATIENCE, ROOT

RUNS, FIRST_SEED = 12, 20  # one process and two, plain and sharded


def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes_and_events() -> None:
    # A process of its own, since it forks: this one may have threads.
    command = [sys.executable, "-m", "tests.engine.torture", "--runs", str(RUNS), "--seed", str(FIRST_SEED)]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=3 * PATIENCE, check=False
    )

    counted = re.search(rf"{RUNS} runs, (\d+) kills, 0 failures", done.stdout)
    assert counted is not None, done.stdout + done.stderr[-4000:]
    assert int(counted[1]) >= 20
