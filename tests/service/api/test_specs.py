"""Specs over HTTP: several things that are wrong at once, what is looked up, and that nothing makes it fail.

Each thing that can be wrong, and what is said of it, is in `test_bad_input.py`.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppo_engine.spec import RunSpec
from service.settings import Settings
from tests.conftest import NewDatabase
from tests.service.api.running import Running, issue_at, problem, serving, spec, upload

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


@pytest.fixture(scope="module")
def file_id(client: httpx.Client) -> str:
    return upload(client)


def test_every_issue_is_told_at_once(client: httpx.Client):
    raw = spec(upload(client), ppo={"total_episodes": 3, "num_mini_batches": 3, "kl_coeff": 1})
    assert issue_at(client.post("/v1/jobs", json={"spec": raw}), "spec", "ppo", "kl_coeff")
    del raw["ppo"]["kl_coeff"]
    answer = client.post("/v1/jobs", json={"spec": raw})
    assert issue_at(answer, "spec", "ppo", "total_episodes")
    assert issue_at(answer, "spec", "ppo", "num_mini_batches")


def test_files_and_models_that_are_not_there_are_told_together(client: httpx.Client):
    raw = spec("file_none", model={"type": "local", "path": "/etc"})
    raw["prompts"]["eval"] = "file_nor_this"
    answer = client.post("/v1/jobs", json={"spec": raw})
    assert '"file_none" given; this project has no such file' in issue_at(answer, "spec", "prompts", "train")
    assert "upload it" in issue_at(answer, "spec", "prompts", "eval")
    assert issue_at(answer, "spec", "model", "path")


def test_epochs_count_the_rows_of_the_file(client: httpx.Client):
    raw = spec(upload(client), ppo={"num_train_epochs": 2.0, "response_length": 16})
    assert client.post("/v1/jobs/estimate", json={"spec": raw}).json()["total_episodes"] == 32
    raw["ppo"]["num_train_epochs"] = 0.1
    msg = issue_at(client.post("/v1/jobs/estimate", json={"spec": raw}), "spec", "ppo", "total_episodes")
    assert "num_train_epochs 0.1 x 16 prompts = 1" in msg


def test_a_spec_that_is_no_object(client: httpx.Client):
    assert "[] given" in issue_at(client.post("/v1/jobs", json={"spec": []}), "spec")
    assert "is required" in issue_at(client.post("/v1/jobs", json={"name": "x"}), "spec")


def test_hub_models_are_taken_where_allowed(tmp_path: Path, new_sqlite: NewDatabase):
    allowing = Settings(data_dir=tmp_path, database_url=new_sqlite(), allow_hub_models=True)
    with serving(allowing) as running, running.client() as client:
        hub = {"type": "hub", "repo": "Qwen/Qwen2.5-0.5B-Instruct"}
        job = client.post("/v1/jobs", json={"spec": spec(upload(client), model=hub)}).json()
        assert job["spec"]["model"] == hub | {"revision": "main"}
        assert job["plan"]["parameters_trained"] is None  # nothing is known of it here


def test_prompts_of_the_hub_are_planned_as_far_as_can_be_without_them(
    tmp_path: Path, new_sqlite: NewDatabase
):
    allowing = Settings(data_dir=tmp_path, database_url=new_sqlite(), allow_hub_models=True)
    source = {"type": "hub", "repo": "org/prompts"}
    model = {"type": "hub", "repo": "org/model"}
    with serving(allowing) as running, running.client() as client:

        def sent(route: str, ppo: dict[str, Any]) -> httpx.Response:
            return client.post(
                route, json={"spec": spec("", prompts={"train": source}, model=model, ppo=ppo)}
            )

        job = sent("/v1/jobs", {"total_episodes": 64}).json()
        assert job["spec"]["prompts"]["train"] == source | {
            "revision": "main",
            "config": None,
            "split": "train",
        }
        assert job["plan"]["num_total_batches"] == job["total_updates"] == 8

        job = sent("/v1/jobs", {"num_train_epochs": 2.0}).json()
        assert (job["plan"], job["total_updates"]) == (None, None)
        estimate = sent("/v1/jobs/estimate", {"num_train_epochs": 2.0})
        assert "prompts.train on the hub; give it" in issue_at(estimate, "spec", "ppo", "total_episodes")

        broken = sent("/v1/jobs", {"num_mini_batches": 3})
        assert "give a divisor" in issue_at(broken, "spec", "ppo", "num_mini_batches")


DEEP = st.integers(1, 1100).map(lambda depth: f"<{depth} deep>")
"""Stands for lists in lists, which Python cannot write as JSON itself."""


def written(value: Any) -> str:
    """JSON, with what is deep in it."""
    return re.sub(
        r'"<(\d+) deep>"', lambda found: "[" * int(found[1]) + "]" * int(found[1]), json.dumps(value)
    )


PATTERNS = st.lists(
    st.sampled_from([*"()[]{}\\|*+?a^$", "(?:", "(?i)", "(?#", "[^", "{9}", "{99}", "{9999}", "{e<=1}"]),
    max_size=40,
).map("".join)
DEEP_PATTERNS = st.builds(
    lambda depth, count: "(?:" * depth + "a" + f"){{{count}}}" * depth,
    st.integers(1, 120),
    st.sampled_from([1, 3, 9, 10**9]),
)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"anyOf": [{"$ref": "#/$defs/b"}, {"enum": [1, None]}]}},
    "patternProperties": {"^x": {"items": {"minimum": 1}}},
    "$defs": {"b": {"type": ["string", "null"], "pattern": "a"}},
    "required": ["a"],
}
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2**31, 10**30, 10**400])
    | st.floats()
    | st.text()
    | st.sampled_from(
        ["", "..", "/", "tiny", "a\0b", "\ud800", "lora", "full", "model", "head", "local", "hub", "#", "//"]
    )
    | PATTERNS
    | DEEP_PATTERNS
    | DEEP
)
ANYTHING = st.one_of(
    st.recursive(
        LEAVES,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    ),
    # Three of them are no body over the limit.
    st.integers(1, 1000).map(lambda many: {f"field{number}": None for number in range(many)}),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in JSON data at which something else could stand."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    for key, part in items:
        found += places(part, (*path, key))
    return found


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_spec_makes_the_server_fail(client: httpx.Client, file_id: str, data: st.DataObject):
    whole = {"spec": RunSpec.model_validate(spec(file_id)).model_dump(mode="json")}
    whole["spec"]["method"]["adapters"] = {"old": {"type": "local", "path": "tiny"}}
    whole["spec"]["rewards"] += [
        {"type": "regex", "name": "pattern", "pattern": "a"},
        {"type": "http", "name": "server", "url": "https://a.example/", "signing_key": {"secret": "KEY"}},
        {"type": "json_schema", "name": "form", "schema": copy.deepcopy(SCHEMA)},
    ]
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(whole)))
        part: Any = whole
        for step in path[:-1]:
            part = part[step]
        part[path[-1]] = data.draw(ANYTHING)
    answer = client.post("/v1/jobs/estimate", content=written(whole), headers=JSON)
    if answer.status_code != 200:
        document = problem(answer, 422, "invalid_request")
        assert all(issue["loc"] and issue["msg"] for issue in document["issues"])


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(pattern=PATTERNS | DEEP_PATTERNS)
def test_no_pattern_makes_the_server_fail(client: httpx.Client, file_id: str, pattern: str):
    rewards = [{"type": "regex", "name": "x", "pattern": pattern}]
    answer = client.post("/v1/jobs/estimate", json={"spec": spec(file_id, rewards=rewards)})
    if answer.status_code != 200:
        assert "given" in issue_at(answer, "spec", "rewards", 0, "pattern")
