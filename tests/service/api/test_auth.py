"""Keys: nobody passes without one, and each opens its own project only."""

from __future__ import annotations

import re
import sqlite3
from datetime import datetime
from pathlib import Path

import httpx
import pytest
from fastapi.routing import iter_route_contexts
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession

from service import admin
from service.api.auth import OPEN_PATHS
from service.main import create_app
from service.settings import Settings
from service.store import keys
from service.store.session import Store
from tests.conftest import NewDatabase
from tests.service.api.running import MAX_BODY, Running, problem, serving
from tests.worker.waiting import until


def refused(service: Running, code: str, header: str | None) -> str:
    headers = {} if header is None else {"Authorization": header}
    answer = httpx.get(f"{service.url}/v1/jobs", headers=headers)
    document = problem(answer, 401, code)
    assert answer.headers["www-authenticate"] == "Bearer"
    assert document["error"]["type"] == "authentication_error"
    return str(document["detail"])


def test_a_missing_key(service: Running):
    assert "send the header 'Authorization: Bearer" in refused(service, "missing_api_key", None)


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Basic dXNlcg==", "Bearer sk-123", "Bearer pxm_short", "pxm_", "Bearer \xff"]
)
def test_a_malformed_key(service: Running, header: str):
    answer = httpx.get(f"{service.url}/v1/jobs", headers={b"Authorization": header.encode("latin-1")})
    assert "a key begins with 'pxm_'" in problem(answer, 401, "malformed_api_key")["detail"]


def test_a_key_with_a_letter_changed_is_malformed_by_its_checksum(service: Running):
    key = service.key("typos")
    changed = key[:-10] + ("a" if key[-10] != "a" else "b") + key[-9:]
    refused(service, "malformed_api_key", f"Bearer {changed}")


def test_a_key_of_another_installation_is_unknown(service: Running):
    assert "not known here" in refused(service, "unknown_api_key", f"Bearer {keys.generate()}")


def test_a_revoked_key_is_refused_at_once(service: Running, monkeypatch: pytest.MonkeyPatch):
    with service.client("revoking") as client:
        assert client.get("/v1/jobs").status_code == 200
        project = service.write(lambda session: keys.find_project(session, "revoking"))
        assert project is not None
        [key] = service.write(lambda session: keys.list_keys(session, project.id)).data
        service.write(lambda session: keys.revoke_key(session, project.id, key.id))
        document = problem(client.get("/v1/jobs"), 401, "revoked_api_key")
        assert "was revoked; ask the operator for a new one" in document["detail"]


def test_the_use_of_a_key_is_noted(service: Running):
    with service.client("noting") as client:
        assert last_use(service, "noting") is None
        client.get("/v1/jobs")
        until(lambda: last_use(service, "noting"), "the use is noted")


def last_use(service: Running, name: str) -> datetime | None:
    """When the only key of a project was used."""

    async def work(store: Store) -> datetime | None:
        async with store.read() as session:
            project = await keys.find_project(session, name)
            assert project is not None
            [key] = (await keys.list_keys(session, project.id)).data
            return key.last_used_at

    return service.with_store(work)


def test_a_database_that_cannot_be_written_delays_no_reader(new_sqlite: NewDatabase, tmp_path: Path):
    settings = Settings(data_dir=tmp_path, database_url=new_sqlite())
    with serving(settings) as running, running.client("reading") as client:
        with sqlite3.connect(settings.database_url.removeprefix("sqlite:///")) as other:
            other.execute("BEGIN IMMEDIATE")
            client.timeout = 10.0  # a writer would wait for 15 s
            assert [client.get("/v1/jobs").status_code for _ in range(5)] == [200] * 5
            other.rollback()
        other.close()
        until(lambda: last_use(running, "reading"), "the use is noted")


