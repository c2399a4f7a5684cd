"""Keys: nobody passes without one, and each opens its own project only."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from fastapi.routing import iter_route_contexts

from service import admin
from service.api.auth import OPEN_PATHS
from service.main import create_app
from service.store import keys
from tests.service.api.running import MAX_BODY, Running, problem


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
        assert "revoked; ask for a new one" in document["detail"]


def test_the_use_of_a_key_is_noted(service: Running):
    with service.client("noting") as client:
        client.get("/v1/jobs")
        project = service.write(lambda session: keys.find_project(session, "noting"))
        assert project is not None
        [key] = service.write(lambda session: keys.list_keys(session, project.id)).data
        assert key.last_used_at is not None


def test_every_route_but_health_and_docs_wants_a_key(service: Running):
    routes = [
        (method, re.sub(r"\{.*?\}", "1", context.path))
        for context in iter_route_contexts(create_app(service.settings).routes)
        for method in context.methods or ()
    ]
    assert len(routes) > 25
    with httpx.Client(base_url=service.url) as nobody:
        for method, path in routes:
            answer = nobody.request(method, path)
            assert (answer.status_code == 401) == (path not in OPEN_PATHS), (method, path, answer.status_code)
        # What is no route is closed as well: nobody learns which routes there are.
        for path in ("/v1", "/", "/v1/nothing", "/docs/", "/livez/x", "//livez"):
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
    assert "this path knows GET, POST" in problem(answer, 405, "method_not_allowed")["detail"]
    assert answer.headers["allow"] == "GET, POST"


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
