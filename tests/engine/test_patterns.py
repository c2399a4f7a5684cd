"""Patterns that would take a machine's memory are refused before they are compiled; usual ones are not."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from ppo_engine.patterns import MAX_NESTING, MAX_PARTS, fault

DEEP = "(" * 400 + "a" + ")" * 400


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?i)\b(please|thank you)\b",
        r"^\s*\{\s*\"answer\":\s*(-?\d{1,20})\s*\}\s*$",
        r"(?P<year>\d{4})-\d{2}(?P=year)?",
        r"[^()\[\]]*[]()][^]]",
        r"(?s:.{0,100000})(?=end)",
        r"(?#a comment with ( in it)a(?i)b",
        r"\(?x\)?[(?x]",
        "(a)" * 300,
        "(" * MAX_NESTING + "a" + ")" * MAX_NESTING,
        f"a{{{MAX_PARTS // 2}}}",
        "(?:a{90}){90}",
    ],
)
def test_a_usual_pattern_can_be_used(pattern: str) -> None:
    assert fault(pattern) is None


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", ["missing )", "correct it"]),
        ("(?V1)a", ["not a regular expression"]),
        ("(" + "(" * MAX_NESTING + "a" + ")" * MAX_NESTING + ")", ["20 deep", "nest fewer"]),
        (DEEP, ["nest fewer"]),
        (r"[)]" * 400 + DEEP, ["nest fewer"]),
        (r"\)" * 300 + DEEP, ["nest fewer"]),
        ("a{10001}", ["has 10002 parts", "10000 are the most", "repeat less"]),
        ("(?:(?:(?:a){200}){200}){200}", ["repeat less"]),
        ("(?:(?:ab){1000,}){1000,}", ["repeat less"]),
        ("(?P<n>(?:a{1000}){1000})", ["repeat less"]),
        ("(?:a{1000})(?i){1000}", ["repeat less"]),
        ("(?:a{1000})(?#)){1000}", ["repeat less"]),
        (r"(?:a{1000})(?#\)){1000}", ["repeat less"]),
        ("([)]a{1000}){1000}", ["repeat less"]),
        ("([])]a{1000}){1000}", ["repeat less"]),
        ("(?:a{1000}){e<=0}{1000}", ["approximate", r"write \{"]),
        ("(?x)(a{1000} # )\n){1000}", ["flag x"]),
        ("(?s-i:a)(?sx:a{1 0 0 0 0 0})", ["flag x"]),
        ("([[:is_alpha:])]a{1000}){1000}", ["named classes", r"\p{alpha}"]),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused_with_the_rule_and_the_fix(
    pattern: str, words: list[str]
) -> None:
    found = fault(pattern)
    assert found is not None
    for word in words:
        assert word in found


def test_what_is_refused_was_never_compiled() -> None:
    program = """
import resource, sys
from ppo_engine.patterns import fault
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for pattern in ("(?:" * 100 + "a" + "){9}" * 100, "(?:(?:(?:a){200}){200}){200}", "a{1000000000}"):
    assert fault(pattern)
sys.exit(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 8 * 1024)
"""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))

    assert subprocess.run([sys.executable, "-c", program], preexec_fn=limit, check=False).returncode == 0
