"""Policies over HTTP: what there is, and downloads that can be resumed and checked."""

from __future__ import annotations

import base64
import hashlib
import logging
import shutil
from collections.abc import Iterator

import httpx
import pytest

from service.store import transitions
from tests.service.api.running import Running, issue_at, make_job, problem, upload

WEIGHTS = bytes(range(256)) * 40
CONFIG = b'{"peft_type": "LORA"}'
ARCHIVE = b"an archive" * 1000


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


@pytest.fixture(scope="module")
def job_id(client: httpx.Client, service: Running) -> str:
    return make_exports(client, service)


def make_exports(client: httpx.Client, service: Running) -> str:
    """A job with two exports, one of them made again by a second attempt, and the archive of the last."""
    job_id = str(make_job(client)["id"])
    fence = service.claim(job_id)
    service.store_files(
        fence, "checkpoint", 4, {"optimizer.pt": b"secret", "value_head.safetensors": b"secret"}
    )
    service.store_files(
        fence, "export", 4, {"adapter_config.json": b"old", "adapter_model.safetensors": b"old"}
    )
    service.write(lambda session: transitions.requeue(session, fence, "lost", True))
    fence = service.claim(job_id)
    files = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS, "empty.txt": b""}
    for update in (4, 8):
        service.store_files(fence, "export", update, files)
    service.store_files(fence, "archive", 8, {"export.tar": ARCHIVE})
    service.settle(transitions.succeed, fence)
    return job_id


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_the_exports_of_the_newest_attempt_are_listed(client: httpx.Client, job_id: str):
    page = client.get(f"/v1/jobs/{job_id}/checkpoints").json()
    assert [(item["object"], item["update"], item["attempt"]) for item in page["data"]] == [
        ("checkpoint", 4, 2),
        ("checkpoint", 8, 2),
    ]
    first = page["data"][0]
    assert first["metrics"] == {"kl": 0.5}
    assert first["files"] == [
        {"name": "adapter_config.json", "size": len(CONFIG), "sha256": sha256(CONFIG)},
        {"name": "adapter_model.safetensors", "size": len(WEIGHTS), "sha256": sha256(WEIGHTS)},
        {"name": "empty.txt", "size": 0, "sha256": sha256(b"")},
    ]
    assert client.get(f"/v1/jobs/{job_id}/checkpoints/4").json() == first
    rest = client.get(f"/v1/jobs/{job_id}/checkpoints?after=4&limit=1").json()
    assert ([item["update"] for item in rest["data"]], rest["has_more"]) == ([8], False)
    assert client.get(f"/v1/jobs/{job_id}/checkpoints?limit=1").json()["has_more"]


def test_nothing_but_the_policy_is_handed_out(client: httpx.Client, job_id: str):
    for name in ("optimizer.pt", "value_head.safetensors", "../checkpoint/optimizer.pt"):
        answer = client.get(f"/v1/jobs/{job_id}/checkpoints/4/files/{name.replace('..', '%2e%2e')}")
        problem(answer, 404, "not_found")


def test_a_whole_file(client: httpx.Client, job_id: str):
    answer = client.get(f"/v1/jobs/{job_id}/checkpoints/8/files/adapter_model.safetensors")
    assert (answer.status_code, answer.content) == (200, WEIGHTS)
    assert answer.headers["content-length"] == str(len(WEIGHTS))
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["etag"] == f'"{sha256(WEIGHTS)}"'
    digest = base64.b64encode(hashlib.sha256(answer.content).digest()).decode()
    assert answer.headers["repr-digest"] == f"sha-256=:{digest}:"
    assert answer.headers["content-disposition"] == 'attachment; filename="adapter_model.safetensors"'
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_download_that_broke_off_goes_on(client: httpx.Client, job_id: str):
    url = f"/v1/jobs/{job_id}/adapter"
    first = client.get(url, headers={"Range": "bytes=0-4095"})
    assert (first.status_code, len(first.content)) == (206, 4096)
    assert first.headers["content-range"] == f"bytes 0-4095/{len(ARCHIVE)}"
    assert first.headers["content-length"] == "4096"
    rest = client.get(url, headers={"Range": "bytes=4096-", "If-Range": first.headers["etag"]})
    assert rest.status_code == 206
    assert sha256(first.content + rest.content) == first.headers["etag"].strip('"')
    assert client.get(url, headers={"Range": "bytes=-10"}).content == ARCHIVE[-10:]


