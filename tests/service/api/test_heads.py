"""HEAD: what GET would answer, at every path, without its body."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from service.main import create_app
from service.store import transitions
from tests.service.api.running import Running, make_job, problem, said, upload
from tests.worker.waiting import until

OWN = {"date", "x-request-id", "transfer-encoding"}
"""Headers of each answer alone; the last is of the way in which a body without a known length is sent."""


def compare(client: httpx.Client, path: str, status: int = 200, **headers: str) -> httpx.Response:
    """HEAD and GET of a path, which must be alike; the first of them."""
    head = client.head(path, headers=headers)
    with client.stream("GET", path, headers=headers) as get:
        assert (head.status_code, get.status_code) == (status, status), path
        alike: list[Any] = [{n: v for n, v in a.headers.items() if n not in OWN} for a in (head, get)]
    assert alike[0] == alike[1], path
    assert head.content == b""
    return head


@pytest.fixture
def job_id(client: httpx.Client, service: Running) -> str:
    """A job that is over, with something of everything."""
    job_id = str(make_job(client)["id"])
    fence = service.claim(job_id)
    service.say(fence, said("metrics", 1, {"kl": 0.5}), said("samples", 1, {"samples": []}))
    service.store_files(fence, "log", 0, {"engine.log": b"one\ntwo\n"})
    service.store_files(fence, "export", 1, {"adapter_config.json": b"{}"})
    service.store_files(fence, "archive", 1, {"export.tar": b"an archive" * 1000})
    service.settle(transitions.succeed, fence)
    return job_id


def test_head_is_answered_wherever_get_is(client: httpx.Client, service: Running, job_id: str):
    given = {"job_id": job_id, "file_id": upload(client), "update": "1", "name": "adapter_config.json"}
    paths = [
        path for path, methods in create_app(service.settings).openapi()["paths"].items() if "get" in methods
    ]
    assert len(paths) > 14
    for path in [*paths, "/docs", "/docs/swagger-ui.css", "/openapi.json"]:
        head = compare(client, re.sub(r"\{(\w+)\}", lambda match: given[match[1]], path))
        if not path.endswith("logs"):
            assert "content-length" in head.headers, path


def test_head_ignores_a_range(client: httpx.Client, job_id: str):
    head = client.head(f"/v1/jobs/{job_id}/adapter", headers={"Range": "bytes=0-9"})
    assert (head.status_code, head.headers["content-length"]) == (200, "10000")


def test_head_of_a_refusal(client: httpx.Client, service: Running):
    compare(client, "/v1/jobs/job_nothing", 404)
    compare(client, "/v1/nothing", 404)
    compare(client, "/v1/jobs?limit=0", 422)
    assert httpx.head(f"{service.url}/v1/jobs").status_code == 401
    problem(client.put("/v1/jobs"), 405, "method_not_allowed")
    assert client.head("/v1/jobs/estimate").status_code == client.get("/v1/jobs/estimate").status_code


def test_head_of_a_stream_ends_at_once(client: httpx.Client, service: Running):
    url = f"/v1/jobs/{make_job(client)['id']}/events"
    head = client.head(url, headers={"Accept": "text/event-stream"})
    assert head.headers["content-type"].startswith("text/event-stream")
    until(lambda: service.listeners == 0, "nobody listens")
