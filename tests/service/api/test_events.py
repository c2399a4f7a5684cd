"""What a job says, over HTTP: pages, streams, metrics, samples, and its log."""

from __future__ import annotations

import csv
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.store import transitions
from tests.service.api.running import DEADLINE, Running, issue_at, make_job, problem, said
from tests.worker.waiting import until

STREAM = {"Accept": "text/event-stream"}
STREAMS = 24


@pytest.fixture
def job_id(client: httpx.Client) -> str:
    return str(make_job(client)["id"])


def frames(answer: httpx.Response) -> Iterator[dict[str, str]]:
    """The events of a stream, field by field; comments and the retry time are no events."""
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
        name, _, value = line.partition(": ")
        if line and name in ("event", "data", "id"):
            fields[name] = value
        elif not line and fields:
            yield fields
            fields = {}


def ids(found: list[dict[str, str]]) -> list[int]:
    return [int(frame["id"]) for frame in found]


def test_pages_of_events(client: httpx.Client, service: Running, job_id: str):
    fence = service.claim(job_id)
    service.say(fence, said("started", 0), *[said("metrics", update, {"kl": 0.1}) for update in range(1, 6)])
    url = f"/v1/jobs/{job_id}/events"
    page = client.get(url, params={"limit": 3}).json()
    assert ([event["seq"] for event in page["data"]], page["has_more"]) == ([1, 2, 3], True)
    page = client.get(url, params={"after": 3, "limit": 100}).json()
    assert ([event["seq"] for event in page["data"]], page["has_more"]) == ([4, 5, 6, 7, 8], False)
    event = page["data"][-1]
    assert (event["key"], event["type"], event["attempt"], event["update"], event["data"]) == (
        "metrics:5",
        "metrics",
        1,
        5,
        {"kl": 0.1},
    )
    assert event["created_at"] == "2023-11-14T22:13:20Z"
    chosen = client.get(url, params={"type": ["state", "started"]}).json()["data"]
    assert [event["type"] for event in chosen] == ["state", "state", "started"]


@pytest.mark.parametrize(
    "query", ["after=-1", "after=x", "after=99999999999999999999", "limit=0", "limit=1001", "x=1"]
)
def test_a_wrong_page_is_named(client: httpx.Client, job_id: str, query: str):
    name, _, value = query.partition("=")
    assert f'"{value}" given' in issue_at(client.get(f"/v1/jobs/{job_id}/events?{query}"), name)


def test_a_stream_replays_then_follows_and_ends_with_the_job(
    client: httpx.Client, service: Running, job_id: str
):
    fence = service.claim(job_id)
    service.say(fence, said("started", 0))
    with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-request-id"]
        stream = frames(answer)
        first = [next(stream) for _ in range(3)]
        assert [(frame["event"], frame["id"]) for frame in first] == [
            ("state", "1"),
            ("state", "2"),
            ("started", "3"),
        ]
        service.say(fence, said("metrics", 1, {"reward": 0.5, "kl": "NaN"}))
        live = next(stream)
        page = client.get(f"/v1/jobs/{job_id}/events?after=3").json()["data"]
        assert [json.loads(live["data"])] == page  # the same JSON
        service.settle(transitions.succeed, fence)
        assert [json.loads(frame["data"])["data"]["state"] for frame in stream] == ["succeeded"]


def test_a_stream_goes_on_after_the_last_event_one_has(client: httpx.Client, service: Running, job_id: str):
    fence = service.claim(job_id)
    service.say(fence, *[said("metrics", update) for update in range(1, 1200)])
    service.settle(transitions.succeed, fence)
    url = f"/v1/jobs/{job_id}/events"

    def heard(headers: dict[str, str], **query: Any) -> list[dict[str, str]]:
        with client.stream("GET", url, headers=STREAM | headers, params=query) as answer:
            return list(frames(answer))

    last = 1202  # two states before, one after
    assert ids(heard({})) == list(range(1, last + 1))
    assert ids(heard({"Last-Event-ID": "1100"})) == list(range(1101, last + 1))
    assert ids(heard({}, after=1200)) == [1201, 1202]
    assert ids(heard({"Last-Event-ID": "1201"}, after=5)) == [1202]  # a browser reconnects to the same URL
    assert ids(heard({"Last-Event-ID": ""}, after=1200)) == [1201, 1202]  # the id of nothing
    assert [frame["event"] for frame in heard({}, type="state")] == ["state"] * 3


def test_a_stream_that_is_at_its_end_is_not_asked_for_again(
    client: httpx.Client, service: Running, job_id: str
):
    fence = service.claim(job_id)
    service.say(fence, said("metrics", 1))
    url = f"/v1/jobs/{job_id}/events"

    def status(headers: dict[str, str], **query: Any) -> int:
        with client.stream("GET", url, headers=STREAM | headers, params=query) as answer:
            return answer.status_code

    assert status({"Last-Event-ID": "3"}) == 200  # the job goes on
    service.settle(transitions.succeed, fence)
    assert status({"Last-Event-ID": "3"}) == 200
    # A browser goes on asking after 200, and stops at 204.
    assert status({"Last-Event-ID": "4"}) == status({}, after=4) == 204
    assert status({"Last-Event-ID": "3"}, type="metrics") == 204
    assert client.get(f"{url}?after=4").json()["data"] == []


