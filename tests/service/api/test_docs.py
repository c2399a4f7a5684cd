"""The documentation and the health of the service: complete, and open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from service.main import create_app
from service.settings import Settings
from service.specs import EstimateRequest, JobCreate
from service.store import keys
from service.store.session import Store
from tests.service.api.running import Running, problem, serving


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return create_app(Settings(data_dir=tmp_path_factory.mktemp("data"))).openapi()


def operations(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def references(part: Any) -> set[str]:
    if isinstance(part, dict):
        found = {part["$ref"]} if isinstance(part.get("$ref"), str) else set()
        return found.union(*(references(value) for value in part.values()))
    return set().union(*(references(item) for item in part)) if isinstance(part, list) else set()


def test_every_operation_is_described_and_tells_its_refusals(document: dict[str, Any]):
    found = operations(document)
    assert len(found) >= 18
    for name, operation in found:
        assert operation["description"], name
        if name.split()[1] in ("/livez", "/readyz"):
            assert "security" not in operation, name
            continue
        assert operation["security"] == [{"HTTPBearer": []}], name
        refusals = {status: answer for status, answer in operation["responses"].items() if status >= "400"}
        assert "401" in refusals, name
        for answer in refusals.values():
            assert list(answer["content"]) == ["application/problem+json"], name
        for parameter in operation.get("parameters", ()):
            assert (
                parameter["in"] == "path"
                or parameter.get("description")
                or parameter["name"]
                in (
                    "limit",
                    "Last-Event-ID",
                )
            ), (name, parameter)


def test_every_body_has_an_example_and_described_fields(document: dict[str, Any]):
    bodies = [
        (name, operation["requestBody"])
        for name, operation in operations(document)
        if "requestBody" in operation
    ]
    assert len(bodies) == 3
    for name, body in bodies:
        [media] = body["content"].values()
        schema = document["components"]["schemas"][media["schema"]["$ref"].rsplit("/", 1)[1]]
        assert schema["examples"], name
        assert schema["description"], name


def test_every_reference_leads_somewhere(document: dict[str, Any]):
    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert references(document) <= known
    assert "#/components/schemas/RunSpec" in references(document)
    assert not {"HTTPValidationError", "ValidationError"} & set(document["components"]["schemas"])


def test_the_examples_are_right():
    for model in (JobCreate, EstimateRequest):
        for example in model.model_config["json_schema_extra"]["examples"]:  # type: ignore[index,call-overload]
            model.model_validate(example)


def test_docs_and_health_are_open(service: Running):
    with httpx.Client(base_url=service.url) as nobody:
        assert "swagger" in nobody.get("/docs").text.lower()
        assert nobody.get("/openapi.json").json()["info"]["title"] == "Proxima"
        assert nobody.get("/livez").json() == {"status": "ok"}
        assert nobody.get("/readyz").json() == {"status": "ok"}


def test_without_its_database_the_service_lives_and_is_not_ready(tmp_path: Path):
    settings = Settings(data_dir=tmp_path, database_url="postgresql://nobody@127.0.0.1:1/none")
    with serving(settings) as running:
        assert httpx.get(f"{running.url}/livez").status_code == 200
        answer = httpx.get(f"{running.url}/readyz")
        assert "The database does not answer" in problem(answer, 503, "unavailable")["detail"]
        assert answer.headers["retry-after"]
        headers = {"Authorization": f"Bearer {keys.generate()}"}
        answer = httpx.get(f"{running.url}/v1/jobs", headers=headers)
        assert "send it again in a moment" in problem(answer, 503, "unavailable")["detail"]
        assert answer.headers["x-should-retry"] == "true"


def test_nothing_of_a_fault_is_told(service: Running, monkeypatch: pytest.MonkeyPatch):
    def broken(self: Store) -> None:
        raise RuntimeError("the password is hunter2")

    with service.client() as client:
        monkeypatch.setattr(Store, "read", broken)
        answer = client.get("/v1/jobs")
    assert "hunter2" not in answer.text
    problem(answer, 500, "internal_error")
