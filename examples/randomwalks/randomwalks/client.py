"""Proxima over HTTP, as a customer's program speaks to it: a few requests, and one stream of events.

Needs httpx only, and imports nothing of Proxima. Every request carries the API key; every answer that
is an error is a problem document (RFC 9457), raised as `Problem` with the fields it names.
"""

import base64
import hashlib
import json
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

RECONNECT_SECONDS = 1.0
FINAL_STATES = frozenset({"succeeded", "failed", "cancelled"})


class Problem(Exception):
    """The service refused a request, or a download is not what was promised; the message says why."""


@dataclass(frozen=True)
class ServerSentEvent:
    """One message of a `text/event-stream`."""

    id: str
    type: str
    data: str


class Proxima:
    """A project's jobs, seen through its API key."""

    def __init__(self, url: str, key: str) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        # An event stream may be silent for a while; the service then sends a comment every 15 seconds.
        timeout = httpx.Timeout(30, read=60)
        self._http = httpx.Client(base_url=f"{url.rstrip('/')}/v1", headers=headers, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def upload(self, filename: str, rows: Iterable[dict[str, Any]]) -> str:
        """Upload prompts as JSON lines; returns the file's id."""
        content = "".join(json.dumps(row) + "\n" for row in rows)
        form = {"data": {"purpose": "prompts"}, "files": {"file": (filename, content)}}
        return str(self._json("POST", "/files", **form)["id"])

    def estimate(self, spec: dict[str, Any]) -> dict[str, Any]:
        """What a job would do and need; nothing is stored."""
        return self._json("POST", "/jobs/estimate", json={"spec": spec})

    def create(self, name: str, spec: dict[str, Any], idempotency_key: str) -> dict[str, Any]:
        """Submit a job; the same key again returns the same job instead of a second one."""
        headers = {"Idempotency-Key": idempotency_key}
        return self._json("POST", "/jobs", json={"name": name, "spec": spec}, headers=headers)

    def job(self, job_id: str) -> dict[str, Any]:
        """The job as it is now."""
        return self._json("GET", f"/jobs/{job_id}")

    def checkpoints(self, job_id: str) -> Iterator[dict[str, Any]]:
        """The manifest of every policy that a job has exported, by update."""
        after = -1
        while True:
            page = self._json("GET", f"/jobs/{job_id}/checkpoints", params={"after": after})
            yield from page["data"]
            if not page["has_more"]:
                return
            after = page["data"][-1]["update"]

    def follow(self, job_id: str) -> Iterator[dict[str, Any]]:
        """Every event of a job, as it happens, until its final state.

        A stream that breaks is taken up after the last event seen: nothing is lost, nothing comes twice.
        """
        seen = "0"
        while True:
            try:
                for message in self._stream(job_id, seen):
                    seen, event = message.id, json.loads(message.data)
                    yield event
                    if event["type"] == "state" and event["data"]["state"] in FINAL_STATES:
                        return
            except httpx.TransportError:
                self.job(job_id)  # raises if the service itself has gone
            time.sleep(RECONNECT_SECONDS)

    def _stream(self, job_id: str, after: str) -> Iterator[ServerSentEvent]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": after}
        with self._http.stream("GET", f"/jobs/{job_id}/events", headers=headers) as response:
            _check(response)
            yield from parse_events(response.iter_lines())

    def download_adapter(self, job_id: str, directory: Path) -> Path:
        """Download the final export, check it against its digest and its manifest, and unpack it.

        Returns `directory`, where an ordinary `save_pretrained` adapter now lies.
        """
        directory.mkdir(parents=True, exist_ok=True)
        archive = directory.with_suffix(".tar")
        self._download(f"/jobs/{job_id}/adapter", archive)
        with tarfile.open(archive) as tar:
            tar.extractall(directory, filter="data")
        archive.unlink()
        self._check_manifest(job_id, directory)
        return directory

    def _download(self, path: str, target: Path) -> None:
        """Stream a body to a file; its sha256 must be the one that the header `Repr-Digest` promises."""
        digest = hashlib.sha256()
        with self._http.stream("GET", path) as response, target.open("wb") as file:
            _check(response)
            for chunk in response.iter_bytes():
                digest.update(chunk)
                file.write(chunk)
        expected = f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
        if response.headers.get("Repr-Digest") != expected:
            raise Problem(f"{path}: the bytes received do not have the digest that the service sent.")

    def _check_manifest(self, job_id: str, directory: Path) -> None:
        """Compare each file with its sha256 in the manifest of the newest checkpoint.

        Its update need not be the job's: an engine that was ended firmly had no time to export its last one.
        """
        *_, newest = self.checkpoints(job_id)
        for file in newest["files"]:
            content = (directory / file["name"]).read_bytes()
            if hashlib.sha256(content).hexdigest() != file["sha256"]:
                raise Problem(f"{file['name']} is not the file that the manifest names.")

    def _json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        response = self._http.request(method, path, **request)
        _check(response)
        answer: dict[str, Any] = response.json()
        return answer


def parse_events(lines: Iterable[str]) -> Iterator[ServerSentEvent]:
    """Messages of an event stream: `name: value` lines, each message ended by an empty one.

    A message cut off by the end of the stream is dropped, as the standard asks.
    """
    fields: dict[str, list[str]] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields.setdefault(name, []).append(value.removeprefix(" "))
            continue
        if "data" in fields:
            last_id, last_type = fields.get("id", [""])[-1], fields.get("event", ["message"])[-1]
            yield ServerSentEvent(id=last_id, type=last_type, data="\n".join(fields["data"]))
        fields = {}


def _check(response: httpx.Response) -> None:
    """Raise the problem that an error answer describes."""
    if response.is_success:
        return
    response.read()
    if not response.headers.get("Content-Type", "").startswith("application/problem+json"):
        raise Problem(f"{response.request.url}: {response.status_code} {response.reason_phrase}")
    problem = response.json()
    issues = [f"{'.'.join(map(str, issue['loc']))}: {issue['msg']}" for issue in problem.get("issues", [])]
    raise Problem("\n".join([problem.get("detail") or problem["title"], *issues]))
