"""What Alembic runs for every command: one transaction, on the connection `service.migrate` hands over."""

from __future__ import annotations

from typing import Any, Literal

from alembic import context
from sqlalchemy import TypeDecorator

from service.store.models import Base


def render_item(kind: str, item: Any, autogen: Any) -> str | Literal[False]:
    """Revisions name the columns' SQL types, not our decorators around them, which may change."""
    return f"sa.{item.impl!r}" if isinstance(item, TypeDecorator) else False


connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    render_as_batch=connection.dialect.name == "sqlite",
    render_item=render_item,
)
with context.begin_transaction():
    context.run_migrations()
