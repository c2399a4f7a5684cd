"""Jobs over HTTP: the whole life of one, lists, keys of idempotency, and what is refused."""

from __future__ import annotations

import asyncio
import json
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from obstore.exceptions import GenericError
from sqlalchemy import func, select, update

from ppo_engine.issues import MAX_ISSUES
from ppo_engine.spec import RunSpec, parse
from service import background
from service.api.bodies import REPEATABLE
from service.settings import Settings
from service.storage import Storage
from service.store import transitions
from service.store.models import Base, Deletion
from service.store.session import Store
from service.store.types import moment
from service.sweep import sweep
from tests.conftest import NewDatabase
from tests.service.api.running import (
    MAX_BODY,
    Running,
    issue_at,
    make_job,
    problem,
    serving,
    spec,
    upload,
)
from tests.worker.waiting import eventually, until


def test_a_job_is_made_and_found(client: httpx.Client):
    file_id = upload(client)
    body = {"name": "first", "spec": spec(file_id), "metadata": {"team": "red", "ü": ""}}
    answer = client.post("/v1/jobs", json=body)
    assert answer.status_code == 201
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert client.get(answer.headers["location"]).json() == job
    assert (job["object"], job["state"], job["wanted"], job["attempt"]) == ("job", "queued", "run", 0)
    assert (job["name"], job["metadata"]) == ("first", {"team": "red", "ü": ""})
    assert (job["started_at"], job["finished_at"], job["error"], job["update"]) == (None, None, None, 0)
    assert datetime.fromisoformat(job["created_at"]).utcoffset() is not None
    assert job["created_at"].endswith("Z")
    lengths = {"overlong": "refuse", "max_length": None}
    assert job["spec"]["prompts"] == {"train": file_id, "eval": None, **lengths}
    assert job["spec"]["ppo"]["kl_coef"] == 0.05  # defaults are filled in
    assert job["total_updates"] == job["plan"]["num_total_batches"] == 8
    assert job["plan"]["parameters_trained"] > 0  # the model was seen


def test_the_first_event_says_that_it_is_queued(client: httpx.Client):
    events = client.get(f"/v1/jobs/{make_job(client)['id']}/events").json()
    assert [(event["seq"], event["type"], event["data"]["state"]) for event in events["data"]] == [
        (1, "state", "queued")
    ]


def test_an_estimate_has_every_number_and_is_the_plan_of_the_job(client: httpx.Client):
    raw = spec(upload(client), method={"type": "full"}, resources={"gpus": 2})
    plan = client.post("/v1/jobs/estimate", json={"spec": raw}).json()
    memory = plan.pop("memory")
    warnings = plan.pop("warnings")
    trained = plan.pop("parameters_trained")
    assert plan == {
        "world_size": 2,
        "batch_size": 16,
        "local_batch_size": 8,
        "micro_batch_size": 16,
        "mini_batch_size": 16,
        "local_mini_batch_size": 8,
        "total_episodes": 64,
        "num_total_batches": 4,
        "optimizer_steps": 16,
    }
    # The policy's 688 weights of `make_model`, and a critic as large, with a head instead of output layers.
    assert trained > 2 * 688
    assert set(memory) >= {"policy", "reference", "value", "gradients", "optimizer"}
    assert all(isinstance(count, int) and count > 0 for count in memory.values())
    assert memory["policy"] == memory["reference"] == 688 * 4
    assert memory["gradients"] == trained * 4
    assert memory["optimizer"] == 2 * memory["gradients"]
    [warning] = warnings
    assert "No stop token" in warning
    job = client.post("/v1/jobs", json={"spec": raw}).json()
    assert job["plan"] == plan | {"memory": memory, "warnings": warnings, "parameters_trained": trained}


