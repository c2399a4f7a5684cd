"""Every way in which a reward can be wrong at submit: its field, what was given, the rule, and the fix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import httpx
import pytest

from ppo_engine import reward_kinds
from ppo_engine.json_schemas import MAX_CHARACTERS
from ppo_engine.spec import parse
from tests.service.api.running import Running, demand, spec, upload

JSON = {"Content-Type": "application/json"}
URL = "https://rewards.example.com/score"
DRAFT_7 = "http://json-schema.org/draft-07/schema#"
PASSWORD = "hunter2"

Case = tuple[dict[str, Any], tuple[str | int, ...], str, str, str]


def http(*where: str | int, given: str, rule: str, fix: str, **fields: Any) -> Case:
    return {"type": "http", "url": URL, **fields}, where, given, rule, fix


def schema(held: Any, *where: str | int, given: str, rule: str, fix: str) -> Case:
    return {"type": "json_schema", "schema": held}, ("schema", *where), given, rule, fix


def likeness(*where: str | int, given: str, rule: str, fix: str, **fields: Any) -> Case:
    return {"type": "text_similarity", **fields}, where, given, rule, fix


CASES: dict[str, Case] = {
    # The server
    "no URL": ({"type": "http"}, ("url",), "Nothing given", "is required", "add it"),
    "another scheme": http(
        "url", url="ftp://a.example/x", given='"ftp:', rule="by http or https", fix="https://"
    ),
    "a file": http("url", url="file:///etc/passwd", given='"file:', rule="by http or https", fix="https://"),
    "no scheme": http("url", url="a.example/x", given='"a.example', rule="by http or https", fix="https://"),
    "no host": http(
        "url", url="https:///x", given='"https:///x', rule="by http or https", fix="https://HOST"
    ),
    "a space": http("url", url="https://a.example/a b", given='a b"', rule="no spaces", fix="encode"),
    "a line": http("url", url="https://a.example/\r\nX: y", given="\\r\\n", rule="no spaces", fix="encode"),
    "umlauts": http("url", url="https://bücher.example/", given="bücher", rule="ASCII", fix="encode"),
    "a port too high": http(
        "url", url="https://a.example:99999/", given="99999", rule="no URL", fix="correct it"
    ),
    "port 0": http("url", url="https://a.example:0/", given=":0", rule="host or port", fix="correct it"),
    "brackets": http("url", url="https://[::1/", given="[::1", rule="no URL", fix="correct it"),
    "a long label": http(
        "url", url=f"https://{'a' * 64}.example/", given="aaa", rule="host", fix="correct it"
    ),
    "a fragment": http("url", url=URL + "#x", given="#x", rule="never sent", fix="leave it out"),
    "a long URL": http("url", url=URL + "x" * 2048, given="rewards", rule="at most 2048", fix="shorten"),
    "a password": http(
        "url",
        url=f"https://me:{PASSWORD}@a.example/",
        given="password given",
        rule="no secrets",
        fix="signing_key",
    ),
    "a password in what is no URL": http(
        "url",
        url=f"https://me:{PASSWORD}@a.example:99999/",
        given="password given",
        rule="no secrets",
        fix="signing_key",
    ),
    "a key in the query": http(
        "url",
        url=f"{URL}?api_key={PASSWORD}",
        given="secret in its query given",
        rule="holds none",
        fix="signing_key",
    ),
    "a cloud's own address": http(
        "url", url="http://169.254.169.254/latest", given="169.254", rule="link-local", fix="of a server"
    ),
    "the same, in other words": http(
        "url", url="http://[::ffff:a9fe:a9fe]/", given="::ffff", rule="link-local", fix="of a server"
    ),
    "no address": http(
        "url", url="http://0.0.0.0:8000/", given="0.0.0.0", rule="reserved", fix="of a server"
    ),
    "a multicast address": http(
        "url", url="http://[ff02::1]/", given="ff02", rule="multicast", fix="of a server"
    ),
    "no rows": http("batch_size", batch_size=0, given="0 given", rule="or equal to 1", fix="give 1 or more"),
    "many rows": http("batch_size", batch_size=5000, given="5000", rule="or equal to 4096", fix="or less"),
    "no requests": http("concurrency", concurrency=0, given="0 given", rule="or equal to 1", fix="give 1"),
    "no time": http("timeout", timeout=0, given="0 given", rule="or equal to 0.1", fix="give 0.1 or more"),
    "long waits": http("timeout", timeout=3600, given="3600", rule="or equal to 300", fix="give 300 or less"),
    "many retries": http(
        "retries", retries=11, given="11 given", rule="or equal to 10", fix="give 10 or less"
    ),
    "less than none": http(
        "retries", retries=-1, given="-1 given", rule="or equal to 0", fix="give 0 or more"
    ),
    "half a retry": http("retries", retries=1.5, given="1.5", rule="valid integer", fix="a whole number"),
    "a fallback in quotes": http(
        "fallback", fallback="0", given='"0"', rule="valid number", fix="without quotes"
    ),
    "a fallback without end": http(
        "fallback", fallback=1e10, given="10000000000", rule="equal to 1000000000", fix="or less"
    ),
    "a key as it is": http(
        "signing_key", signing_key="whsec_x", given="whsec_x", rule="JSON object", fix="in braces"
    ),
    "a key's name in small": http(
        "signing_key",
        "secret",
        signing_key={"secret": "judge"},
        given='"judge"',
        rule="in capitals",
        fix="give the name",
    ),
    "a key's value": http(
        "signing_key",
        "value",
        signing_key={"secret": "JUDGE", "value": "x"},
        given='"x"',
        rule="unknown field",
        fix="remove",
    ),
    # Schemas
    "no schema": ({"type": "json_schema"}, ("schema",), "Nothing given", "is required", "add it"),
    "a schema as text": schema("{}", given='"{}"', rule="JSON object", fix="in braces"),
    "no type of JSON": schema({"type": "text"}, "type", given='"text"', rule="enum", fix="correct it"),
    "a wrong keyword inside": schema(
        {"properties": {"a": {"required": "b"}}},
        "properties",
        "a",
        "required",
        given='"b"',
        rule="array",
        fix="correct",
    ),
    "another dialect": schema(
        {"$schema": DRAFT_7}, "$schema", given="draft-07", rule="2020-12", fix="leave it out"
    ),
    "a reference elsewhere": schema(
        {"items": {"$ref": "http://169.254.169.254/"}},
        "items",
        "$ref",
        given="169.254",
        rule="none is fetched",
        fix="#/$defs",
    ),
    "a reference in a circle": schema(
        {"$ref": "#"}, "$ref", given='"#"', rule="back to itself", fix="inside of"
    ),
    "a pattern that is none": schema(
        {"pattern": "("}, "pattern", given='"("', rule="not a regular", fix="correct"
    ),
    "a pattern that explodes": schema(
        {"pattern": "((a{999}){999}){999}"}, "pattern", given="a{999}", rule="written out", fix="less often"
    ),
    "what looks again": schema(
        {"unevaluatedItems": False},
        "unevaluatedItems",
        given="false",
        rule="not taken",
        fix="additionalProperties",
    ),
    "a long schema": schema(
        {"const": "x" * MAX_CHARACTERS}, given="xxx", rule=f"{MAX_CHARACTERS} characters", fix="shorten"
    ),
    "a match in quotes": (
        {"type": "json_schema", "schema": {}, "match": "1"},
        ("match",),
        '"1"',
        "valid number",
        "without quotes",
    ),
    # Likeness
    "no reference": likeness("reference", given="null and column null", rule="exactly one", fix="give"),
    "both": likeness(
        "reference", reference="a", column="label", given='"a" and', rule="exactly one", fix="give"
    ),
    "no such metric": likeness(
        "metric", metric="meteor", column="label", given='"meteor"', rule="'rouge_l'", fix="one of"
    ),
    "no such column": likeness("column", column="none", given='"none"', rule="prompts", fix="column"),
    "nothing to fall back from": likeness(
        "fallback", reference="a", fallback=0.5, given="0.5 given", rule="every row", fix="leave it out"
    ),
    # Options that would do nothing
    "a length does not fail": (
        {"type": "length", "target": 4, "fallback": 0.0},
        ("fallback",),
        "0.0 given",
        "unknown field",
        "remove it",
    ),
    "a pattern does not change its mind": (
        {"type": "regex", "pattern": "a", "retries": 3},
        ("retries",),
        "3 given",
        "unknown field",
        "remove it",
    ),
    "a plug-in's weight in quotes": (
        {"type": "plugin", "plugin": "cheerful", "weight": "1"},
        ("weight",),
        '"1"',
        "valid number",
        "without quotes",
    ),
    "no plug-in": ({"type": "plugin"}, ("plugin",), "Nothing given", "is required", "add it"),
    "no such kind": ({"type": "grader"}, (), "given", "'http'", "give one of these"),
}


@pytest.fixture(scope="module")
def sender(service: Running) -> Iterator[tuple[httpx.Client, str]]:
    with service.client() as client:
        yield client, upload(client)


@pytest.mark.parametrize("name", CASES)
def test_a_bad_reward_is_refused_with_all_that_helps(sender: tuple[httpx.Client, str], name: str) -> None:
    client, file_id = sender
    reward, where, given, rule, fix = CASES[name]
    content = json.dumps({"spec": spec(file_id, rewards=[{"name": "x", **reward}])})
    job, estimate = (
        client.post(route, content=content, headers=JSON) for route in ("/v1/jobs", "/v1/jobs/estimate")
    )
    demand(job, 422, "invalid_request", ("spec", "rewards", 0, *where), given, rule, fix)
    assert estimate.json()["issues"] == job.json()["issues"]
    assert PASSWORD not in job.text


def test_schemas_are_long_together(sender: tuple[httpx.Client, str]) -> None:
    client, file_id = sender
    half = {"const": "x" * (MAX_CHARACTERS // 2)}
    rewards = [{"type": "json_schema", "name": name, "schema": half} for name in "ab"]
    answer = client.post("/v1/jobs", json={"spec": spec(file_id, rewards=rewards)})
    loc = ("spec", "rewards", 1, "schema")
    demand(answer, 422, "invalid_request", loc, "xxx", "the schemas of a run", "shorten them")


def examples() -> list[dict[str, Any]]:
    """Of each kind, as the documentation shows it."""
    union = get_args(reward_kinds.Reward)[0]
    return [kind.model_config["json_schema_extra"]["examples"][0] for kind in get_args(union)]


def test_each_kind_has_an_example_that_is_right(service: Running) -> None:
    document = httpx.get(f"{service.url}/openapi.json").json()
    for example in examples():
        assert any(
            shown.get("examples") == [example] for shown in document["components"]["schemas"].values()
        ), example["type"]
        adapter = {
            "method": {"type": "lora", "adapters": {"liked": {"type": "local", "path": "a"}}},
            "ppo": {"reward_adapter_name": "liked"},
        }
        parts = adapter if example["type"] == "adapter" else {}
        parse(
            {
                "model": {"type": "local", "path": "m"},
                "prompts": {"train": "p"},
                "rewards": [example],
                **parts,
            }
        )


def test_a_job_may_name_a_private_address_which_the_worker_then_judges(
    sender: tuple[httpx.Client, str],
) -> None:
    client, file_id = sender
    rewards = [{"type": "http", "name": "x", "url": "http://10.0.0.7:8080/score?team=a"}]
    answer = client.post("/v1/jobs", json={"spec": spec(file_id, rewards=rewards)})
    assert answer.status_code == 201
    assert answer.json()["spec"]["rewards"][0] == {
        **rewards[0],
        "weight": 1.0,
        "fallback": None,
        "retries": 2,
        "batch_size": 64,
        "concurrency": 4,
        "timeout": 30.0,
        "signing_key": None,
    }
