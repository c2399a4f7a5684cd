"""Projects, and the API keys that open them.

A key is `pxm_`, 8 letters and digits it is known by, 32 that are secret, and 6 of checksum: what cannot be a
key is told without the database, and a scanner of leaked secrets finds keys without guessing. Kept is only
an HMAC-SHA256 under the service's own secret: who reads the table can neither use a key nor test a guess.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import zlib
from dataclasses import dataclass

from sqlalchemy import or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from service.errors import MalformedKey, NotFound, RevokedKey, UnknownKey
from service.store.ids import new_id
from service.store.models import ApiKey, Project
from service.store.paging import Page, newest_first
from service.store.types import moment

PREFIX = "pxm_"
KNOWN_BY = len(PREFIX) + 8
TOUCH_SECONDS = 60.0
"""The last use of a key is noted to this precision, so that reading does not become writing."""

_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_FORM = re.compile(rf"{PREFIX}[0-9A-Za-z]{{46}}")


@dataclass(frozen=True)
class NewKey:
    """A key that was just made. text: shown this once, and kept nowhere."""

    row: ApiKey
    text: str


def generate() -> str:
    """A new key: 190 bits of chance."""
    body = PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(40))
    return body + _checksum(body)


def _checksum(body: str) -> str:
    value, digits = zlib.crc32(body.encode()), ""
    for _ in range(6):
        value, digit = divmod(value, len(_ALPHABET))
        digits = _ALPHABET[digit] + digits
    return digits


def check_form(text: str) -> None:
    """Raises MalformedKey for what cannot be a key."""
    if not _FORM.fullmatch(text) or _checksum(text[:-6]) != text[-6:]:
        raise MalformedKey


def digest(secret: bytes, text: str) -> str:
    """What is kept of a key."""
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


async def ensure_project(session: AsyncSession, name: str) -> Project:
    """The project of this name, made where there is none yet."""
    values = {"id": new_id("proj"), "name": name}
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    await session.execute(dialect.insert(Project).values(values).on_conflict_do_nothing())
    return (await session.scalars(select(Project).where(Project.name == name))).one()


async def find_project(session: AsyncSession, name: str) -> Project | None:
    """The project of this name, if there is one."""
    return await session.scalar(select(Project).where(Project.name == name))


async def create_key(
    session: AsyncSession, secret: bytes, project_id: str, name: str, text: str | None = None
) -> NewKey:
    """A key for a project. text: a key made beforehand by `generate`, such as one the operator sets."""
    text = text or generate()
    check_form(text)
    row = ApiKey(
        id=new_id("key"),
        project_id=project_id,
        name=name,
        prefix=text[:KNOWN_BY],
        digest=digest(secret, text),
    )
    session.add(row)
    await session.flush()
    return NewKey(row, text)


async def find_key(session: AsyncSession, secret: bytes, text: str) -> ApiKey:
    """The key of a request.

    Raises:
        MalformedKey: it cannot be a key; the database was not asked.
        UnknownKey, RevokedKey: it opens nothing (any more).
    """
    check_form(text)
    row = await session.scalar(select(ApiKey).where(ApiKey.digest == digest(secret, text)))
    if row is None:
        raise UnknownKey
    if row.revoked_at is not None:
        raise RevokedKey
    return row


async def touch_key(session: AsyncSession, key_id: str) -> None:
    """Note that a key was used now, unless that was noted moments ago."""
    stale = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < moment(-TOUCH_SECONDS))
    await session.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id, stale)
        .values(last_used_at=moment())
        .execution_options(synchronize_session=False)
    )


async def list_keys(
    session: AsyncSession, project_id: str, *, after: str | None = None, limit: int = 20
) -> Page[ApiKey]:
    """The project's keys, newest first, behind the key `after`; revoked ones too.

    Raises:
        UnknownCursor: `after` cannot be a key of the project, now or before.
    """
    return await newest_first(session, ApiKey, project_id, after, limit)


async def revoke_key(session: AsyncSession, project_id: str, key_id: str) -> ApiKey:
    """Close a key for good; doing so again changes nothing.

    Raises:
        NotFound: the project has no such key.
    """
    mine = (ApiKey.id == key_id, ApiKey.project_id == project_id)
    await session.execute(
        update(ApiKey)
        .where(*mine, ApiKey.revoked_at.is_(None))
        .values(revoked_at=moment())
        .execution_options(synchronize_session=False)
    )
    row = await session.scalar(select(ApiKey).where(*mine).execution_options(populate_existing=True))
    if row is None:
        raise NotFound("key", key_id)
    return row
