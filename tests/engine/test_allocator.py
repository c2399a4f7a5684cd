"""Memory that is kept: pages are not given back and taken again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PAGES = """
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
ADDRESSES = """
import re, torch
from pathlib import Path
from ppo_engine.allocator import keep_freed_memory
keep_freed_memory()
def size():
    return int(re.search("VmSize: *(.*) kB", Path("/proc/self/status").read_text())[1])
before = size()
held = [torch.empty(2**28) for _ in range(3)]
del held
print(size() - before)
"""


def told(program: str, **environment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_tensor_takes_the_memory_of_the_one_before_unless_somebody_else_has_a_say() -> None:
    """Faults at pages of 4 KiB, of twenty tensors of 64 MiB, one after the other, after twenty others."""
    assert told(PAGES) < 2**14  # those of one tensor
    assert told(PAGES, MALLOC_TRIM_THRESHOLD_="131072") > 10 * 2**14


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_is_free_is_kept_however_much_it_is() -> None:
    """KiB of addresses, after three tensors of 1 GiB that nothing was written to."""
    assert told(ADDRESSES) > 3 * 2**20 - 2**16
    assert told(ADDRESSES, MALLOC_TRIM_THRESHOLD_="131072") < 2**20
