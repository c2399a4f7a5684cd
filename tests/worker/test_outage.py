"""What is an outage, which waiting helps against, and what is not."""

from __future__ import annotations

import errno

import pytest
from obstore.exceptions import GenericError
from sqlalchemy.exc import IntegrityError, OperationalError

from worker.outage import Outage, Patience, outages, persist

pytestmark = pytest.mark.anyio

AWAY = [
    OperationalError("SELECT 1", {}, Exception("connection refused")),
    GenericError("503"),
    ConnectionResetError(),
    TimeoutError(),
    OSError(errno.ENOSPC, "no space left"),
    OSError(errno.EMFILE, "too many open files"),
]
NO_OUTAGE = [
    FileNotFoundError(errno.ENOENT, "gone"),
    PermissionError(errno.EACCES, "forbidden"),
    IntegrityError("INSERT", {}, Exception("twice")),
    ValueError("no number"),
]


@pytest.mark.parametrize("error", AWAY, ids=repr)
async def test_an_outage_is_waited_for(error: Exception) -> None:
    ends = iter([error, error, None])

    async def operation() -> str:
        if (failure := next(ends)) is not None:
            raise failure
        return "done"

    assert await persist(operation, Patience(60.0)) == "done"


@pytest.mark.parametrize("error", AWAY, ids=repr)
async def test_without_patience_an_outage_is_told_with_its_cause(error: Exception) -> None:
    async def operation() -> None:
        raise error

    with pytest.raises(Outage, match=type(error).__name__) as caught:
        await persist(operation, Patience(-1.0))
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", NO_OUTAGE, ids=repr)
async def test_what_is_no_outage_is_raised_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, outages():
        raise error
    assert caught.value is error
