"""What every request passes through, whatever its route: a name, a limit, and a net under it.

Pure ASGI, so that bodies stream in and answers stream out. This module knows no resource.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable

from obstore.exceptions import GenericError
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ppo_engine.issues import Issue
from service.api.problems import ProblemResponse, problem, refused
from service.errors import Unavailable

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"

OUTAGE = (OperationalError, InterfaceError, PoolTimeout, GenericError, ConnectionError)
"""What the database and the storage raise when they cannot be reached."""


class Named:
    """Gives every request an id, told in every answer; answers 500 with it for what was not foreseen."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except Exception as error:
            # The last net: nothing that comes here was foreseen by an endpoint. An answer that has begun can
            # only be cut off, which the server does.
            if started:
                raise
            await _fault(scope, request_id, error)(scope, receive, send_named)


def _fault(scope: Scope, request_id: str, error: Exception) -> ProblemResponse:
    """What a client is told of a fault of the server: its name; the operator finds all of it in the log."""
    if isinstance(error, OUTAGE):
        logger.warning("Request %s met an outage: %s", request_id, error)
        return refused(scope, Unavailable("Database or storage do not answer; send it again in a moment."))
    logger.error("Request %s (%s %s) failed.", request_id, scope["method"], scope["path"], exc_info=error)
    detail = f"The server failed to answer. Its operator finds the cause in the log under {request_id}."
    return problem(scope, 500, "internal_error", detail)


class BodyTooLarge(HTTPException):
    """Raised while a body is read; passes through FastAPI's own handling of unreadable bodies."""

    def __init__(self, detail: str) -> None:
        super().__init__(413, detail)


class LimitedBody:
    """Refuses a body beyond its limit: by its declared length at once, else where the limit is passed.

    limit: bytes allowed for a path.
    """

    def __init__(self, app: ASGIApp, limit: Callable[[str], int]) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit(scope["path"])
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isascii() and declared.isdecimal() and int(declared[:18]) > limit:
            detail = _too_large(f"{declared} bytes", limit)
            issues = [Issue(loc=("body",), msg=detail)]
            await problem(scope, 413, "too_large", detail, issues=issues)(scope, receive, send)
            return
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit:
                    raise BodyTooLarge(_too_large(f"More than {limit} bytes", limit))
            return message

        await self._app(scope, receive_limited, send)


def _too_large(given: str, limit: int) -> str:
    return f"{given} given; {limit} bytes are the most for this request: send less, or split it."