def test_an_estimate_stores_nothing(client: httpx.Client, service: Running):
    raw = spec(upload(client))
    before = everything_kept(service)
    for body in (raw, spec("file_nothing"), spec(raw["prompts"]["train"], ppo={"gamma": 2})):
        client.post("/v1/jobs/estimate", json={"spec": body}, headers={"Idempotency-Key": "estimated"})
    assert everything_kept(service) == before
    assert before["files"] > 0  # it is looked at what is kept


def everything_kept(service: Running) -> dict[str, int]:
    """How many rows each table has, and how many files storage and the broker have."""

    async def count(store: Store) -> dict[str, int]:
        async with store.read() as session:
            return {
                table.name: await session.scalar(select(func.count()).select_from(table)) or 0
                for table in Base.metadata.sorted_tables
            }

    on_disk = [
        path for path in service.settings.data_dir.rglob("*") if path.suffix not in (".db-wal", ".db-shm")
    ]
    return service.with_store(count) | {"on disk": len(on_disk)}


def test_a_spec_is_shown_as_it_was_written(client: httpx.Client, service: Running, models: Path):
    file_id = upload(client)
    critic = {"type": "model", "source": {"type": "local", "path": "tiny"}}
    for path in ("tiny", str(models / "tiny")):
        raw = spec(file_id, model={"type": "local", "path": path}, method={"type": "full", "value": critic})
        job = client.post("/v1/jobs", json={"spec": raw}).json()
        assert job["spec"]["model"]["path"] == path
        assert job["spec"]["method"]["value"] == critic
        assert job["plan"]["parameters_trained"] > 0, "it was found all the same"
        text = client.get(f"/v1/jobs/{job['id']}").text
        assert (str(models) in text) == (path != "tiny")


def test_lists_are_newest_first_and_paged_by_the_last_id(client: httpx.Client):
    made = [make_job(client)["id"] for _ in range(5)]
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = client.get("/v1/jobs", params=query).json()
        seen += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            break
        query["after"] = seen[-1]
    assert seen == made[::-1]


def test_lists_are_filtered_by_state(client: httpx.Client):
    first, second = make_job(client)["id"], make_job(client)["id"]
    client.post(f"/v1/jobs/{first}/cancel")

    def listed(state: str) -> list[str]:
        return [job["id"] for job in client.get("/v1/jobs", params={"state": state}).json()["data"]]

    assert (listed("cancelled"), listed("queued"), listed("running")) == ([first], [second], [])
    assert "Input should be 'queued'" in issue_at(client.get("/v1/jobs?state=lost"), "state")


def test_a_list_is_deleted_page_by_page(client: httpx.Client):
    made = [make_job(client)["id"] for _ in range(5)]
    query: dict[str, Any] = {"limit": 2}
    deleted: list[str] = []
    while True:
        page = client.get("/v1/jobs", params=query).json()
        for job in page["data"]:
            client.post(f"/v1/jobs/{job['id']}/cancel")
            assert client.delete(f"/v1/jobs/{job['id']}").status_code == 200
            deleted.append(job["id"])
        if not page["has_more"]:
            break
        query["after"] = deleted[-1]
    assert deleted == made[::-1]


def test_a_cursor_of_another_list_is_refused(client: httpx.Client, service: Running):
    file_id = upload(client)
    with service.client() as stranger:
        foreign = make_job(stranger)["id"]
    for cursor in (
        file_id,
        foreign,
        file_id.replace("file", "key"),
        "job_nothing",
        f"job_{'0' * 33}",
        "\x00",
    ):
        document = problem(client.get("/v1/jobs", params={"after": cursor}), 400, "unknown_cursor")
        assert document["issues"][0]["loc"] == ["after"]
        assert repr(cursor) in document["detail"]
        assert "give the id of the last item" in document["detail"]


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "sort=name"])
def test_a_wrong_query_is_named(client: httpx.Client, query: str):
    name, _, value = query.partition("=")
    assert f'"{value}" given' in issue_at(client.get(f"/v1/jobs?{query}"), name)


