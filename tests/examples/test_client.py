"""The small HTTP client of the demo, against a real HTTP server that behaves, and one that does not."""

import base64
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from randomwalks.client import Problem, Proxima, ServerSentEvent, parse_events

CONTENT = b"weights"


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("adapter_model.safetensors")
        info.size = len(CONTENT)
        tar.addfile(info, io.BytesIO(CONTENT))
    return buffer.getvalue()


def event(seq: int, kind: str, data: dict[str, Any]) -> bytes:
    body = json.dumps({"seq": seq, "type": kind, "update": seq, "data": data})
    return f"id: {seq}\nevent: {kind}\ndata: {body}\n\n".encode()


class Behaviour(ThreadingHTTPServer):
    """What the server does wrong, and what it was asked."""

    daemon_threads = True
    archive_digest = hashlib.sha256(archive()).digest()
    file_digest = hashlib.sha256(CONTENT).hexdigest()
    last_event_ids: list[str]


class Handler(BaseHTTPRequestHandler):
    server: Behaviour

    def do_GET(self) -> None:
        if self.headers["Authorization"] != "Bearer key":
            issues = [{"loc": ["header"], "msg": "Give a key."}]
            problem = {"title": "Unauthorized", "detail": "No key.", "issues": issues}
            self._answer(json.dumps(problem).encode(), "application/problem+json", 401)
        elif self.path.endswith("/events"):
            self._stream(self.headers["Last-Event-ID"])
        elif self.path.endswith("/adapter"):
            digest = base64.b64encode(self.server.archive_digest).decode()
            self._answer(archive(), "application/x-tar", 200, {"Repr-Digest": f"sha-256=:{digest}:"})
        elif self.path.endswith("/checkpoints?after=-1"):
            self._list_checkpoints(3, "of another policy", has_more=True)
        elif self.path.endswith("/checkpoints?after=3"):
            self._list_checkpoints(6, self.server.file_digest, has_more=False)
        else:
            self._answer(json.dumps({"id": "job_1", "update": 7}).encode())

    def _list_checkpoints(self, update: int, digest: str, has_more: bool) -> None:
        files = [{"name": "adapter_model.safetensors", "sha256": digest}]
        page = {"data": [{"update": update, "files": files}], "has_more": has_more}
        self._answer(json.dumps(page).encode())

    def _stream(self, after: str) -> None:
        """Break off in the middle of the second event, the first time."""
        self.server.last_event_ids.append(after)
        whole = [event(1, "state", {"state": "running"}), event(2, "metrics", {})]
        whole += [event(3, "state", {"state": "succeeded"})]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", "10000")
        self.end_headers()
        self.wfile.write(b"retry: 1000\n\n: a comment\n\n")
        self.wfile.write(whole[0] + whole[1][:20] if after == "0" else b"".join(whole[int(after) :]))

    def _answer(
        self,
        body: bytes,
        kind: str = "application/json",
        status: int = 200,
        more: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


@pytest.fixture
def server() -> Iterator[Behaviour]:
    with Behaviour(("127.0.0.1", 0), Handler) as server:
        server.last_event_ids = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def proxima(server: Behaviour) -> Iterator[Proxima]:
    with Proxima(f"http://127.0.0.1:{server.server_port}", "key") as proxima:
        yield proxima


def test_a_stream_that_breaks_is_taken_up_after_the_last_whole_event(
    server: Behaviour, proxima: Proxima
) -> None:
    assert [event["seq"] for event in islice(proxima.follow("job_1"), 9)] == [1, 2, 3]
    assert server.last_event_ids == ["0", "1"]


def test_an_adapter_is_unpacked_when_every_digest_is_right(proxima: Proxima, tmp_path: Path) -> None:
    directory = proxima.download_adapter("job_1", tmp_path / "adapter")
    assert (directory / "adapter_model.safetensors").read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [directory]


def test_an_archive_with_another_digest_is_refused(
    server: Behaviour, proxima: Proxima, tmp_path: Path
) -> None:
    server.archive_digest = hashlib.sha256(b"something else").digest()
    with pytest.raises(Problem, match="digest"):
        proxima.download_adapter("job_1", tmp_path / "adapter")
    assert not list((tmp_path / "adapter").iterdir())


def test_a_file_that_is_not_the_manifests_is_refused(
    server: Behaviour, proxima: Proxima, tmp_path: Path
) -> None:
    server.file_digest = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(Problem, match=r"adapter_model\.safetensors"):
        proxima.download_adapter("job_1", tmp_path / "adapter")


def test_a_refusal_says_what_the_service_said(server: Behaviour) -> None:
    with (
        Proxima(f"http://127.0.0.1:{server.server_port}", "another") as proxima,
        pytest.raises(Problem, match=r"No key\.\nheader: Give a key\."),
    ):
        proxima.job("job_1")


def test_messages_of_a_stream_are_told_apart() -> None:
    lines = ["retry: 1", "", ": comment", "", "id: 1", "event: a", "data: x", "data:y", "", "data: cut off"]
    assert list(parse_events(lines)) == [ServerSentEvent(id="1", type="a", data="x\ny")]
