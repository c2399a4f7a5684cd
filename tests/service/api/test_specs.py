"""Every rule of a spec that the API can know, broken: where it is told, what was given, the rule, the fix."""

from __future__ import annotations

import json
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
from tests.service.api.running import Running, issue_at, make_model, problem, serving, spec, upload

JSON = {"Content-Type": "application/json"}
LORA = {"type": "lora", "target_modules": ["c_attn", "q_proj"]}
CHAT_JUDGE = [{"type": "model", "name": "judge", "source": {"type": "local", "path": "tiny"}}]

BAD: list[tuple[str, dict[str, Any], tuple[str | int, ...], list[str]]] = [
    ("unknown field", {"ppo": {"kl_coeff": 0.1}}, ("ppo", "kl_coeff"), ["0.1 given", "unknown", "remove it"]),
    ("unknown part", {"extra": 1}, ("extra",), ["1 given", "unknown field", "correct its name"]),
    ("wrong type", {"ppo": {"kl_coef": "0.1"}}, ("ppo", "kl_coef"), ['"0.1" given', "number"]),
    ("a number as text", {"ppo": {"seed": "7"}}, ("ppo", "seed"), ['"7" given', "integer"]),
    (
        "a truth as a number",
        {"ppo": {"whiten_rewards": 1}},
        ("ppo", "whiten_rewards"),
        ["1 given", "boolean"],
    ),
    (
        "both stop tokens",
        {"ppo": {"stop_token": "eos", "stop_token_id": 0}},
        ("ppo", "stop_token_id"),
        ["0 given", '"eos"', "exclude each other", "give one"],
    ),
    (
        "episodes of less than a batch",
        {"ppo": {"total_episodes": 7}},
        ("ppo", "total_episodes"),
        ["7 given", "batch of 8 rows", "at least one batch", "raise it"],
    ),
    (
        "a batch that does not divide",
        {"ppo": {"total_episodes": 64, "num_mini_batches": 3}},
        ("ppo", "num_mini_batches"),
        ["3 given", "8 rows", "divide", "give a divisor"],
    ),
    (
        "whitening of too few rows",
        {"ppo": {"total_episodes": 64, "per_device_train_batch_size": 4, "whiten_rewards": True}},
        ("ppo", "whiten_rewards"),
        ["true given", "4 rows", "at least 8", "raise"],
    ),
    (
        "a negative penalty",
        {"ppo": {"missing_eos_penalty": -1.0, "stop_token": "eos"}},
        ("ppo", "missing_eos_penalty"),
        ["-1.0 given", "greater than"],
    ),
    (
        "a reference adapter in full fine-tuning",
        {"method": {"type": "full"}, "ppo": {"total_episodes": 64, "ref_adapter_name": "old"}},
        ("ppo", "ref_adapter_name"),
        ['"old" given', "adapters", 'use method "lora"'],
    ),
    (
        "modules the model lacks",
        {"method": LORA},
        ("method", "target_modules", 1),
        ['"q_proj" given', "gpt2", "c_attn", '"all-linear"'],
    ),
    (
        "an answer longer than the context",
        {"ppo": {"total_episodes": 64, "response_length": 64}},
        ("ppo", "response_length"),
        ["64 given", "64 positions", "fewer"],
    ),
    (
        "more tokens than there are",
        {"ppo": {"stop_token_id": 30}},
        ("ppo", "stop_token_id"),
        ["30 given", "0 to 29"],
    ),
    ("no rewards", {"rewards": []}, ("rewards",), ["[] given", "at least 1"]),
    (
        "a judge that is none",
        {"rewards": CHAT_JUDGE},
        ("rewards", 0, "source"),
        ["GPT2LMHeadModel", "Sequence"],
    ),
    (
        "a plug-in nobody installed",
        {"rewards": [{"type": "plugin", "name": "x", "plugin": "none-such"}]},
        ("rewards", 0, "plugin"),
        ['"none-such" given', "installed here are", "ask the operator"],
    ),
    (
        "a pattern that is none",
        {"rewards": [{"type": "regex", "name": "x", "pattern": "("}]},
        ("rewards", 0, "pattern"),
        ['"(" given', "regular expression"],
    ),
    (
        "a hub model where none are allowed",
        {"model": {"type": "hub", "repo": "owner/name"}},
        ("model", "repo"),
        ['"owner/name"', "local models only"],
    ),
    (
        "a model elsewhere",
        {"model": {"type": "local", "path": "/etc"}},
        ("model", "path"),
        ['"/etc" given', "inside a directory the operator allows", "relative"],
    ),
    (
        "a way out",
        {"model": {"type": "local", "path": "tiny/../../secret"}},
        ("model", "path"),
        ['"tiny/../../secret" given', 'without ".."'],
    ),
    (
        "a model that is not there",
        {"model": {"type": "local", "path": "huge"}},
        ("model", "path"),
        ['"huge" given', "no such directory"],
    ),
    (
        "a directory that is no model",
        {"model": {"type": "local", "path": "empty"}},
        ("model", "path"),
        ["empty has no config.json", "save_pretrained"],
    ),
    (
        "no causal language model",
        {"model": {"type": "local", "path": "bert"}},
        ("model",),
        ["BertForMaskedLM", "causal language", "give one"],
    ),
    (
        "a tokenizer without pad and eos",
        {"model": {"type": "local", "path": "mute"}},
        ("model",),
        ["neither a pad token nor an eos token", "name one"],
    ),
    (
        "an adapter elsewhere",
        {"method": {"type": "lora", "adapters": {"old": {"type": "local", "path": "/etc"}}}},
        ("method", "adapters", "old", "path"),
        ['"/etc" given', "inside a directory"],
    ),
    (
        "half a character",
        {"rewards": [{"type": "plugin", "name": "x", "plugin": "y", "options": {"text": "\ud800"}}]},
        ("rewards", 0, "options", "text"),
        ["\\ud800 given", "take it out"],
    ),
    (
        "an infinite number",
        {"ppo": {"kl_coef": float("inf")}},
        ("ppo", "kl_coef"),
        ["Infinity given", "finite"],
    ),
    (
        "a number no run reaches",
        {"ppo": {"total_episodes": 10**40}},
        ("ppo", "total_episodes"),
        ["less than"],
    ),
    (
        "a name that is too long",
        {"model": {"type": "local", "path": "a" * 5000}},
        ("model", "path"),
        ["followed"],
    ),
]


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


