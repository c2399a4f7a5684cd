"""Work beside requests: one of a name at a time, and failures that nobody is told of but the log."""

from __future__ import annotations

import asyncio
import logging

import pytest

from service import background
from service.background import Background

pytestmark = pytest.mark.anyio


class Work:
    """Something to do that takes until it is let go."""

    def __init__(self) -> None:
        self.begun = self.ended = 0
        self.go = asyncio.Event()

    async def __call__(self) -> None:
        self.begun += 1
        await self.go.wait()
        self.ended += 1


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_one_of_a_name_at_a_time():
    work, other = Work(), Work()
    async with Background().running() as beside:
        for _ in range(3):
            beside.start("one", work)
        beside.start("other", other)
        await settle()
        assert (work.begun, other.begun) == (1, 1)
        work.go.set()
        await settle()
        beside.start("one", work)
        await settle()
        assert (work.begun, work.ended) == (2, 2)
        other.go.set()


async def test_a_failure_is_logged_and_followed_by_a_rest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    tries = 0

    async def fail() -> None:
        nonlocal tries
        tries += 1
        raise OSError("the disk is away")

    monkeypatch.setattr(background, "REST_SECONDS", 0.2)
    monkeypatch.setattr(background, "LEAVE_SECONDS", 0.0)
    async with Background().running() as beside:
        for _ in range(3):
            beside.start("writing", fail)
            await settle()
        assert tries == 1
        await asyncio.sleep(0.3)
        beside.start("writing", fail)
        await settle()
    assert tries == 2
    assert caplog.record_tuples[0] == (
        "service.background",
        logging.WARNING,
        "writing failed: the disk is away",
    )


async def test_the_end_waits_a_moment_and_not_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(background, "LEAVE_SECONDS", 0.2)
    quick, endless = Work(), Work()
    async with Background().running() as beside:
        beside.start("quick", quick)
        beside.start("endless", endless)
        await settle()
        asyncio.get_running_loop().call_later(0.05, quick.go.set)
    assert (quick.ended, endless.ended) == (1, 0)
    endless.go.set()
    await settle()
    assert endless.ended == 0, "it was ended"
