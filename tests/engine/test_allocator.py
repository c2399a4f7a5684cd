"""Memory that is kept: pages are not given back and taken again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from ppo_engine.allocator import keep_freed_memory
keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    for _ in range(20):
        torch.ones(2**24)
work()
before = faults()
work()
print(faults() - before)
"""


def faults(**environment: str) -> int:
    """Of twenty tensors of 64 MiB, one after the other, after twenty others; a page is 4 KiB."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_tensor_takes_the_memory_of_the_one_before_unless_somebody_else_has_a_say() -> None:
    assert faults() < 2**14  # those of one tensor
    assert faults(MALLOC_TRIM_THRESHOLD_="131072") > 10 * 2**14