def test_a_download_of_something_else_starts_again(client: httpx.Client, job_id: str):
    url = f"/v1/jobs/{job_id}/adapter"
    answer = client.get(url, headers={"Range": "bytes=4096-", "If-Range": '"of another content"'})
    assert (answer.status_code, answer.content) == (200, ARCHIVE)
    changed = client.get(url, headers={"If-Match": '"of another content"'})
    assert "start again" in problem(changed, 412, "precondition_failed")["detail"]


def test_what_one_has_is_not_sent_again(client: httpx.Client, job_id: str):
    url = f"/v1/jobs/{job_id}/adapter"
    answer = client.get(url, headers={"If-None-Match": client.head(url).headers["etag"]})
    assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["etag"] == f'"{sha256(ARCHIVE)}"'
    assert "content-length" not in answer.headers


def test_bytes_there_are_not(client: httpx.Client, job_id: str):
    answer = client.get(f"/v1/jobs/{job_id}/adapter", headers={"Range": f"bytes={len(ARCHIVE)}-"})
    document = problem(answer, 416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(ARCHIVE)}"
    assert f"has {len(ARCHIVE)} bytes" in document["detail"]


def test_an_empty_file(client: httpx.Client, job_id: str):
    answer = client.get(f"/v1/jobs/{job_id}/checkpoints/8/files/empty.txt")
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0")


def test_the_archive_is_named_after_the_job(client: httpx.Client, job_id: str):
    answer = client.get(f"/v1/jobs/{job_id}/adapter")
    assert answer.content == ARCHIVE
    assert answer.headers["content-disposition"] == f'attachment; filename="{job_id}.tar"'


def test_what_is_not_there_is_told_with_what_is(client: httpx.Client, service: Running, job_id: str):
    url = f"/v1/jobs/{job_id}/checkpoints"
    assert "updates [4, 8]" in problem(client.get(f"{url}/5"), 404, "not_found")["detail"]
    missing = problem(client.get(f"{url}/8/files/model.safetensors"), 404, "not_found")["detail"]
    assert "adapter_config.json" in missing
    assert '"x" given' in issue_at(client.get(f"{url}/x"), "update")
    assert "given" in issue_at(client.get(f"{url}/99999999999999999999"), "update")
    fresh = make_job(client)["id"]
    assert "the job is queued" in problem(client.get(f"/v1/jobs/{fresh}/adapter"), 404, "not_found")["detail"]
    client.post(f"/v1/jobs/{fresh}/cancel")
    told = problem(client.get(f"/v1/jobs/{fresh}/adapter"), 404, "not_found")["detail"]
    assert "cancelled before its first export" in told


def test_bytes_lost_from_storage_are_named_and_logged(
    client: httpx.Client, service: Running, caplog: pytest.LogCaptureFixture
):
    job_id = make_exports(client, service)
    file_id = upload(client)
    log = {"engine.log": b"last words\n"}
    fence = service.claim(make_job(client)["id"])
    service.store_files(fence, "log", 0, log)
    shutil.rmtree(service.settings.data_dir / "storage" / "jobs")
    shutil.rmtree(service.settings.data_dir / "storage" / "files")
    for path, name in (
        (f"/v1/jobs/{job_id}/adapter", "export.tar"),
        (f"/v1/jobs/{job_id}/checkpoints/8/files/adapter_config.json", "adapter_config.json"),
        (f"/v1/jobs/{fence.job_id}/logs", "engine.log"),
        (f"/v1/files/{file_id}/content", "prompts.jsonl"),
    ):
        caplog.clear()
        answer = client.get(path)
        document = problem(answer, 503, "content_lost")
        assert f"content of '{name}' is missing" in document["detail"]
        assert answer.headers["x-should-retry"] == "false"
        assert document["error"]["type"] == "server_error"
        assert str(service.settings.data_dir) not in answer.text
        [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert f"/{name} is not in storage" in record.message
