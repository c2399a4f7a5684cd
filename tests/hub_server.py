"""A hub of data sets on this machine: the part of the Hugging Face hub's HTTP API that reading one asks for.

Repositories have commits, each the whole of its files; branches move. Knows nothing of Proxima.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

Files = Mapping[str, bytes]


class Refusal(Exception):
    """An answer that is none; code: the hub's own word for why."""

    def __init__(self, status: HTTPStatus, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


@dataclass
class LocalHub:
    """What the hub has, and what it was asked for. away: so many requests it answers that it is not there.

    patience: after so many requests, all others are too many for it; None: none are.
    """

    url: str = ""
    away: int = 0
    patience: int | None = None
    commits: dict[str, dict[str, Files]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def push(self, repo: str, files: Mapping[str, str | bytes]) -> str:
        """A new commit on a repository's main branch; its hash."""
        content = {name: text.encode() if isinstance(text, str) else text for name, text in files.items()}
        history = self.commits.setdefault(repo, {})
        commit = hashlib.sha1(f"{repo} {len(history)}".encode()).hexdigest()
        history[commit] = content
        self.heads[repo] = commit
        return commit

    def commit_of(self, repo: str, revision: str) -> str:
        if repo not in self.commits or repo in self.closed:
            raise Refusal(HTTPStatus.NOT_FOUND, "RepoNotFound")
        commit = self.heads[repo] if revision == "main" else revision
        if commit not in self.commits[repo]:
            raise Refusal(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        return commit


def _entry(path: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what was asked stands in `asked`."""

    def do_GET(self) -> None:
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        try:
            if self.hub.patience is not None and len(self.hub.asked) > self.hub.patience:
                raise Refusal(HTTPStatus.TOO_MANY_REQUESTS, "TooMany")
            if self.hub.away > 0:
                self.hub.away -= 1
                raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "Away")
            self._route(urlsplit(self.path).path.strip("/").split("/"), body)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.code}
            self._send(refusal.status, json.dumps({"error": refusal.code}).encode(), headers)

    def _route(self, path: list[str], body: bytes) -> None:
        match [unquote(part) for part in path]:
            case ["datasets", owner, name, "resolve", revision, *file]:
                self._file(f"{owner}/{name}", revision, "/".join(file))
            case ["api", "datasets", owner, name]:
                self._info(f"{owner}/{name}", "main")
            case ["api", "datasets", owner, name, "revision", revision]:
                self._info(f"{owner}/{name}", revision)
            case ["api", "datasets", owner, name, "paths-info", revision]:
                self._paths(f"{owner}/{name}", revision, body)
            case ["api", "datasets", owner, name, "tree", revision, *folder]:
                self._tree(f"{owner}/{name}", revision, "/".join(folder))
            case _:
                raise Refusal(HTTPStatus.NOT_FOUND, "NoSuchRoute")

    def _info(self, repo: str, revision: str) -> None:
        commit = self.hub.commit_of(repo, revision)
        siblings = [{"rfilename": name} for name in self.hub.commits[repo][commit]]
        self._json({"id": repo, "sha": commit, "private": False, "siblings": siblings, "tags": []})

    def _paths(self, repo: str, revision: str, body: bytes) -> None:
        files = self.hub.commits[repo][self.hub.commit_of(repo, revision)]
        wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
        self._json([_entry(path, files[path]) for path in wanted if path in files])

    def _tree(self, repo: str, revision: str, folder: str) -> None:
        files = self.hub.commits[repo][self.hub.commit_of(repo, revision)]
        prefix = f"{folder}/" if folder else ""
        inside = {path.removeprefix(prefix): path for path in files if path.startswith(prefix)}
        folders = {name.partition("/")[0] for name in inside if "/" in name}
        if folder and not inside:
            raise Refusal(HTTPStatus.NOT_FOUND, "EntryNotFound")
        found = [{"type": "directory", "path": prefix + name, "oid": ""} for name in sorted(folders)]
        self._json(found + [_entry(path, files[path]) for name, path in inside.items() if "/" not in name])

    def _file(self, repo: str, revision: str, path: str) -> None:
        commit = self.hub.commit_of(repo, revision)
        content = self.hub.commits[repo][commit].get(path)
        if content is None:
            raise Refusal(HTTPStatus.NOT_FOUND, "EntryNotFound")
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        if not wanted:
            self._send(HTTPStatus.OK, content, headers)
            return
        first, _, last = wanted.partition("-")
        start, stop = int(first), min(int(last or len(content)), len(content) - 1) + 1
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(HTTPStatus.PARTIAL_CONTENT, content[start:stop], headers)

    def _json(self, answer: object) -> None:
        self._send(HTTPStatus.OK, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, status: HTTPStatus, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """A hub that is there while the body runs."""
    hub = LocalHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