def test_an_event_that_has_not_happened_is_not_waited_behind(
    client: httpx.Client, service: Running, job_id: str
):
    url = f"/v1/jobs/{job_id}/events"
    answer = client.get(url, headers=STREAM | {"Last-Event-ID": "2"})
    assert '"2" given; the newest event of this job is 1' in issue_at(answer, "Last-Event-ID")
    answer = client.get(url, headers=STREAM, params={"after": 7})
    assert "the newest event of this job is 1" in issue_at(answer, "after")
    service.settle(transitions.succeed, service.claim(job_id))
    answer = client.get(url, headers=STREAM | {"Last-Event-ID": "4"})
    assert "the newest event of this job is 3" in issue_at(answer, "Last-Event-ID")


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "1.0", "+1", "1e0", "99999999999999999999"])
def test_a_last_event_id_that_is_no_number(client: httpx.Client, job_id: str, value: str):
    url = f"/v1/jobs/{job_id}/events"
    answer = client.get(url, headers=STREAM | {"Last-Event-ID": value})
    assert f'"{value}" given' in issue_at(answer, "Last-Event-ID")
    assert client.get(url, headers={"Last-Event-ID": value}).status_code == 200  # pages do not use it


def test_a_stream_ends_when_its_job_is_deleted(client: httpx.Client, service: Running, job_id: str):
    with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as answer:
        stream = frames(answer)
        next(stream)
        client.post(f"/v1/jobs/{job_id}/cancel")
        assert json.loads(next(stream)["data"])["data"]["state"] == "cancelled"
        assert list(stream) == []


def test_a_client_that_leaves_is_forgotten(client: httpx.Client, service: Running, job_id: str):
    with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as answer:
        stream = frames(answer)
        next(stream)
        assert service.listeners >= 1
    until(lambda: service.listeners == 0, "the end of the subscription")


def test_many_streams_of_several_jobs(client: httpx.Client, service: Running):
    """More of them than the database has connections, which are free for others meanwhile."""
    jobs = [make_job(client)["id"] for _ in range(3)]
    fences = {job_id: service.claim(job_id) for job_id in jobs}
    heard: dict[int, list[dict[str, str]]] = {}
    open_streams = threading.Barrier(STREAMS + 1)

    def listen(number: int, job_id: str) -> None:
        with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as answer:
            open_streams.wait()
            heard[number] = list(frames(answer))

    threads = [
        threading.Thread(target=listen, args=(number, jobs[number % 3]), daemon=True)
        for number in range(STREAMS)
    ]
    for thread in threads:
        thread.start()
    open_streams.wait(DEADLINE)
    assert service.listeners >= STREAMS
    assert client.get(f"/v1/jobs/{jobs[0]}").json()["state"] == "running"
    for number, (job_id, fence) in enumerate(fences.items()):
        service.say(fence, *[said("metrics", update, {"of": job_id}) for update in range(1, 4 + number)])
        service.settle(transitions.succeed, fence)
    for thread in threads:
        thread.join(DEADLINE)
    for number in range(STREAMS):
        job_id = jobs[number % 3]
        assert ids(heard[number]) == list(range(1, 7 + number % 3))
        assert {json.loads(f["data"])["data"].get("of", job_id) for f in heard[number]} == {job_id}


def test_a_form_nobody_has(client: httpx.Client, job_id: str):
    answer = client.get(f"/v1/jobs/{job_id}/events", headers={"Accept": "text/html"})
    assert "application/json, text/event-stream" in problem(answer, 406, "not_acceptable")["detail"]


# Metrics ---------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(service: Running, job_id: str) -> str:
    """A job that said metrics of five updates, the third twice, since it was resumed."""
    fence = service.claim(job_id)
    service.say(fence, *[said("metrics", update, {"kl": update / 10, "a,b": 1}) for update in range(1, 4)])
    service.write(lambda session: transitions.requeue(session, fence, "lost", True))
    fence = service.claim(job_id)
    again = said("metrics", 3, {"kl": "NaN"}).model_copy(update={"key": "metrics:a2:3"})
    service.say(fence, again, said("metrics", 4, {"kl": 0.4, "late": 1}), said("metrics", 5, {"kl": 0.5}))
    return job_id


def test_metrics_are_those_of_the_last_attempt_at_each_update(client: httpx.Client, measured: str):
    page = client.get(f"/v1/jobs/{measured}/metrics").json()
    assert page == {
        "object": "list",
        "data": [
            {"update": 1, "metrics": {"kl": 0.1, "a,b": 1}},
            {"update": 2, "metrics": {"kl": 0.2, "a,b": 1}},
            {"update": 3, "metrics": {"kl": "NaN"}},
            {"update": 4, "metrics": {"kl": 0.4, "late": 1}},
            {"update": 5, "metrics": {"kl": 0.5}},
        ],
        "has_more": False,
    }


