"""Requests that may be sent twice: the answer to the first is kept with what it made, and given again.

Both calls stand in the unit of work that makes the thing: whatever fails keeps no answer, so that it can be
tried again. Kept for 24 hours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from service.errors import KeyReused, RequestInFlight
from service.store.models import IdempotencyKey
from service.store.types import moment

KEPT_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Request:
    """A request that its sender may repeat. fingerprint: digest of its body."""

    project_id: str
    route: str
    key: str
    fingerprint: str

    def matches(self) -> tuple[Any, ...]:
        return (
            IdempotencyKey.project_id == self.project_id,
            IdempotencyKey.route == self.route,
            IdempotencyKey.key == self.key,
        )


@dataclass(frozen=True)
class Answer:
    """The answer to a request that succeeded."""

    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)


def fingerprint(*parts: bytes) -> str:
    """The digest of a request's parts, each told from the next."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


async def begin(session: AsyncSession, request: Request) -> Answer | None:
    """The answer that was given to this request before; None when it is new, and is now to be answered.

    On Postgres, a twin that comes while the first is answered is refused; on SQLite it waits for the answer.

    Raises:
        RequestInFlight: a twin is being answered.
        KeyReused: the key was sent with another body.
    """
    if session.get_bind().dialect.name == "postgresql":
        lock = select(func.pg_try_advisory_xact_lock(_lock_number(request)))
        if not await session.scalar(lock):
            raise RequestInFlight(request.key)
    expired = IdempotencyKey.created_at < moment(-KEPT_SECONDS)
    await session.execute(delete(IdempotencyKey).where(*request.matches(), expired))
    kept = await session.scalar(select(IdempotencyKey).where(*request.matches()))
    if kept is None:
        return None
    if kept.fingerprint != request.fingerprint:
        raise KeyReused(request.key)
    return Answer(kept.status, kept.body, kept.headers)


def _lock_number(request: Request) -> int:
    """A number for Postgres' advisory locks: 64 bits, signed."""
    name = fingerprint(request.project_id.encode(), request.route.encode(), request.key.encode())
    return int.from_bytes(bytes.fromhex(name[:16]), "big", signed=True)


async def finish(session: AsyncSession, request: Request, answer: Answer) -> None:
    """Keep the answer, together with what the unit of work has made."""
    session.add(
        IdempotencyKey(
            project_id=request.project_id,
            route=request.route,
            key=request.key,
            fingerprint=request.fingerprint,
            status=answer.status,
            headers=dict(answer.headers),
            body=dict(answer.body),
        )
    )
    await session.flush()


async def purge(session: AsyncSession) -> None:
    """Forget answers that are older than they are kept."""
    await session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < moment(-KEPT_SECONDS)))
