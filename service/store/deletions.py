"""Bytes in storage that are to be deleted: noted in the unit of work that forgets them, so that none is left
behind when storage is away, or a process ends, after the commit.

Whoever takes a deletion up puts it off first: others leave it alone meanwhile, and one that fails comes again
after those that have not been tried.
"""

from __future__ import annotations

from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from service.store.ids import new_id
from service.store.models import Deletion
from service.store.types import moment

AGAIN_SECONDS = 60.0
"""After so long, a deletion that was taken up and not done is due again."""


async def note(session: AsyncSession, prefix: str, seconds: float = 0.0) -> None:
    """Have everything below a prefix deleted, so many seconds from now."""
    session.add(Deletion(id=new_id("deletion"), prefix=prefix, due=moment(seconds)))


async def take(session: AsyncSession) -> Deletion | None:
    """Take up the deletion that has been due for longest, if there is one."""
    due = (
        select(Deletion.id)
        .where(Deletion.due <= moment())
        .order_by(Deletion.due)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    put_off = update(Deletion).where(Deletion.id.in_(due)).values(due=moment(AGAIN_SECONDS))
    options = {"synchronize_session": False}
    return await session.scalar(put_off.returning(Deletion), execution_options=options)


async def done(session: AsyncSession, deletion: Deletion) -> None:
    """Forget a deletion: nothing is below its prefix any more."""
    await session.execute(delete(Deletion).where(Deletion.id == deletion.id))
