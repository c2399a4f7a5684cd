"""The documentation: complete, right, and there without the internet; and the health of the service."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from service.main import create_app
from service.settings import Settings
from service.specs import EstimateRequest, JobCreate
from service.store import keys
from service.store.session import Store
from tests.service.api.running import Running, problem, serving

OPEN = {"/livez", "/readyz"}


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return create_app(Settings(data_dir=tmp_path_factory.mktemp("data"))).openapi()


def operations(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def bodies(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every body that is sent or comes back, with where it is."""
    for name, operation in operations(document):
        sent = {"request": operation["requestBody"]} if "requestBody" in operation else {}
        for which, body in (sent | operation["responses"]).items():
            for media_type, media in body.get("content", {}).items():
                yield f"{name} {which} {media_type}", media


def schema_of(document: dict[str, Any], media: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = media["schema"]
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def examples_of(document: dict[str, Any], media: dict[str, Any]) -> list[Any]:
    return [media["example"]] if "example" in media else schema_of(document, media).get("examples", [])


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
        refusals = {status: answer for status, answer in operation["responses"].items() if status >= "400"}
        for answer in refusals.values():
            assert list(answer["content"]) == ["application/problem+json"], name
            assert answer["description"], name
        if name.split()[1] in OPEN:
            assert "security" not in operation, name
            assert "401" not in refusals, name
        else:
            assert operation["security"] == [{"HTTPBearer": []}], name
            assert {"401", "500", "503"} <= set(refusals), name
    assert "503" in dict(found)["GET /readyz"]["responses"]


def test_every_parameter_is_described(document: dict[str, Any]):
    found = [
        (name, parameter)
        for name, operation in operations(document)
        for parameter in operation.get("parameters", ())
    ]
    assert len(found) > 25
    assert [(name, parameter["name"]) for name, parameter in found if not parameter.get("description")] == []


def test_every_schema_and_field_is_described(document: dict[str, Any]):
    schemas = document["components"]["schemas"]
    fields = {
        f"{name}.{field}": schema
        for name, whole in schemas.items()
        for field, schema in whole.get("properties", {}).items()
    }
    assert len(fields) > 120
    silent = [name for name, schema in (schemas | fields).items() if not schema.get("description")]
    assert silent == []


def test_every_body_has_examples_that_its_schema_allows(document: dict[str, Any]):
    found = dict(bodies(document))
    assert len(found) > 100
    assert [name for name, media in found.items() if not examples_of(document, media)] == []
    for name, media in found.items():
        schema = {**schema_of(document, media), "components": document["components"]}
        Draft202012Validator.check_schema(schema)
        for example in examples_of(document, media):
            wrong = list(Draft202012Validator(schema).iter_errors(example))
            assert wrong == [], name


def test_the_example_of_an_answer_shows_all_its_fields(document: dict[str, Any]):
    """A schema does not require those that have a default."""
    for name, media in bodies(document):
        for example in examples_of(document, media):
            if " request " not in name and isinstance(example, dict):
                assert set(example) == set(schema_of(document, media)["properties"]), name


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
        assert nobody.get("/openapi.json").json()["info"]["title"] == "Proxima"
        assert nobody.get("/livez").json() == {"status": "ok"}
        assert nobody.get("/readyz").json() == {"status": "ok"}


def test_the_docs_are_there_without_a_way_to_the_internet(service: Running):
    with httpx.Client(base_url=service.url) as nobody:
        page = nobody.get("/docs").text
        assert "//" not in page, "no other host is named"
        links = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert len(links) == 3
        for link in links:
            assert nobody.get(link).status_code == 200, link
        [script] = [link for link in links if link.endswith(".js")]
        assert "SwaggerUIBundle" in nobody.get(script).text
        [document] = re.findall(r"url: '([^']+)'", page)
        assert nobody.get(document).json()["openapi"]


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