def test_one_note_of_a_key_is_written_at_a_time(
    service: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    tries: list[str] = []

    async def broken(session: AsyncSession, key_id: str) -> None:
        tries.append(key_id)
        raise OperationalError("UPDATE", None, Exception("read-only"))

    monkeypatch.setattr(keys, "touch_key", broken)
    with service.client() as client, service.client() as other:
        assert [client.get("/v1/jobs").status_code for _ in range(5)] == [200] * 5
        assert other.get("/v1/jobs").status_code == 200
    until(lambda: len(tries) == 2, "both are tried")
    assert len(set(tries)) == 2, "one try for each key"
    until(lambda: f"noting the use of {tries[0]} failed" in caplog.text, "it is logged")


def test_every_route_but_health_and_docs_wants_a_key(service: Running):
    routes = [
        (method, re.sub(r"\{.*?\}", "1", context.path))
        for context in iter_route_contexts(create_app(service.settings).routes)
        for method in context.methods or ()
    ]
    assert len(routes) > 20
    routes += [("HEAD", path) for method, path in routes if method == "GET"]
    with httpx.Client(base_url=service.url) as nobody:
        for method, path in routes:
            answer = nobody.request(method, path)
            assert (answer.status_code == 401) == (path not in OPEN_PATHS), (method, path, answer.status_code)
        # What is no route is closed as well: nobody learns which routes there are.
        for path in ("/v1", "/", "/v1/nothing", "/docs/", "/docs/redoc.standalone.js", "/livez/x", "//livez"):
            assert nobody.get(path).status_code == 401, path


def test_a_key_is_checked_before_a_body_is_read(service: Running):
    answer = httpx.post(
        f"{service.url}/v1/jobs", content=b"{broken", headers={"Content-Type": "application/json"}
    )
    problem(answer, 401, "missing_api_key")
    problem(httpx.post(f"{service.url}/v1/jobs", content=b"x" * (MAX_BODY + 1)), 413, "too_large")


def test_what_is_no_route_says_so(client: httpx.Client):
    assert (
        "There is no GET /v1/nothing; /docs"
        in problem(client.get("/v1/nothing"), 404, "route_not_found")["detail"]
    )
    answer = client.put("/v1/jobs")
    assert "this path knows GET, HEAD, POST" in problem(answer, 405, "method_not_allowed")["detail"]
    assert answer.headers["allow"] == "GET, HEAD, POST"


def test_every_answer_has_a_request_id_of_its_own(client: httpx.Client):
    answers = [
        client.get("/v1/jobs"),
        client.get("/v1/nothing"),
        client.get("/livez"),
        httpx.get(client.base_url),
    ]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 4


# The operator's command -----------------------------------------------------------------------------------


def test_the_operator_makes_lists_and_revokes_keys(
    service: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PROXIMA_DATA_DIR", str(service.settings.data_dir))
    monkeypatch.setenv("PROXIMA_DATABASE_URL", service.settings.database_url)

    def run(*arguments: str) -> list[str]:
        assert admin.main(list(arguments)) == 0
        return capsys.readouterr().out.splitlines()

    [first] = run("create-key", "--project", "ops", "--name", "laptop")
    [second] = run("create-key", "--project", "ops")
    listed = run("list-keys", "--project", "ops")
    assert [line.split()[-1] for line in listed] == ["key", "laptop"]
    assert all(key not in line for line in listed for key in (first, second))
    assert "is revoked" in run("revoke-key", "--project", "ops", listed[1].split()[0])[0]
    refused(service, "revoked_api_key", f"Bearer {first}")
    assert (
        httpx.get(f"{service.url}/v1/jobs", headers={"Authorization": f"Bearer {second}"}).status_code == 200
    )


def test_the_operator_is_told_of_what_there_is_not(
    service: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PROXIMA_DATA_DIR", str(service.settings.data_dir))
    monkeypatch.setenv("PROXIMA_DATABASE_URL", service.settings.database_url)
    assert admin.main(["list-keys", "--project", "nobody"]) == 1
    assert "There is no project 'nobody'" in capsys.readouterr().err
    assert admin.main(["revoke-key", "--project", "nobody", "key_1"]) == 1


def test_the_operator_is_told_to_migrate_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PROXIMA_DATA_DIR", str(tmp_path))
    assert admin.main(["create-key", "--project", "ops"]) == 1
    assert "run 'python -m service.migrate' first" in capsys.readouterr().err
