"""`/livez` and `/readyz`: whether the process runs, and whether it can do its work. Open to everybody."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from service.api.context import Shared
from service.api.openapi import open_refusals
from service.errors import Unavailable

logger = logging.getLogger(__name__)

router = APIRouter(tags=["health"])

PATIENCE_SECONDS = 2.0


class Health(BaseModel):
    """All is well."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    status: Literal["ok"] = "ok"
    """What else there is to say is said by the status of the answer."""


@router.get("/livez")
async def live() -> Health:
    """The process answers."""
    return Health()


@router.get("/readyz", responses=open_refusals(503))
async def ready(shared: Shared) -> Health:
    """The database and the storage answer too. The broker need not: jobs wait in the database."""
    await _answers("database", shared.store.ping())
    await _answers("storage", shared.storage.ping())
    return Health()


async def _answers(what: str, question: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await question
    except Exception as error:
        # Whatever a driver raises: the load balancer is told that it does not answer, the operator why.
        logger.warning("The %s does not answer.", what, exc_info=error)
        raise Unavailable(
            f"The {what} does not answer; send requests elsewhere, or again in a moment."
        ) from None
