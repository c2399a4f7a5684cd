"""What an owner does with prompt files: bring in, look up, read, delete.

A file is checked and made canonical on this machine's disk, then put into storage, and last made known: what
is known is whole. No HTTP here.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import anyio
import anyio.to_thread

from service import specs
from service.planning import invalid
from service.storage import Storage
from service.store import files, idempotency
from service.store import models as rows
from service.store.session import Store
from service.uploads.convert import Canonical, convert
from service.uploads.lines import BadFile

ROUTE = "files"
CREATED = 201
CONTENT = "prompts.jsonl"
CLEANUP_SECONDS = 10.0
CONVERSIONS = 2
"""Files checked at a time: each keeps a processor busy, and the rest of the process waits for its share."""


@dataclass(frozen=True)
class Upload:
    """A file as it came in. content: readable and seekable, at its beginning."""

    filename: str
    content: BinaryIO


@dataclass(frozen=True)
class Kept:
    """A file that was kept, now or by an earlier request with the same key."""

    file: specs.File
    is_replay: bool = False


class Files:
    """The use cases of prompt files. max_bytes: of the canonical form."""

    def __init__(self, store: Store, storage: Storage, max_bytes: int) -> None:
        self._store = store
        self._storage = storage
        self._max_bytes = max_bytes
        self._conversions = anyio.CapacityLimiter(CONVERSIONS)

    async def create(self, project_id: str, upload: Upload, key: str | None) -> Kept:
        """Check a file and keep it.

        key: chosen by the client; a second request with it gets the first one's file.

        Raises:
            Invalid: it is no prompt file; names the first bad lines.
            RequestInFlight, KeyReused: the key was sent before.
        """
        with tempfile.TemporaryDirectory(prefix="proxima-upload-") as directory:
            path = Path(directory) / CONTENT
            canonical = await self._convert(upload, path)
            request = None
            if key is not None:
                parts = (upload.filename.encode(errors="replace"), canonical.sha256.encode())
                request = idempotency.Request(project_id, ROUTE, key, idempotency.fingerprint(*parts))
                async with self._store.write() as session:
                    if (answer := await idempotency.begin(session, request)) is not None:
                        return Kept(specs.File.model_validate(answer.body), is_replay=True)
            return await self._keep(project_id, upload.filename, canonical, path, request)

    async def _convert(self, upload: Upload, path: Path) -> Canonical:
        def run() -> Canonical:
            with path.open("wb") as target:
                return convert(upload.content, upload.filename, target, self._max_bytes)

        try:
            return await anyio.to_thread.run_sync(run, limiter=self._conversions)
        except BadFile as error:
            raise invalid(error.issues) from None

    async def _keep(
        self,
        project_id: str,
        filename: str,
        canonical: Canonical,
        path: Path,
        request: idempotency.Request | None,
    ) -> Kept:
        """The bytes first, then the row that makes them known; without the row, no bytes stay."""
        file_id = files.new_file_id()
        prefix = f"files/{file_id}/"
        await self._storage.put_file(prefix + CONTENT, path)
        try:
            kept = await self._insert(project_id, file_id, filename, canonical, prefix + CONTENT, request)
        except BaseException:
            # Cancellation too: nobody would ever know of these bytes.
            with anyio.move_on_after(CLEANUP_SECONDS, shield=True):
                await self._storage.delete_prefix(prefix)
            raise
        if kept.is_replay:
            await self._storage.delete_prefix(prefix)
        return kept

    async def _insert(
        self,
        project_id: str,
        file_id: str,
        filename: str,
        canonical: Canonical,
        storage_key: str,
        request: idempotency.Request | None,
    ) -> Kept:
        async with self._store.write() as session:
            if request is not None and (answer := await idempotency.begin(session, request)) is not None:
                return Kept(specs.File.model_validate(answer.body), is_replay=True)
            row = await files.insert_file(
                session,
                project_id,
                id=file_id,
                filename=filename,
                bytes=canonical.bytes,
                sha256=canonical.sha256,
                rows=canonical.rows,
                columns=canonical.columns,
                format=canonical.format,
                storage_key=storage_key,
            )
            file = file_of(row)
            if request is not None:
                await idempotency.finish(
                    session, request, idempotency.Answer(CREATED, file.model_dump(mode="json"))
                )
            return Kept(file)

    async def get(self, project_id: str, file_id: str) -> specs.File:
        """Raises NotFound."""
        async with self._store.read() as session:
            return file_of(await files.get_file(session, project_id, file_id))

    async def list(self, project_id: str, after: str | None, limit: int) -> specs.Page[specs.File]:
        """The project's files, newest first. Raises UnknownCursor."""
        async with self._store.read() as session:
            page = await files.list_files(session, project_id, after=after, limit=limit)
            return specs.Page(data=[file_of(row) for row in page.data], has_more=page.has_more)

    async def delete(self, project_id: str, file_id: str) -> None:
        """Delete a file that no job will read any more.

        Raises:
            NotFound, FileInUse.
        """
        async with self._store.write() as session:
            await files.delete_file(session, project_id, file_id)
        await self._storage.delete_prefix(f"files/{file_id}/")

    async def open(self, project_id: str, file_id: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Stream the bytes `start` (included) to `stop` (excluded) of a file. Raises NotFound."""
        async with self._store.read() as session:
            row = await files.get_file(session, project_id, file_id)
        return await self._storage.read(row.storage_key, start, stop)


def file_of(row: rows.File) -> specs.File:
    """A file as its owner sees it."""
    return specs.File(
        id=row.id,
        filename=row.filename,
        bytes=row.bytes,
        sha256=row.sha256,
        rows=row.rows,
        columns=row.columns,
        format=row.format,
        created_at=row.created_at,
    )
