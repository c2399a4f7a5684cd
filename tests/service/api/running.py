"""A real server on a real port, and what tests do behind its back: keys, claims, beats, artifacts."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import httpx
import uvicorn
from fastapi import FastAPI
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession

from ppo_engine.events import Event
from ppo_engine.run_dir import ManifestFile
from service import admin
from service.api.context import Context
from service.main import create_app
from service.settings import Settings
from service.storage import Storage
from service.store import artifacts, transitions
from service.store.models import ArtifactKind, Job
from service.store.session import Store
from service.store.transitions import Fence

T = TypeVar("T")

DEADLINE = 300.0
MAX_BODY = 64 * 1024
MAX_FILE = 8 * 1024 * 1024

_numbers = itertools.count(1)


class Running:
    """A service that answers at `url`."""

    def __init__(self, url: str, settings: Settings, app: FastAPI | None = None) -> None:
        self.url = url
        self.settings = settings
        self._app = app

    @property
    def listeners(self) -> int:
        """How many streams the server holds open."""
        assert self._app is not None, "the server runs in a process of its own"
        context: Context = self._app.state.context
        return context.feed.listeners

    def client(self, project: str | None = None) -> httpx.Client:
        """A client with a key of its own project, or of the one named."""
        key = self.key(project or f"project-{next(_numbers)}")
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=DEADLINE)

    def key(self, project: str) -> str:
        secret = self.settings.read_key_secret()
        return self.with_store(lambda store: admin.create_key(store, secret, project, "test"))

    def with_store(self, work: Callable[[Store], Awaitable[T]]) -> T:
        """Do something at a store of our own, as another process would."""

        async def run() -> T:
            store = Store.open(self.settings.database_url)
            try:
                return await work(store)
            finally:
                await store.close()

        return asyncio.run(run())

    def write(self, work: Callable[[AsyncSession], Awaitable[T]]) -> T:
        """Do something in one unit of work."""

        async def run(store: Store) -> T:
            async with store.write() as session:
                return await work(session)

        return self.with_store(run)

    def claim(self, job_id: str) -> Fence:
        """Take up this job and no other."""

        async def work(session: AsyncSession) -> Fence:
            await session.execute(update(Job).where(Job.id == job_id).values(priority=next(_numbers)))
            claim = await transitions.claim(session, worker="worker-1")
            assert claim is not None
            assert claim.fence.job_id == job_id
            return claim.fence

        return self.write(work)

    def say(self, fence: Fence, *said: Event) -> None:
        self.write(lambda session: transitions.beat(session, fence, said))

    def settle(self, move: Callable[..., Awaitable[None]], fence: Fence, *details: Any) -> None:
        self.write(lambda session: move(session, fence, *details))

    def store_files(self, fence: Fence, kind: ArtifactKind, update: int, files: Mapping[str, bytes]) -> None:
        """Put files into storage and make them known, as a worker does."""
        folder = {"export": "export/", "checkpoint": "checkpoint/"}.get(kind, "")
        prefix = f"jobs/{fence.job_id}/a{fence.attempt}/update-{update}/{folder}"

        async def work(store: Store) -> None:
            storage = Storage.open(self.settings.storage_url)
            with TemporaryDirectory() as directory:
                for name, content in files.items():
                    path = Path(directory, "content")
                    path.write_bytes(content)
                    await storage.put_file(prefix + name, path)
            async with store.write() as session:
                await artifacts.record(session, fence, kind, update, _described(files), prefix, {"kl": 0.5})

        self.with_store(work)


def _described(files: Mapping[str, bytes]) -> Sequence[ManifestFile]:
    return [
        ManifestFile(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        for name, content in files.items()
    ]


@contextmanager
def serving(settings: Settings) -> Iterator[Running]:
    """A server in a thread, with a loop of its own, while the body runs."""
    listening = socket.create_server(("127.0.0.1", 0))
    # asyncio leaves Nagle's delay of 40 ms on for sockets that it has not made itself.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    app = create_app(settings)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="server")
    thread.start()
    try:
        deadline = time.monotonic() + DEADLINE
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server did not start in time"
            time.sleep(0.01)
        yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", settings, app)
    finally:
        server.should_exit = True
        thread.join(DEADLINE)
        listening.close()
        assert not thread.is_alive(), "the server did not stop"


def said(type: str, update: int, data: Mapping[str, Any] | None = None) -> Event:
    """An event as an engine says it."""
    return Event.model_validate(
        {"key": f"{type}:{update}", "type": type, "update": update, "time": 1.7e9, "data": dict(data or {})}
    )


def make_model(path: Path, **changes: Any) -> Path:
    """A model directory that has everything but weights: a small GPT-2, with its tokenizer's names."""
    path.mkdir(parents=True)
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 64, "n_embd": 8}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "</s>"}
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 30} | changes.get("config", {})))
    (path / "tokenizer_config.json").write_text(json.dumps(changes.get("tokenizer", tokenizer)))
    shapes = {"wte.weight": [30, 8], "h.0.attn.c_attn.weight": [8, 24], "h.0.mlp.c_fc.weight": [8, 32]}
    shapes |= changes.get("shapes", {})
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()
    }
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    return path


def upload(client: httpx.Client, *rows: Mapping[str, Any], name: str = "prompts.jsonl") -> str:
    """The id of a new prompt file; of 16 plain rows, where none are given."""
    given = rows or tuple({"prompt": f"Prompt {number}"} for number in range(16))
    content = "".join(json.dumps(row) + "\n" for row in given)
    answer = client.post("/v1/files", files={"file": (name, content)})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def spec(file_id: str, **parts: Any) -> dict[str, Any]:
    """A small spec that is right, with parts replaced."""
    return {
        "model": {"type": "local", "path": "tiny"},
        "prompts": {"train": file_id},
        "rewards": [{"type": "length", "name": "short", "target": 5}],
        "ppo": {"total_episodes": 64, "response_length": 16},
        **parts,
    }


def make_job(client: httpx.Client, **parts: Any) -> dict[str, Any]:
    """A job that was just made."""
    answer = client.post("/v1/jobs", json={"spec": spec(upload(client), **parts)})
    assert answer.status_code == 201, answer.text
    job: dict[str, Any] = answer.json()
    return job


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The problem document of a refusal, checked for all that every one must have."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["status"] == status
    assert document["type"] == f"urn:proxima:problem:{code}"
    assert document["instance"] == answer.request.url.path
    assert document["request_id"] == answer.headers["x-request-id"]
    assert document["title"]
    assert document["error"]["code"] == code
    assert document["error"]["message"] == document["detail"]
    assert "Traceback" not in answer.text
    assert 'File "' not in answer.text
    return document


def demand(
    answer: httpx.Response,
    status: int,
    code: str,
    loc: tuple[str | int, ...],
    given: str,
    rule: str,
    fix: str,
) -> None:
    """A refusal must tell all: where, what was given, the rule, and the fix."""
    document = problem(answer, status, code)
    issues = {tuple(issue["loc"]): issue["msg"] for issue in document["issues"]}
    assert loc in issues, issues
    for part in (given, rule, fix):
        assert part in issues[loc], (part, issues[loc])
    assert document["error"]["param"] == ".".join(map(str, document["issues"][0]["loc"]))


def issue_at(answer: httpx.Response, *loc: str | int) -> str:
    """The message of the issue at this place of a 422; the document must have one there."""
    issues = {
        tuple(issue["loc"]): issue["msg"] for issue in problem(answer, 422, "invalid_request")["issues"]
    }
    assert loc in issues, issues
    return str(issues[loc])