def test_a_waiting_job_is_cancelled_at_once_and_again_without_harm(client: httpx.Client):
    job = make_job(client)
    cancelled = client.post(f"/v1/jobs/{job['id']}/cancel").json()
    assert (cancelled["state"], cancelled["wanted"]) == ("cancelled", "cancel")
    assert cancelled["finished_at"] is not None
    assert client.post(f"/v1/jobs/{job['id']}/cancel").json() == cancelled


def test_a_running_job_is_asked_to_stop(client: httpx.Client, service: Running):
    job = make_job(client)
    fence = service.claim(job["id"])
    wished = client.post(f"/v1/jobs/{job['id']}/cancel").json()
    assert (wished["state"], wished["wanted"]) == ("running", "cancel")
    service.settle(transitions.cancelled, fence)
    assert client.get(f"/v1/jobs/{job['id']}").json()["state"] == "cancelled"


def test_a_finished_job_cannot_be_cancelled(client: httpx.Client, service: Running):
    job = make_job(client)
    service.settle(transitions.succeed, service.claim(job["id"]))
    answer = client.post(f"/v1/jobs/{job['id']}/cancel")
    document = problem(answer, 409, "wrong_state")
    assert answer.headers["x-should-retry"] == "false"
    assert job["id"] in document["detail"]
    assert "succeeded" in document["detail"]


def test_a_failed_job_tells_why(client: httpx.Client, service: Running):
    job = make_job(client)
    service.settle(transitions.fail, service.claim(job["id"]), "crash", "It broke.", "last words")
    error = client.get(f"/v1/jobs/{job['id']}").json()["error"]
    assert error == {"code": "crash", "message": "It broke.", "log_tail": "last words", "issues": []}


def test_only_a_job_that_is_over_is_deleted(client: httpx.Client, service: Running):
    job = make_job(client)
    for state in ("queued", "running"):
        if state == "running":
            fence = service.claim(job["id"])
        answer = client.delete(f"/v1/jobs/{job['id']}")
        assert f"is {state} and cannot be deleted" in problem(answer, 409, "wrong_state")["detail"]
        assert answer.headers["x-should-retry"] == "false"
    client.post(f"/v1/jobs/{job['id']}/cancel")
    problem(client.delete(f"/v1/jobs/{job['id']}"), 409, "wrong_state")  # its worker still has it
    service.settle(transitions.cancelled, fence)
    assert client.delete(f"/v1/jobs/{job['id']}").json() == {
        "object": "job",
        "id": job["id"],
        "deleted": True,
    }
    problem(client.get(f"/v1/jobs/{job['id']}"), 404, "not_found")
    problem(client.delete(f"/v1/jobs/{job['id']}"), 404, "not_found")


def test_what_a_deleted_job_made_is_deleted_too(client: httpx.Client, service: Running):
    job = make_job(client)
    fence = service.claim(job["id"])
    service.store_files(fence, "export", 1, {"adapter_config.json": b"{}"})
    service.settle(transitions.succeed, fence)
    storage = service.settings.data_dir / "storage" / "jobs" / job["id"]
    assert storage.exists()
    client.delete(f"/v1/jobs/{job['id']}")
    until(lambda: not storage.exists(), "its bytes are gone")
    # Once more when no worker can have it any more: one that was stalled may have put something there.
    service.with_store(lambda store: eventually_one_deletion(store, f"jobs/{job['id']}/"))


async def eventually_one_deletion(store: Store, prefix: str) -> None:
    """Wait until one deletion of the prefix is left, which is due in a day."""

    async def look() -> bool:
        async with store.read() as session:
            due = list(await session.scalars(select(Deletion.due).where(Deletion.prefix == prefix)))
        return len(due) == 1 and timedelta(hours=23) < due[0] - datetime.now(UTC) < timedelta(hours=25)

    await eventually(look, "one deletion is left")


