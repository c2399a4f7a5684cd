"""What an owner does with prompt files: bring in, look up, read, delete.

A file is checked and made canonical on this machine's disk, then put into storage, and last made known: what
is known is whole. No HTTP here.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import anyio
import anyio.to_thread

from service import specs
from service.blobs import Blob, open_blob
from service.planning import invalid
from service.storage import Storage
from service.store import deletions, files, idempotency
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
    """The use cases of prompt files.

    max_bytes: of the canonical form. sweep: has the bytes of what was deleted removed; it neither fails nor
    waits.
    """

    def __init__(self, store: Store, storage: Storage, max_bytes: int, sweep: Callable[[], object]) -> None:
        self._store = store
        self._storage = storage
        self._max_bytes = max_bytes
        self._sweep = sweep
        self._conversions = anyio.CapacityLimiter(CONVERSIONS)

    async def create(self, project_id: str, upload: Upload, key: str | None) -> Kept:
        """Check a file and keep it.

        key: chosen by the client; a second request with it gets the first one's file.

        Raises:
            Invalid: it is no prompt file; names the first bad lines.
            RequestInFlight, KeyReused: the key was sent before.
        """
        request = None if key is None else await self._request(project_id, upload, key)
        # Looked up before the file is judged: the answer stands, whatever the rules are by now.
        if request is not None and (earlier := await self._answered(request)) is not None:
            return earlier
        with tempfile.TemporaryDirectory(prefix="proxima-upload-") as directory:
            path = Path(directory) / CONTENT
            canonical = await self._convert(upload, path)
            return await self._keep(project_id, upload.filename, canonical, path, request)

    async def _request(self, project_id: str, upload: Upload, key: str) -> idempotency.Request:
        """The upload as one that may be sent twice: the same name, and the same bytes as they came in."""
        sha256 = await anyio.to_thread.run_sync(_digest, upload.content, limiter=self._conversions)
        parts = (upload.filename.encode(errors="replace"), sha256)
        return idempotency.Request(project_id, ROUTE, key, idempotency.fingerprint(*parts))

    async def _answered(self, request: idempotency.Request) -> Kept | None:
        async with self._store.write() as session:
            answer = await idempotency.begin(session, request)
        return None if answer is None else Kept(specs.File.model_validate(answer.body), is_replay=True)

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
        prefix = _prefix(file_id)
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
            await deletions.note(session, _prefix(file_id))
        self._sweep()

    async def open(self, project_id: str, file_id: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Stream the bytes `start` (included) to `stop` (excluded) of a file.

        Raises:
            NotFound, ContentLost.
        """
        async with self._store.read() as session:
            row = await files.get_file(session, project_id, file_id)
        blob = Blob(row.filename, row.storage_key, row.bytes, row.sha256)
        return await open_blob(self._storage, blob, start, stop)


def _digest(content: BinaryIO) -> bytes:
    """The digest of a file, which is left at its beginning again."""
    digest = hashlib.file_digest(content, "sha256").digest()  # type: ignore[arg-type]  # it is read-only here
    content.seek(0)
    return digest


def _prefix(file_id: str) -> str:
    """Where a file's bytes lie in storage."""
    return f"files/{file_id}/"


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
