"""How an engine ended, and what was wanted of it: what becomes of the job."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from ppo_engine.issues import Issue
from ppo_engine.run_dir import Reason, Result
from worker.verdict import Verdict, Wish, judge, log_tail, starts_again, stopped

WISHES: tuple[Wish, ...] = get_args(Wish)


def result(outcome: Any, reason: Reason, **more: Any) -> Result:
    return Result(outcome=outcome, reason=reason, update=3, message="said the engine", **more)


@pytest.mark.parametrize("wish", [None, *WISHES])
def test_a_run_that_came_to_its_end_has_succeeded_whatever_was_wished_meanwhile(wish: Wish | None) -> None:
    assert judge(result("succeeded", "finished"), 0, wish) == Verdict("succeeded")


@pytest.mark.parametrize("ended", [None, result("stopped", "cancel"), result("failed", "nan")])
def test_a_cancelled_run_is_cancelled_however_it_ended(ended: Result | None) -> None:
    assert judge(ended, 1, "cancel") == Verdict("cancelled")


@pytest.mark.parametrize("wish", [None, "pause", "leave", "lease"])
def test_a_failure_is_a_failure_also_of_a_run_that_was_to_stop(wish: Wish | None) -> None:
    verdict = judge(result("failed", "oom"), 1, wish)
    assert verdict == Verdict("failed", code="oom", message="said the engine")


@pytest.mark.parametrize("ended", [None, result("stopped", "pause")])
def test_what_stopped_because_it_was_wished_spends_no_attempt(ended: Result | None) -> None:
    assert judge(ended, -9, "pause") == Verdict("paused")
    for verdict, code in (
        (judge(ended, -9, "leave"), "worker_stopped"),
        (judge(ended, -9, "lease"), "database"),
    ):
        assert (verdict.state, verdict.code, verdict.spend_attempt) == ("queued", code, False)


@pytest.mark.parametrize("reason", ["sigterm", "lease", "parent"])
def test_what_stopped_by_itself_goes_on_elsewhere_and_spends_its_attempt(reason: Reason) -> None:
    verdict = judge(result("stopped", reason), 0, None)
    assert (verdict.state, verdict.code, verdict.spend_attempt) == ("queued", reason, True)


def test_an_engine_that_can_take_less_memory_starts_again_unless_it_is_to_stop() -> None:
    assert starts_again(result("stopped", "oom"), None)
    assert not any(starts_again(result("stopped", "oom"), wish) for wish in WISHES)
    for ended in (None, result("failed", "oom"), result("stopped", "lease"), result("succeeded", "finished")):
        assert not starts_again(ended, None)


@pytest.mark.parametrize(
    ("status", "words"), [(0, "status 0"), (3, "status 3"), (-9, "memory"), (-11, "signal 11")]
)
def test_an_engine_that_left_no_result_has_crashed(status: int, words: str) -> None:
    verdict = judge(None, status, None)
    assert (verdict.state, verdict.code) == ("failed", "crash")
    assert words in verdict.message


def test_a_bad_spec_keeps_its_issues() -> None:
    issue = Issue(loc=("ppo", "seed"), msg="too large")
    verdict = judge(result("failed", "spec", issues=(issue,)), 1, None)
    assert verdict == Verdict("failed", "invalid_spec", "said the engine", (issue,))


def test_every_wish_has_a_state() -> None:
    assert [stopped(wish).state for wish in WISHES] == ["cancelled", "paused", "queued", "queued"]


def test_the_tail_of_a_log_is_short(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    assert log_tail(log) == ""
    log.write_bytes(b"".join(b"line %d\n" % number for number in range(1000)) + b"\x00\xff last")
    tail = log_tail(log)
    assert tail.splitlines()[0] == "line 961"
    assert tail.endswith("\n\ufffd\ufffd last")
    log.write_text("x" * 100_000)
    assert len(log_tail(log)) == 8_000
