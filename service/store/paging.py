"""Pages of lists, newest first. A cursor is the id of the last item one has; it must be of the list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sqlalchemy import ColumnElement, select
from sqlalchemy.ext.asyncio import AsyncSession

from service.errors import UnknownCursor
from service.store.models import ApiKey, File, Job

T = TypeVar("T")
Listed = TypeVar("Listed", Job, File, ApiKey)


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
        UnknownCursor: `after` is no row of this table and project.
    """
    mine = model.project_id == project_id
    query = select(model).where(mine, *where).order_by(model.id.desc()).limit(limit + 1)
    if after is not None:
        if await session.scalar(select(model.id).where(model.id == after, mine)) is None:
            raise UnknownCursor(after, model.__tablename__.replace("_", " "))
        query = query.where(model.id < after)
    return cut((await session.scalars(query)).all(), limit)
