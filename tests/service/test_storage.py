"""Storage on a local directory, and on S3 as `moto` plays it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from service.storage import CHUNK, Damaged, Storage

pytestmark = pytest.mark.anyio

CREDENTIALS = {"region": "us-east-1", "access_key_id": "test", "secret_access_key": "test"}


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str) -> Storage:
    bucket = f"bucket-{os.urandom(6).hex()}"
    create = urllib.request.Request(f"{s3_endpoint}/{bucket}", method="PUT")
    urllib.request.urlopen(create).close()
    return Storage.open(f"s3://{bucket}/some/prefix", CREDENTIALS | {"endpoint": s3_endpoint})


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage.open(f"file://{tmp_path}/a place/storage")
    found: Storage = request.getfixturevalue("s3")
    return found


async def put(storage: Storage, key: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "to-upload"
    path.write_bytes(content)
    await storage.put_file(key, path)


async def joined(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


@pytest.mark.parametrize("size", [0, 1, CHUNK, 12 * CHUNK + 7])
async def test_what_is_put_comes_back(storage: Storage, tmp_path: Path, size: int):
    content = os.urandom(size)
    await put(storage, "jobs/j1/a1/file.bin", content, tmp_path)
    assert await storage.size("jobs/j1/a1/file.bin") == size
    assert await joined(await storage.read("jobs/j1/a1/file.bin")) == content


async def test_a_large_object_comes_in_chunks(storage: Storage, tmp_path: Path):
    await put(storage, "big", os.urandom(8 * CHUNK), tmp_path)
    sizes = [len(chunk) async for chunk in await storage.read("big")]
    assert len(sizes) > 4
    assert max(sizes) < 3 * CHUNK


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (0, 10), (3, 7), (9, 10), (4, None), (0, None), (5, 99), (3, 3), (0, 0)]
)
async def test_any_range_is_that_of_a_slice(storage: Storage, tmp_path: Path, start: int, stop: int | None):
    await put(storage, "ten", b"0123456789", tmp_path)
    assert await joined(await storage.read("ten", start, stop)) == b"0123456789"[start:stop]


async def test_what_is_put_again_is_replaced(storage: Storage, tmp_path: Path):
    await put(storage, "key", b"old, and longer", tmp_path)
    await put(storage, "key", b"new", tmp_path)
    assert await joined(await storage.read("key")) == b"new"


async def test_a_missing_key_is_told_before_the_first_byte(storage: Storage, tmp_path: Path):
    for call in (storage.size("none"), storage.read("none"), storage.download_to("none", tmp_path / "x")):
        with pytest.raises(FileNotFoundError):
            await call
    with pytest.raises(FileNotFoundError):
        await storage.put_file("key", tmp_path / "nothing")


async def test_a_download_is_checked_and_whole_or_not_there(storage: Storage, tmp_path: Path):
    content = os.urandom(3 * CHUNK)
    await put(storage, "key", content, tmp_path)
    target = tmp_path / "target"
    with pytest.raises(Damaged, match="key has the sha256"):
        await storage.download_to("key", target, "0" * 64)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["to-upload"]
    await storage.download_to("key", target, hashlib.sha256(content).hexdigest())
    assert target.read_bytes() == content


async def test_a_prefix_is_a_directory(storage: Storage, tmp_path: Path):
    for key in ("jobs/j1/a", "jobs/j1/b/c", "jobs/j10/a", "files/j1/a"):
        await put(storage, key, b"x", tmp_path)
    await storage.delete_prefix("jobs/j1/")
    await storage.delete_prefix("jobs/j1/")
    for key in ("jobs/j10/a", "files/j1/a"):
        assert await storage.size(key) == 1
    for key in ("jobs/j1/a", "jobs/j1/b/c"):
        with pytest.raises(FileNotFoundError):
            await storage.size(key)


async def test_deleting_twice_at_once_deletes_once(storage: Storage, tmp_path: Path):
    for number in range(30):
        await put(storage, f"jobs/j1/{number}", b"x", tmp_path)
    await asyncio.gather(*(storage.delete_prefix("jobs/j1/") for _ in range(4)))
    with pytest.raises(FileNotFoundError):
        await storage.size("jobs/j1/0")


async def test_no_key_leaves_the_storage(storage: Storage, tmp_path: Path):
    for key in ("../outside", "jobs/../../outside", "jobs//double"):
        with pytest.raises(ValueError, match="path"):
            await put(storage, key, b"x", tmp_path)


async def test_a_storage_that_is_there_answers(storage: Storage):
    await storage.ping()


async def test_a_storage_that_is_not_there_does_not(s3_endpoint: str):
    storage = Storage.open("s3://no-such-bucket", CREDENTIALS | {"endpoint": s3_endpoint})
    with pytest.raises(Exception, match="NoSuchBucket"):
        await storage.ping()


async def test_a_process_that_used_it_ends_well(tmp_path: Path):
    """obstore's own asynchronous functions make every third such process abort."""
    code = """if True:
        import asyncio, pathlib, sys
        from service.storage import Storage

        async def main(directory):
            storage = Storage.open(f"file://{directory}/storage")
            await storage.put_file("a/b", pathlib.Path(sys.executable))
            async for chunk in await storage.read("a/b"):
                pass
            await storage.ping()

        asyncio.run(main(sys.argv[1]))
    """
    for number in range(3):
        command = [sys.executable, "-c", code, str(tmp_path / str(number))]
        assert subprocess.run(command, check=False).returncode == 0
