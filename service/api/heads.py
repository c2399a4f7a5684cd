"""HEAD wherever there is GET, with the same status and headers: routes see a GET, whose body is not sent.

What an answer is made of is known to its route alone; it is asked, and stopped where its body begins.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Heads:
    """Answers HEAD by what GET answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] != "http.response.start":
                raise _BodyBegins
            await send(message)

        # Ranges are for GET alone (RFC 9110, section 14.2).
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        try:
            await self._app({**scope, "method": "GET", "headers": headers}, receive, send_head)
        except _BodyBegins:
            await send({"type": "http.response.body"})


class _BodyBegins(Exception):
    """Ends a route whose headers are sent: downloads would go on for long, and streams for ever."""