@pytest.fixture(scope="module")
def file_id(client: httpx.Client) -> str:
    return upload(client)


@pytest.mark.parametrize(("parts", "loc", "words"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
@pytest.mark.parametrize("route", ["/v1/jobs", "/v1/jobs/estimate"])
def test_a_broken_rule(
    client: httpx.Client,
    service: Running,
    file_id: str,
    route: str,
    parts: dict[str, Any],
    loc: tuple[str | int, ...],
    words: list[str],
):
    # httpx refuses to send what is no JSON; a client in another language may not.
    content = json.dumps({"spec": spec(file_id, **parts)})
    answer = client.post(route, content=content, headers=JSON)
    msg = issue_at(answer, "spec", *loc)
    for word in words:
        assert word in msg
    assert "spec." in problem(answer, 422, "invalid_request")["detail"]
    assert str(service.settings.model_roots[0]) not in answer.text


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


def test_a_file_of_another_project_is_as_good_as_none(client: httpx.Client, service: Running):
    with service.client() as stranger:
        foreign = upload(stranger)
    msg = issue_at(client.post("/v1/jobs", json={"spec": spec(foreign)}), "spec", "prompts", "train")
    assert f'"{foreign}" given; this project has no such file: upload it' in msg


def test_epochs_count_the_rows_of_the_file(client: httpx.Client):
    raw = spec(upload(client), ppo={"num_train_epochs": 2.0, "response_length": 16})
    assert client.post("/v1/jobs/estimate", json={"spec": raw}).json()["total_episodes"] == 32
    raw["ppo"]["num_train_epochs"] = 0.1
    msg = issue_at(client.post("/v1/jobs/estimate", json={"spec": raw}), "spec", "ppo", "total_episodes")
    assert "num_train_epochs 0.1 x 16 prompts = 1" in msg


def test_a_spec_that_is_no_object(client: httpx.Client):
    assert "[] given" in issue_at(client.post("/v1/jobs", json={"spec": []}), "spec")
    assert "is required" in issue_at(client.post("/v1/jobs", json={"name": "x"}), "spec")


def test_a_link_out_is_refused_and_hub_models_are_taken_where_allowed(
    tmp_path: Path, new_sqlite: NewDatabase
):
    root = tmp_path / "models"
    make_model(tmp_path / "elsewhere" / "tiny")
    root.mkdir()
    (root / "tiny").symlink_to(tmp_path / "elsewhere" / "tiny")
    allowing = Settings(
        data_dir=tmp_path, database_url=new_sqlite(), model_roots=(root,), allow_hub_models=True
    )
    with serving(allowing) as running, running.client() as client:
        file_id = upload(client)
        answer = client.post("/v1/jobs", json={"spec": spec(file_id)})
        assert '"tiny" given, a link that leads out' in issue_at(answer, "spec", "model", "path")
        hub = {"type": "hub", "repo": "Qwen/Qwen2.5-0.5B-Instruct"}
        job = client.post("/v1/jobs", json={"spec": spec(file_id, model=hub)}).json()
        assert job["spec"]["model"] == hub | {"revision": "main"}
        assert job["plan"]["parameters_trained"] is None  # nothing is known of it here


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2**31, 10**30])
    | st.floats()
    | st.text()
    | st.sampled_from(
        ["", "..", "/", "tiny", "a\0b", "\ud800", "lora", "full", "model", "head", "local", "hub"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in JSON data at which something else could stand."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    for key, part in items:
        found += places(part, (*path, key))
    return found


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_spec_makes_the_server_fail(client: httpx.Client, file_id: str, data: st.DataObject):
    whole = {"spec": RunSpec.model_validate(spec(file_id)).model_dump(mode="json")}
    whole["spec"]["method"]["adapters"] = {"old": {"type": "local", "path": "tiny"}}
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(whole)))
        part: Any = whole
        for step in path[:-1]:
            part = part[step]
        part[path[-1]] = data.draw(ANYTHING)
    answer = client.post("/v1/jobs/estimate", content=json.dumps(whole), headers=JSON)
    if answer.status_code != 200:
        document = problem(answer, 422, "invalid_request")
        assert all(issue["loc"] and issue["msg"] for issue in document["issues"])
