"""The gate: what it takes for a demo that has learned."""

import subprocess

import pytest

from tests.deploy.places import ROOT


@pytest.mark.parametrize(
    ("last", "learned"),
    [
        ("optimality: 0.31 -> 0.94", True),
        ("optimality: 0.20 -> 0.90", True),
        ("optimality: 0.31 -> 1.00", True),
        ("optimality: 0.31 -> 0.89", False),
        ("optimality: 0.19 -> 0.94", False),
        ("optimality: 0.46 -> 0.94", False),
        ("optimality: 0.31 -> nan", False),
        ("Stopped; nothing is left running.", False),
        ("", False),
    ],
)
def test_the_last_line_of_the_demo_decides(last: str, learned: bool) -> None:
    printed = f"optimality: 0.30 -> 0.95\nupdate 1/1\n{last}\n"
    awk = ["awk", "-f", ".ci/learned.awk"]
    assert (subprocess.run(awk, cwd=ROOT, input=printed, text=True).returncode == 0) == learned
