"""What the database, the storage, or this machine raises while it cannot be had, and patience with it.

Waiting helps against an outage, and against nothing else: a fault of ours, or of a job, is none.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from obstore.exceptions import GenericError, PermissionDeniedError, UnauthenticatedError
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

log = logging.getLogger(__name__)

T = TypeVar("T")

_DATABASE = (OperationalError, InterfaceError, PoolTimeout)
_STORAGE = (GenericError, PermissionDeniedError, UnauthenticatedError)  # credentials are renewed, too
_NETWORK = (ConnectionError, TimeoutError)
_MACHINE = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOTDIR),
        *(errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENETUNREACH, errno.EHOSTUNREACH),
    }
)
"""A full or broken disk, a directory that is not mounted, too little of everything."""

FIRST_PAUSE = 0.2
LONGEST_PAUSE = 5.0


class Outage(Exception):
    """Something cannot be had for now; the cause is what it raised."""


@contextmanager
def outages() -> Iterator[None]:
    """Inside, what is raised because something cannot be had for now becomes an `Outage`."""
    try:
        yield
    except (*_DATABASE, *_STORAGE, *_NETWORK) as error:
        raise Outage(first_line(error)) from error
    except OSError as error:
        if error.errno not in _MACHINE:
            raise
        raise Outage(first_line(error)) from error


class Patience:
    """How long something is tried: so many seconds; once the worker is to leave, only `grace` more."""

    def __init__(
        self, seconds: float, leaving: Callable[[], bool] = lambda: False, grace: float = 0.0
    ) -> None:
        self._deadline = time.monotonic() + seconds
        self._leaving = leaving
        self._grace: float | None = grace

    def is_over(self) -> bool:
        now = time.monotonic()
        if self._grace is not None and self._leaving():
            self._deadline = min(self._deadline, now + self._grace)
            self._grace = None
        return now > self._deadline


async def persist(operation: Callable[[], Awaitable[T]], patience: Patience) -> T:
    """Do something again and again until it is done.

    Raises:
        Outage: what it failed with when patience was over; and at once, whatever is no outage.
    """
    pause = FIRST_PAUSE
    while True:
        try:
            with outages():
                return await operation()
        except Outage as outage:
            if patience.is_over():
                raise
            log.warning("tried again in %.1f s: %s", pause, outage)
        await asyncio.sleep(pause)
        pause = min(pause * 2, LONGEST_PAUSE)


def first_line(error: BaseException) -> str:
    """An error in one line: those of drivers go on for pages."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
