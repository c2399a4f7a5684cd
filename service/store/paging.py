"""Pages of lists, newest first. A cursor is the id of the last item one has; it must be of the list.

That item may be gone by now, as where a list is deleted page by page: an id tells its place by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sqlalchemy import ColumnElement, select
from sqlalchemy.ext.asyncio import AsyncSession

from service.errors import UnknownCursor
from service.store.ids import is_id
from service.store.models import ApiKey, File, Job

T = TypeVar("T")
Listed = TypeVar("Listed", Job, File, ApiKey)

_KINDS = {Job: "job", File: "file", ApiKey: "key"}


@dataclass(frozen=True)
class Page(Generic[T]):
    """Some items of a list, and whether there are more behind them."""

    data: Sequence[T]
    has_more: bool


def cut(rows: Sequence[T], limit: int) -> Page[T]:
    """A page from up to `limit + 1` rows."""
    return Page(rows[:limit], len(rows) > limit)


async def newest_first(
    session: AsyncSession,
    model: type[Listed],
    project_id: str,
    after: str | None,
    limit: int,
    *where: ColumnElement[bool],
) -> Page[Listed]:
    """The rows of a project behind the row `after`.

    Raises:
        UnknownCursor: `after` cannot be a row of this table and project, now or before.
    """
    query = select(model).where(model.project_id == project_id, *where).order_by(model.id.desc())
    if after is not None:
        owner = await session.scalar(select(model.project_id).where(model.id == after))
        if not is_id(_KINDS[model], after) or owner not in (None, project_id):
            raise UnknownCursor(after, model.__tablename__.replace("_", " "))
        query = query.where(model.id < after)
    query = query.limit(limit + 1)
    return cut((await session.scalars(query)).all(), limit)