def test_a_deletion_waits_for_no_storage(
    client: httpx.Client, service: Running, monkeypatch: pytest.MonkeyPatch
):
    job = make_job(client)
    fence = service.claim(job["id"])
    service.store_files(fence, "export", 1, {"adapter_config.json": b"{}"})
    service.settle(transitions.succeed, fence)
    storage = service.settings.data_dir / "storage" / "jobs" / job["id"]
    back = threading.Event()

    async def away(self: Storage, prefix: str) -> None:
        while not back.is_set():
            await asyncio.sleep(0.01)
        raise GenericError("storage was away")

    monkeypatch.setattr(background, "REST_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete_prefix", away)
        assert client.delete(f"/v1/jobs/{job['id']}").status_code == 200
        problem(client.get(f"/v1/jobs/{job['id']}"), 404, "not_found")
        assert storage.exists()
        back.set()
    service.write(lambda session: session.execute(update(Deletion).values(due=moment(-1.0))))
    service.with_store(lambda store: sweep(store, Storage.open(service.settings.storage_url)))
    until(lambda: not storage.exists(), "its bytes are gone")


ROUTES = [
    ("GET", ""),
    ("DELETE", ""),
    ("POST", "/cancel"),
    ("GET", "/events"),
    ("GET", "/metrics"),
    ("GET", "/samples"),
    ("GET", "/logs"),
    ("GET", "/checkpoints"),
    ("GET", "/checkpoints/1"),
    ("GET", "/checkpoints/1/files/adapter_config.json"),
    ("GET", "/adapter"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_job_of_another_project_is_as_good_as_none(
    client: httpx.Client, service: Running, method: str, path: str
):
    job_id = make_job(client)["id"]
    with service.client() as stranger:
        for unknown in (job_id, "job_nothing", "%00", "%ff", "a" * 2000):
            answer = stranger.request(method, f"/v1/jobs/{unknown}{path}")
            assert "There is no job" in problem(answer, 404, "not_found")["detail"]
    assert client.get(f"/v1/jobs/{job_id}").json()["state"] == "queued"


def test_a_stream_of_a_job_of_another_project_is_refused_before_it_starts(
    client: httpx.Client, service: Running
):
    job_id = make_job(client)["id"]
    with service.client() as stranger:
        answer = stranger.get(f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"})
        assert "There is no job" in problem(answer, 404, "not_found")["detail"]


# Idempotency -----------------------------------------------------------------------------------------------


def test_a_repeated_request_gets_the_first_answer(client: httpx.Client):
    body = {"spec": spec(upload(client)), "name": "once"}
    headers = {"Idempotency-Key": "key-1"}
    first = client.post("/v1/jobs", json=body, headers=headers)
    client.post(f"/v1/jobs/{first.json()['id']}/cancel")
    again = client.post("/v1/jobs", content=json.dumps(body, indent=3), headers=headers | JSON)
    assert (again.status_code, again.json()) == (201, first.json())  # as it was then
    assert again.headers["location"] == first.headers["location"]
    assert (first.headers.get("idempotent-replayed"), again.headers["idempotent-replayed"]) == (None, "true")
    assert len(client.get("/v1/jobs").json()["data"]) == 1


JSON = {"Content-Type": "application/json"}


def test_a_key_with_another_body_is_refused(client: httpx.Client):
    body = {"spec": spec(upload(client))}
    headers = {"Idempotency-Key": "key-1"}
    client.post("/v1/jobs", json=body, headers=headers)
    other = {"spec": body["spec"] | {"resources": {"gpus": 1}}}
    for change in ({"name": "other"}, {"metadata": {"a": "b"}}, other):
        answer = client.post("/v1/jobs", json=body | change, headers=headers)
        document = problem(answer, 422, "idempotency_key_reused")
    assert document["issues"][0]["loc"] == ["Idempotency-Key"]
    assert "'key-1' was sent with another body" in document["detail"]
    assert "new key" in document["detail"]


def test_keys_belong_to_a_project(client: httpx.Client, service: Running):
    headers = {"Idempotency-Key": "shared"}
    with service.client() as stranger:
        ids = {
            one.post("/v1/jobs", json={"spec": spec(upload(one))}, headers=headers).json()["id"]
            for one in (client, stranger)
        }
    assert len(ids) == 2


def test_a_refused_request_keeps_no_answer(client: httpx.Client):
    file_id = upload(client)
    headers = {"Idempotency-Key": "key-1"}
    wrong = client.post("/v1/jobs", json={"spec": spec(file_id, ppo={"gamma": 2})}, headers=headers)
    assert wrong.status_code == 422
    assert client.post("/v1/jobs", json={"spec": spec(file_id)}, headers=headers).status_code == 201


def test_the_answer_stands_when_the_files_are_gone(client: httpx.Client):
    file_id = upload(client)
    body, headers = {"spec": spec(file_id)}, {"Idempotency-Key": "key-1"}
    job = client.post("/v1/jobs", json=body, headers=headers).json()
    client.post(f"/v1/jobs/{job['id']}/cancel")
    assert client.delete(f"/v1/files/{file_id}").status_code == 200
    assert client.post("/v1/jobs", json=body, headers=headers).json() == job
    assert client.post("/v1/jobs", json=body).status_code == 422


@pytest.mark.parametrize("key", ["", "with space", "ü", "x" * 256])
def test_a_key_that_cannot_be_one(client: httpx.Client, key: str):
    headers = {b"Idempotency-Key": key.encode()}
    answer = client.post("/v1/jobs", json={"spec": spec("file_1")}, headers=headers)
    assert "given" in issue_at(answer, "Idempotency-Key")


def test_two_requests_at_once_with_one_key_make_one_job(client: httpx.Client):
    body, headers = {"spec": spec(upload(client))}, {"Idempotency-Key": "race"}
    answers: list[httpx.Response] = []
    start = threading.Barrier(8)

    def post() -> None:
        start.wait()
        answers.append(client.post("/v1/jobs", json=body, headers=headers))

    threads = [threading.Thread(target=post) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = {answer.json()["id"] for answer in answers if answer.status_code == 201}
    assert len(made) == 1
    for answer in answers:
        if answer.status_code != 201:
            problem(answer, 409, "idempotency_in_flight")
            assert answer.headers["x-should-retry"] == "true"
    assert len(client.get("/v1/jobs").json()["data"]) == 1


# Bodies ----------------------------------------------------------------------------------------------------


def test_a_body_that_is_no_json(client: httpx.Client):
    answer = client.post("/v1/jobs", content=b'{"spec": ', headers=JSON)
    assert "No JSON given: Expecting value at character 9; correct it there" in issue_at(answer, "body")
    assert "is required" in issue_at(client.post("/v1/jobs", headers=JSON), "body")
    assert "[] given" in issue_at(client.post("/v1/jobs", json=[]), "body")
    unnamed = client.post("/v1/jobs", content=b"{}", headers={"Content-Type": "text/plain"})
    assert 'Content-Type "text/plain" given; send JSON' in issue_at(unnamed, "body")


@pytest.mark.parametrize("route", ["/v1/jobs", "/v1/jobs/estimate"])
def test_bodies_of_every_depth_are_refused_as_what_they_are(client: httpx.Client, route: str):
    headers = JSON | {"Idempotency-Key": "deep"}  # what is sent twice is digested first
    for depth in (*range(1, 70), *range(70, 900, 83), *range(900, 1101, 3)):
        deep = "[" * depth + "]" * depth
        for body, loc in (
            (f'{{"spec": {{"x": {deep}}}}}', ("spec", "x")),
            (f'{{"spec": {{}}, "metadata": {{"x": {deep}}}}}', ("metadata", "x")),
            (deep, ("body",)),
        ):
            answer = client.post(route, content=body, headers=headers)
            issues = problem(answer, 422, "invalid_request")["issues"]
            inner = depth if loc == ("body",) else depth + 2
            assert ("nested more than 64 deep" in answer.text) == (inner > 64), (depth, issues)
            # Where the parser gives up, nobody knows the place.
            assert inner <= 64 or issues[0]["loc"] in (["body"], [0, 0], list(loc)), (depth, issues)


def test_very_many_wrong_fields_take_no_time_and_are_counted(tmp_path: Path, new_sqlite: NewDatabase):
    wrong = {f"f{number}": number for number in range(60_000)}
    settings = Settings(data_dir=tmp_path, database_url=new_sqlite())
    with serving(settings) as running, running.client() as client:
        client.timeout = 30.0  # compared with each other, they took minutes
        for body in ({"spec": wrong}, wrong):
            issues = problem(client.post("/v1/jobs", json=body), 422, "invalid_request")["issues"]
            assert len(issues) == MAX_ISSUES + 1
            assert "more things are wrong" in issues[-1]["msg"]


def test_other_requests_are_answered_while_a_large_spec_is_read(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
):
    reading, answered = threading.Event(), threading.Event()

    def read(raw: object) -> RunSpec:
        reading.set()
        assert answered.wait(30)
        return parse(raw)

    monkeypatch.setattr("service.planning.parse", read)
    body = {"spec": spec(upload(client))}
    slow = threading.Thread(target=lambda: client.post("/v1/jobs/estimate", json=body))
    slow.start()
    assert reading.wait(30)
    assert client.get("/v1/jobs", timeout=10).status_code == 200
    answered.set()
    slow.join()


def test_a_query_says_nothing_twice_but_lists(client: httpx.Client):
    job_id = make_job(client)["id"]
    document = client.get("/openapi.json").json()
    repeatable = {
        parameter["name"]
        for path in document["paths"].values()
        for operation in path.values()
        for parameter in operation.get("parameters", ())
        if parameter["in"] == "query" and parameter["schema"].get("type") == "array"
    }
    assert repeatable == REPEATABLE
    assert client.get(f"/v1/jobs/{job_id}/events?type=state&type=metrics").status_code == 200
    issue_at(client.get(f"/v1/jobs/{job_id}/events?after=0&after=1"), "after")


def test_a_body_beyond_the_limit(client: httpx.Client):
    document = problem(client.post("/v1/jobs", json={"name": "x" * MAX_BODY}), 413, "too_large")
    assert f"{MAX_BODY} bytes are the most" in document["detail"]

    def chunks():
        for _ in range(100):
            yield b"x" * 1000

    # Without a declared length, it is counted.
    problem(client.post("/v1/jobs", content=chunks(), headers=JSON), 413, "too_large")


def test_unknown_fields_and_wrong_types_are_named_by_their_path(client: httpx.Client):
    body = {"spec": spec("file_1"), "nmae": "x", "name": 7, "metadata": {"a": 1, "": "x"}}
    answer = client.post("/v1/jobs", json=body)
    assert '"x" given for an unknown field; remove it' in issue_at(answer, "nmae")
    assert "7 given. Input should be a valid string" in issue_at(answer, "name")
    assert "1 given. Input should be a valid string" in issue_at(answer, "metadata", "a")
    assert '"" given. String should have at least 1 character' in issue_at(answer, "metadata", "")
    assert problem(answer, 422, "invalid_request")["error"]["param"] == "name"


@pytest.mark.parametrize(
    ("body", "loc", "given"),
    [
        ({"name": "a\0b"}, ("name",), "\\u0000"),
        ({"metadata": {"k": "\ud800"}}, ("metadata", "k"), "valid string"),
        ({"metadata": {"\ud800": "v"}}, ("metadata", "\ufffd\ufffd\ufffd"), "valid string"),
    ],
)
def test_text_no_database_keeps_is_refused(
    client: httpx.Client, body: dict[str, Any], loc: tuple[str, ...], given: str
):
    content = json.dumps({"spec": spec(upload(client))} | body)
    assert given in issue_at(client.post("/v1/jobs", content=content, headers=JSON), *loc)
