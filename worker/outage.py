"""What the database and the storage raise when they cannot be reached, and patience with it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from obstore.exceptions import GenericError, PermissionDeniedError, UnauthenticatedError
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

log = logging.getLogger(__name__)

T = TypeVar("T")

_DATABASE = (OperationalError, InterfaceError, PoolTimeout)
_STORAGE = (GenericError, PermissionDeniedError, UnauthenticatedError)  # credentials are renewed, too
OUTAGE = (*_DATABASE, *_STORAGE, OSError)  # a full disk is one, too; but see `persist`

FIRST_PAUSE = 0.2
LONGEST_PAUSE = 5.0


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
        OUTAGE: what it failed with when patience was over; and at once, whatever is no outage.
    """
    pause = FIRST_PAUSE
    while True:
        try:
            return await operation()
        except FileNotFoundError:
            raise  # what is not there does not come by waiting
        except OUTAGE as error:
            if patience.is_over():
                raise
            log.warning("tried again in %.1f s: %s", pause, first_line(error))
        await asyncio.sleep(pause)
        pause = min(pause * 2, LONGEST_PAUSE)


def first_line(error: BaseException) -> str:
    """An error in one line: those of drivers go on for pages."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
