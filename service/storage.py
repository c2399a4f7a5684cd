"""Bytes that outlive a machine: a local directory, S3, GCS, or Azure behind one interface.

An object appears whole or not at all, and is on the disk when `put_file` returns. Keys are built by the
callers; a missing key is a FileNotFoundError. This module knows no SQL and no HTTP.

It calls obstore's synchronous functions in threads: a process that has used the asynchronous ones may abort
when it ends, while obstore's own threads let go of Python objects.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import obstore
from obstore.store import LocalStore, ObjectStore, from_url

CHUNK = 1024 * 1024
"""Bytes read at a time."""

_CLIENT: Any = {
    "allow_http": True,  # an endpoint inside one's own network; it is https unless it says otherwise
    "connect_timeout": "5s",
    "timeout": "1h",  # of a whole object: the default ends large ones
}


class Damaged(Exception):
    """What came out of storage is not what was put there."""


class Storage:
    """One place for objects. Safe for many tasks at once."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._root = store.prefix if isinstance(store, LocalStore) else None
        self._safe_directories: set[Path] = set()

    @classmethod
    def open(cls, url: str, options: Mapping[str, str] | None = None) -> Storage:
        """The storage at `file:///directory`, `s3://bucket/prefix`, `gs://…`, or `az://…`.

        options: of the object store, such as `endpoint` or `access_key_id`.
        """
        if url.startswith("file://"):
            return cls(from_url(url, mkdir=True, automatic_cleanup=True))
        config: Any = dict(options or {})
        return cls(from_url(url, config=config, client_options=_CLIENT))

    async def put_file(self, key: str, path: Path) -> None:
        """Store the content of a file, in place of what the key held."""
        await asyncio.to_thread(self._put_file, key, path)

    def _put_file(self, key: str, path: Path) -> None:
        obstore.put(self._store, key, path)
        if self._root is not None:
            self._make_durable(self._root / key, self._root)

    def _make_durable(self, path: Path, root: Path) -> None:
        """Flush a file and its name, and the names of the directories above that are not known to be safe."""
        _sync(path)
        _sync(path.parent)
        for directory in path.relative_to(root).parents[:-1]:
            if directory not in self._safe_directories:
                _sync((root / directory).parent)
                self._safe_directories.add(directory)

    async def size(self, key: str) -> int:
        """Bytes of an object."""
        meta = await asyncio.to_thread(obstore.head, self._store, key)
        return meta["size"]

    async def read(self, key: str, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        """The bytes from `start` to `stop` (excluded; None: to the end), in chunks.

        It is opened before this returns: a missing key is told before the first byte.
        """
        if stop is not None and stop <= start:
            return _nothing()
        where: Any = {"offset": start} if stop is None else (start, stop)
        options: Any = {"range": where} if start or stop is not None else {}
        result = await asyncio.to_thread(obstore.get, self._store, key, options=options)
        return _chunks(result)

    async def download_to(self, key: str, path: Path, sha256: str | None = None) -> None:
        """Write an object to a file, which is there only once it is whole.

        Raises:
            Damaged: it does not have the digest that was given.
        """
        partial = path.with_name(f".{path.name}.partial")
        chunks = await self.read(key)
        digest = hashlib.sha256()

        def keep(chunk: bytes) -> None:
            file.write(chunk)
            digest.update(chunk)

        try:
            with partial.open("wb") as file:
                async for chunk in chunks:
                    await asyncio.to_thread(keep, chunk)
            if sha256 not in (None, digest.hexdigest()):
                raise Damaged(f"{key} has the sha256 {digest.hexdigest()}, and not {sha256}")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    async def delete_prefix(self, prefix: str) -> None:
        """Delete every object whose key begins with the prefix, which ends with a slash."""
        assert prefix.strip("/"), "everything is never deleted"
        assert prefix.endswith("/"), "a prefix is a directory"
        await asyncio.to_thread(self._delete_prefix, prefix)

    def _delete_prefix(self, prefix: str) -> None:
        self._safe_directories.clear()  # empty ones are deleted along, and may be made again
        while keys := [found["path"] for page in obstore.list(self._store, prefix) for found in page]:
            try:
                obstore.delete(self._store, keys)
            except FileNotFoundError:
                continue  # somebody else deletes them, too

    async def ping(self) -> None:
        """Ask the storage for nothing; raises what it raises when it does not answer."""
        await asyncio.to_thread(lambda: next(iter(obstore.list(self._store, "ping", chunk_size=1)), None))


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""


async def _chunks(result: obstore.GetResult) -> AsyncIterator[bytes]:
    stream = iter(result.stream(min_chunk_size=CHUNK))
    while (chunk := await asyncio.to_thread(next, stream, None)) is not None:
        yield bytes(chunk)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
