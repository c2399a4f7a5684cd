"""Nobody without a key passes: everything is closed but the few paths named here.

A key is checked before a body is read, and with every request, so that a revoked one is refused at once.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import partial

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api import docs
from service.api.context import Context
from service.api.problems import refused
from service.errors import MalformedKey, MissingKey, Unauthenticated
from service.store import keys
from service.store.models import ApiKey
from service.store.session import Store

OPEN_PATHS = frozenset({"/livez", "/readyz", "/openapi.json"}) | docs.PATHS


class Authenticated:
    """Lets requests with a key pass, in the name of the key's project, and answers the others with 401."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                key = await _check(scope["app"].state.context, Headers(scope=scope).get("authorization"))
            except Unauthenticated as error:
                await refused(scope, error)(scope, receive, send)
                return
            scope["state"]["project_id"] = key.project_id
        await self._app(scope, receive, send)


async def _check(context: Context, header: str | None) -> ApiKey:
    if header is None:
        raise MissingKey
    scheme, _, text = header.partition(" ")
    if scheme.lower() != "bearer":
        raise MalformedKey
    async with context.store.read() as session:
        key = await keys.find_key(session, context.key_secret, text.strip())
    if _is_stale(key):
        # Beside the request: one that only reads must not wait for the database's writers.
        context.background.start(f"noting the use of {key.id}", partial(_touch, context.store, key.id))
    return key


async def _touch(store: Store, key_id: str) -> None:
    async with store.write() as session:
        await keys.touch_key(session, key_id)


def _is_stale(key: ApiKey) -> bool:
    """Whether the note of the key's last use is old enough to be worth a write."""
    noted = key.last_used_at
    return noted is None or datetime.now(UTC) - noted > timedelta(seconds=keys.TOUCH_SECONDS)