def test_metrics_are_chosen_and_paged(client: httpx.Client, measured: str):
    page = client.get(f"/v1/jobs/{measured}/metrics?names=late,kl&after=2&limit=2").json()
    assert page["data"] == [
        {"update": 3, "metrics": {"kl": "NaN"}},
        {"update": 4, "metrics": {"late": 1, "kl": 0.4}},
    ]
    assert page["has_more"]


def test_metrics_as_csv(client: httpx.Client, measured: str):
    answer = client.get(f"/v1/jobs/{measured}/metrics", headers={"Accept": "text/csv"})
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.reader(io.StringIO(answer.text, newline="")))
    assert rows == [
        ["update", "kl", "a,b"],
        ["1", "0.1", "1"],
        ["2", "0.2", "1"],
        ["3", "NaN", ""],
        ["4", "0.4", ""],
        ["5", "0.5", ""],
    ]
    part = client.get(f"/v1/jobs/{measured}/metrics?names=kl&limit=4", headers={"Accept": "text/csv"})
    assert part.text.splitlines()[0] == "update,kl"
    following = client.get(part.links["next"]["url"], headers={"Accept": "text/csv"})
    assert following.text == "update,kl\r\n5,0.5\r\n"
    assert "next" not in following.links


@pytest.mark.parametrize(
    ("query", "header"),
    [
        ("", ["update", "kl", "a,b"]),
        ("names=late,kl", ["update", "late", "kl"]),
        ("names=kl&names=unknown&names=late", ["update", "kl", "unknown", "late"]),
        ("names=kl&names=kl,late,kl", ["update", "kl", "late"]),
    ],
)
def test_parts_of_a_csv_fit_together(client: httpx.Client, measured: str, query: str, header: list[str]):
    """Whichever metrics the updates of a part have."""
    url, rows = f"/v1/jobs/{measured}/metrics?limit=2&{query}", []
    while url:
        answer = client.get(url, headers={"Accept": "text/csv"})
        part = list(csv.reader(io.StringIO(answer.text, newline="")))
        assert part[0] == header
        rows += [dict(zip(header, row, strict=True)) for row in part[1:]]
        url = answer.links.get("next", {}).get("url", "")
    assert [row["update"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert [row["kl"] for row in rows] == ["0.1", "0.2", "NaN", "0.4", "0.5"]
    assert [row["late"] for row in rows if "late" in row] == ["", "", "", "1", ""] * ("late" in header)
    assert {row["unknown"] for row in rows if "unknown" in row} <= {""}


def test_a_csv_of_nothing_yet(client: httpx.Client, job_id: str):
    answer = client.get(f"/v1/jobs/{job_id}/metrics", headers={"Accept": "text/csv"})
    assert answer.text == "update\r\n"


def test_a_part_is_small_enough_for_others_to_be_served(client: httpx.Client, job_id: str):
    assert "1000" in issue_at(client.get(f"/v1/jobs/{job_id}/metrics?limit=1001"), "limit")


# Samples and logs ------------------------------------------------------------------------------------------


def test_samples_by_update(client: httpx.Client, service: Running, job_id: str):
    sample = {"prompt": "a", "response": "b", "score": 1.0}
    service.say(
        service.claim(job_id), *[said("samples", update, {"samples": [sample]}) for update in (1, 5, 9)]
    )
    page = client.get(f"/v1/jobs/{job_id}/samples?after=1&limit=1").json()
    assert page == {"object": "list", "data": [{"update": 5, "samples": [sample]}], "has_more": True}


def test_the_tail_of_the_log(client: httpx.Client, service: Running, job_id: str):
    url = f"/v1/jobs/{job_id}/logs"
    assert client.get(url).text == ""
    fence = service.claim(job_id)
    service.store_files(fence, "log", 0, {"engine.log": "first ü\nsecond\nthird\n".encode()})
    answer = client.get(url)
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text == "first ü\nsecond\nthird\n"
    assert client.get(url, params={"tail": 9}).text == "third\n"
    assert client.get(url, params={"tail": 6}).text == "third\n"
    assert client.get(url, params={"tail": 3}).text == "rd\n"  # a cut line is more than nothing
    assert "given" in issue_at(client.get(url, params={"tail": 0}), "tail")


@pytest.mark.parametrize(("tail", "text"), [(4, "üll"), (3, "ll"), (2, "ll"), (1, "l")])
def test_the_tail_of_a_log_of_one_line(
    client: httpx.Client, service: Running, job_id: str, tail: int, text: str
):
    service.store_files(service.claim(job_id), "log", 0, {"engine.log": "half a line: üll".encode()})
    assert client.get(f"/v1/jobs/{job_id}/logs", params={"tail": tail}).text == text
