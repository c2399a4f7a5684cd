"""Files over HTTP: brought in, listed, read, deleted; what is refused; what an upload costs the server."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.api.files import FORM_OVERHEAD
from service.settings import Settings
from tests import servers
from tests.conftest import NewDatabase
from tests.service.api.running import MAX_FILE, Running, issue_at, make_job, problem, spec, upload
from tests.worker.waiting import until

ROWS = [{"prompt": "Say ü.", "label": "ü"}, {"prompt": "Say bye.", "label": None}]
MIB = 1024 * 1024
LARGE_SECONDS = 300.0


def post(
    client: httpx.Client, content: bytes | str, name: str = "prompts.jsonl", **fields: str
) -> httpx.Response:
    return client.post("/v1/files", files={"file": (name, content)}, data=fields)


def test_a_file_is_brought_in_and_read_back(client: httpx.Client):
    answer = post(client, "".join(json.dumps(row) + "\n" for row in ROWS), purpose="prompts")
    assert answer.status_code == 201
    file = answer.json()
    assert answer.headers["location"] == f"/v1/files/{file['id']}"
    canonical = "".join(
        json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in ROWS
    ).encode()
    assert file == {
        "object": "file",
        "id": file["id"],
        "filename": "prompts.jsonl",
        "purpose": "prompts",
        "bytes": len(canonical),
        "sha256": hashlib.sha256(canonical).hexdigest(),
        "rows": 2,
        "columns": ["prompt", "label"],
        "format": "jsonl",
        "created_at": file["created_at"],
    }
    assert client.get(f"/v1/files/{file['id']}").json() == file
    content = client.get(f"/v1/files/{file['id']}/content")
    assert content.content == canonical
    assert content.headers["content-type"] == "application/jsonl"
    assert content.headers["etag"] == f'"{file["sha256"]}"'


def test_csv_and_parquet_become_the_same(client: httpx.Client):
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"prompt": "a, b", "k": "1"}]), table)
    made = [
        post(client, 'prompt,k\n"a, b",1\n', "p.csv").json(),
        post(client, table.getvalue(), "p.parquet").json(),
    ]
    assert [file["format"] for file in made] == ["csv", "parquet"]
    for file in made:
        content = client.get(f"/v1/files/{file['id']}/content")
        assert content.text == '{"prompt":"a, b","k":"1"}\n'
        assert content.headers["content-disposition"] == 'attachment; filename="p.jsonl"'


def test_a_bad_file_names_its_first_bad_lines(client: httpx.Client):
    lines = ['{"prompt": "fine"}', '{"prompt": ""}', "nonsense", '{"text": "x"}', *['{"prompt": 5}'] * 20]
    answer = post(client, "\n".join(lines))
    assert 'Line 2: "" given; a prompt is text' in issue_at(answer, "file", 2, "prompt")
    assert "Line 3: not JSON" in issue_at(answer, "file", 3)
    assert 'Line 4: no prompt given, only ["text"]' in issue_at(answer, "file", 4)
    assert len(answer.json()["issues"]) == 10
    assert client.get("/v1/files").json()["data"] == []


def test_a_form_that_is_not_one(client: httpx.Client):
    assert "is required" in issue_at(client.post("/v1/files", data={"purpose": "prompts"}), "file")
    assert "is required" in issue_at(client.post("/v1/files", json={}), "file")
    assert '"fine-tune" given' in issue_at(post(client, b"{}", purpose="fine-tune"), "purpose")
    assert '"x" given for an unknown field' in issue_at(post(client, b"{}", extra="x"), "extra")
    broken = {"Content-Type": "multipart/form-data"}
    problem(client.post("/v1/files", content=b"x", headers=broken), 400, "bad_request")


def test_lists_pages_and_cursors(client: httpx.Client, service: Running):
    made = [upload(client) for _ in range(3)]
    first = client.get("/v1/files?limit=2").json()
    assert ([file["id"] for file in first["data"]], first["has_more"]) == ([made[2], made[1]], True)
    rest = client.get(f"/v1/files?limit=2&after={made[1]}").json()
    assert ([file["id"] for file in rest["data"]], rest["has_more"]) == ([made[0]], False)
    job_id = make_job(client)["id"]
    with service.client() as stranger:
        foreign = upload(stranger)
    for cursor in (job_id, foreign):
        problem(client.get("/v1/files", params={"after": cursor}), 400, "unknown_cursor")


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", "/content")])
def test_a_file_of_another_project_is_as_good_as_none(
    client: httpx.Client, service: Running, method: str, path: str
):
    file_id = upload(client)
    with service.client() as stranger:
        for unknown in (file_id, "file_nothing", "%00"):
            answer = stranger.request(method, f"/v1/files/{unknown}{path}")
            assert "There is no file" in problem(answer, 404, "not_found")["detail"]
    assert client.get(f"/v1/files/{file_id}").status_code == 200


def test_a_file_in_use_stays(client: httpx.Client):
    file_id = upload(client)
    job = client.post("/v1/jobs", json={"spec": spec(file_id)}).json()
    answer = client.delete(f"/v1/files/{file_id}")
    assert job["id"] in problem(answer, 409, "file_in_use")["detail"]
    assert answer.headers["x-should-retry"] == "false"
    client.post(f"/v1/jobs/{job['id']}/cancel")
    assert client.delete(f"/v1/files/{file_id}").json() == {"object": "file", "id": file_id, "deleted": True}
    problem(client.get(f"/v1/files/{file_id}/content"), 404, "not_found")


def test_a_deleted_file_leaves_nothing_in_storage(client: httpx.Client, service: Running):
    file_id = upload(client)
    stored = service.settings.data_dir / "storage" / "files" / file_id
    assert stored.exists()
    client.delete(f"/v1/files/{file_id}")
    until(lambda: not stored.exists(), "its bytes are gone")


def post_once(client: httpx.Client, content: bytes, name: str = "p.jsonl") -> httpx.Response:
    return client.post("/v1/files", files={"file": (name, content)}, headers={"Idempotency-Key": "one"})


def test_an_upload_with_a_key_is_kept_once(client: httpx.Client):
    content = b'{"prompt": "a"}\n'
    first, again = post_once(client, content), post_once(client, content)
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["idempotent-replayed"] == "true"
    # What counts is what was sent, not what it became.
    for other, name in (
        (b'{"prompt": "b"}\n', "p.jsonl"),
        (content + b"\n", "p.jsonl"),
        (content, "q.jsonl"),
    ):
        problem(post_once(client, other, name), 422, "idempotency_key_reused")
    assert len(client.get("/v1/files").json()["data"]) == 1


def test_the_answer_to_an_upload_stands_whatever_the_rules_are_by_now(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
):
    content = b'{"prompt": "a"}\n' * 1000
    first = post_once(client, content)
    monkeypatch.setattr("service.uploads.convert.MAX_LINE_BYTES", 3)
    assert "are the most" in issue_at(post(client, content), "file", 1)
    assert post_once(client, content).json() == first.json()


def test_a_large_upload_with_a_key_is_read_whole_after_it_was_looked_up(client: httpx.Client):
    content = b'{"prompt": "a"}\n' * 100_000  # more than is held in memory
    assert post_once(client, content).json()["rows"] == 100_000


def test_names_of_all_kinds(client: httpx.Client):
    for name in ("../../etc/passwd.jsonl", 'quo"te.jsonl', "ünï.jsonl", "a\\b.jsonl"):
        file_id = upload(client, {"prompt": "a"}, name=name)
        answer = client.get(f"/v1/files/{file_id}/content")
        assert answer.status_code == 200
        assert "\n" not in answer.headers["content-disposition"]
        assert "/" not in answer.headers["content-disposition"].replace("UTF-8''", "")


# Size ------------------------------------------------------------------------------------------------------


def test_a_file_over_the_limit_is_refused_by_its_declared_length(client: httpx.Client):
    document = problem(post(client, b"x" * (MAX_FILE + MIB)), 413, "too_large")
    assert "bytes are the most for this request" in document["detail"]
    assert "More than" not in document["detail"]  # its length is told, not counted


def test_a_file_over_the_limit_is_refused_where_it_passes_it(client: httpx.Client):
    parts = [HEAD, *[b"x" * MIB] * (3 * MAX_FILE // MIB), TAIL]
    answer = client.post("/v1/files", content=iter(parts), headers=MULTIPART)
    limit = MAX_FILE + FORM_OVERHEAD
    assert f"More than {limit} bytes given; {limit} bytes" in problem(answer, 413, "too_large")["detail"]
    assert client.get("/v1/files").json()["data"] == []


HEAD = b'--b\r\nContent-Disposition: form-data; name="file"; filename="p.jsonl"\r\n\r\n'
TAIL = b"\r\n--b--\r\n"
MULTIPART = {"Content-Type": "multipart/form-data; boundary=b"}


@pytest.fixture(scope="module")
def process(
    new_sqlite: NewDatabase, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Running, psutil.Process]]:
    """A server in a process of its own, whose memory can be measured; it takes files of 256 MiB."""
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("data"), database_url=new_sqlite(), max_file_bytes=256 * MIB
    )
    port = servers.free_port()
    environment = os.environ | {
        "PROXIMA_DATA_DIR": str(settings.data_dir),
        "PROXIMA_DATABASE_URL": settings.database_url,
        "PROXIMA_MAX_FILE_BYTES": str(settings.max_file_bytes),
    }
    command = [sys.executable, "-m", "uvicorn", "--factory", "service.main:create_app", "--port", str(port)]
    with subprocess.Popen([*command, "--log-level", "warning"], env=environment) as server:
        url = f"http://127.0.0.1:{port}"
        try:
            until(lambda: _answers(f"{url}/readyz"), "an answer of the server")
            yield Running(url, settings), psutil.Process(server.pid)
        finally:
            server.terminate()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.ConnectError:
        return False


def peak(process: psutil.Process) -> int:
    """Most bytes of memory that a process has had so far."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def rows_of(size: int) -> Iterator[bytes]:
    """So many bytes of JSONL, a line of 100 kB at a time."""
    line = b'{"prompt": "' + b"words " * 16_000 + b'"}\n'
    yield from [line] * (size // len(line))


def test_a_large_file_is_taken_in_constant_memory(process: tuple[Running, psutil.Process]):
    running, server = process
    with running.client() as client:
        client.timeout = LARGE_SECONDS
        upload(client)
        before = peak(server)
        answer = client.post("/v1/files", content=[HEAD, *rows_of(200 * MIB), TAIL], headers=MULTIPART)
        assert answer.status_code == 201, answer.text
        assert answer.json()["bytes"] > 199 * MIB
        with client.stream("GET", f"/v1/files/{answer.json()['id']}/content") as content:
            assert sum(map(len, content.iter_bytes())) == answer.json()["bytes"]
        # Storage is written in parts of a few MiB, several at a time: a constant, but not a small one.
        assert peak(server) - before < 128 * MIB


def test_a_gigabyte_without_a_declared_length_is_refused_in_constant_memory(
    process: tuple[Running, psutil.Process],
):
    running, server = process
    with running.client() as client:
        client.timeout = LARGE_SECONDS
        upload(client)
        before = peak(server)
        parts = [HEAD, *[b"x" * MIB] * 1024, TAIL]
        answer = client.post("/v1/files", content=iter(parts), headers=MULTIPART)
        assert "More than" in problem(answer, 413, "too_large")["detail"]
        assert peak(server) - before < 64 * MIB
