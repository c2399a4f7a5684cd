"""Files in storage as they are handed out: what is known of one, and its bytes."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

from service.errors import ContentLost
from service.storage import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blob:
    """A file in storage. sha256: hexadecimal, of all its `size` bytes."""

    name: str
    key: str
    size: int
    sha256: str


async def open_blob(storage: Storage, blob: Blob, start: int, stop: int) -> AsyncIterator[bytes]:
    """Stream the bytes `start` (included) to `stop` (excluded) of a blob.

    Raises:
        ContentLost: they are not in storage, where they were put.
    """
    try:
        return await storage.read(blob.key, start, stop)
    except FileNotFoundError:
        logger.error("%s is not in storage any more: restore it from a backup.", blob.key)
        raise ContentLost(blob.name) from None
