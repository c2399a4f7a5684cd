"""The bytes of what was deleted: gone from storage, now or once it answers again.

The API does it beside the request that deleted something, and every worker again and again: that several do
it at once, or one of them twice, does no harm.
"""

from __future__ import annotations

from service.storage import Storage
from service.store import deletions
from service.store.models import Deletion
from service.store.session import Store


async def sweep(store: Store, storage: Storage) -> None:
    """Do the deletions that are due. Raises what storage or database raise; what is not done is due again."""
    while (deletion := await _take(store)) is not None:
        await storage.delete_prefix(deletion.prefix)
        async with store.write() as session:
            await deletions.done(session, deletion)


async def _take(store: Store) -> Deletion | None:
    async with store.write() as session:
        return await deletions.take(session)
