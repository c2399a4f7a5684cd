"""Every kind of bad input: its status and field, what was given, the rule, and the fix; and work goes on.

What only the engine can know, such as a prompt longer than the context, is in `tests/e2e/test_job.py`.
"""

from __future__ import annotations

import http.client
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx
import pytest

from service.store import keys
from tests.service.api.running import MAX_BODY, Running, demand, make_job, spec, upload

JSON = {"Content-Type": "application/json"}
GIB = 1024**3

Loc = tuple[str | int, ...]


class World(NamedTuple):
    """What a bad request is made with."""

    client: httpx.Client
    service: Running
    file_id: str


class Case(NamedTuple):
    """A bad request, and what must be said of it."""

    name: str
    ask: Callable[[World], httpx.Response]
    status: int
    code: str
    loc: Loc
    given: str
    rule: str
    fix: str


def bad_spec(name: str, parts: dict[str, Any], loc: Loc, given: str, rule: str, fix: str) -> Case:
    """A spec with parts that are wrong; jobs and estimates say the same of it."""

    def ask(world: World) -> httpx.Response:
        # httpx refuses to send what is no JSON; a client in another language may not.
        content = json.dumps({"spec": spec(world.file_id, **parts)})
        job, estimate = (
            world.client.post(route, content=content, headers=JSON)
            for route in ("/v1/jobs", "/v1/jobs/estimate")
        )
        assert estimate.status_code == 422
        assert estimate.json()["issues"] == job.json()["issues"]
        return job

    return Case(name, ask, 422, "invalid_request", ("spec", *loc), given, rule, fix)


def ppo(name: str, values: dict[str, Any], field: str, given: str, rule: str, fix: str) -> Case:
    return bad_spec(name, {"ppo": {"total_episodes": 64, **values}}, ("ppo", field), given, rule, fix)


def model(name: str, path: str, given: str, rule: str, fix: str, *field: str) -> Case:
    parts = {"model": {"type": "local", "path": path}}
    return bad_spec(name, parts, ("model", *field), given, rule, fix)


def pattern(name: str, text: str, rule: str, fix: str) -> Case:
    rewards = [{"type": "regex", "name": "x", "pattern": text}]
    given = f'"{text[:10]}'.replace("\\", "\\\\")
    return bad_spec(name, {"rewards": rewards}, ("rewards", 0, "pattern"), given, rule, fix)


def bad_file(name: str, content: bytes, where: Loc, given: str, rule: str, fix: str) -> Case:
    def ask(world: World) -> httpx.Response:
        return world.client.post("/v1/files", files={"file": ("p.jsonl", content)})

    return Case(name, ask, 422, "invalid_request", ("file", *where), given, rule, fix)


def bad_body(name: str, body: bytes, loc: Loc, given: str, rule: str, fix: str) -> Case:
    def ask(world: World) -> httpx.Response:
        return world.client.post("/v1/jobs", content=body, headers=JSON)

    return Case(name, ask, 422, "invalid_request", loc, given, rule, fix)


def bad_key(name: str, header: Callable[[World], str | None], code: str, given: str, fix: str) -> Case:
    def ask(world: World) -> httpx.Response:
        text = header(world)
        answer = httpx.get(
            f"{world.service.url}/v1/jobs", headers={"Authorization": text} if text is not None else {}
        )
        assert text is None or text.removeprefix("Bearer ") not in answer.text, "a key is never shown"
        return answer

    return Case(name, ask, 401, code, ("Authorization",), given, "API key", fix)


def revoked(world: World) -> str:
    key = world.service.key("revoked")
    project = world.service.write(lambda session: keys.find_project(session, "revoked"))
    assert project is not None
    for row in world.service.write(lambda session: keys.list_keys(session, project.id)).data:
        world.service.write(lambda session, row=row: keys.revoke_key(session, project.id, row.id))
    return f"Bearer {key}"


def unknown(path: str, field: str, given: str, rule: str, fix: str) -> Case:
    def ask(world: World) -> httpx.Response:
        path_of_job = path.replace("JOB", make_job(world.client)["id"]) if "JOB" in path else path
        return world.client.get(path_of_job)

    return Case(f"nothing at {path}", ask, 404, "not_found", (field,), given, rule, fix)


def foreign_file(world: World) -> str:
    with world.service.client() as stranger:
        return upload(stranger)


def a_gigabyte(world: World) -> httpx.Response:
    """Announced, and refused before it is sent."""
    url = httpx.URL(world.service.url)
    connection = http.client.HTTPConnection(url.host, url.port or 80, timeout=30)
    try:
        connection.putrequest("POST", "/v1/files")
        connection.putheader("Authorization", world.client.headers["authorization"])
        connection.putheader("Content-Type", "multipart/form-data; boundary=b")
        connection.putheader("Content-Length", str(GIB))
        connection.endheaders(b"--b\r\n")
        answer = connection.getresponse()
        request = httpx.Request("POST", f"{world.service.url}/v1/files")
        return httpx.Response(
            answer.status, headers=answer.getheaders(), content=answer.read(), request=request
        )
    finally:
        connection.close()


def two_with_one_key(world: World) -> httpx.Response:
    headers = {"Idempotency-Key": "one"}
    first = world.client.post("/v1/jobs", json={"spec": spec(world.file_id)}, headers=headers)
    assert first.status_code == 201
    again = world.client.post("/v1/jobs", json={"spec": spec(world.file_id)}, headers=headers)
    assert again.json() == first.json(), "the same again is no bad input"
    return world.client.post("/v1/jobs", json={"spec": spec(world.file_id), "name": "x"}, headers=headers)


CASES = [
    # Fields and their types
    ppo("an unknown field", {"kl_coeff": 0.1}, "kl_coeff", "0.1 given", "unknown field", "remove it"),
    bad_spec("an unknown part", {"extra": 1}, ("extra",), "1 given", "unknown field", "correct its name"),
    ppo("a wrong type", {"kl_coef": "0.1"}, "kl_coef", '"0.1" given', "valid number", "without quotes"),
    ppo("a number as text", {"seed": "7"}, "seed", '"7" given', "valid integer", "give a whole number"),
    ppo("a truth as a number", {"whiten_rewards": 1}, "whiten_rewards", "1 given", "boolean", "give true or"),
    ppo("a wrong word", {"kl_estimator": "k9"}, "kl_estimator", '"k9" given', "'k3' or 'abs'", "give one of"),
    ppo("infinity", {"kl_coef": float("inf")}, "kl_coef", "Infinity given", "JSON does not", "give a finite"),
    ppo(
        "too large",
        {"total_episodes": 10**40},
        "total_episodes",
        "1000000",
        "less than",
        "give a number below",
    ),
    ppo("too small", {"temperature": 1e-320}, "temperature", "1e-320 given", "greater than", "or more"),
    bad_spec("no rewards", {"rewards": []}, ("rewards",), "[] given", "at least 1", "give more"),
    bad_spec("a wrong kind", {"model": {"type": "x"}}, ("model",), '"x"', "'local', 'hub'", "give one of"),
    bad_spec("no kind", {"model": {}}, ("model",), "{} given", "'type' is missing", "name it"),
    bad_spec("no object", {"ppo": []}, ("ppo",), "[] given", "JSON object", "in braces"),
    bad_spec(
        "no name", {"prompts": {"train": "a b"}}, ("prompts", "train"), '"a b" given', "letters", "give"
    ),
    bad_spec(
        "half a character",
        {"rewards": [{"type": "plugin", "name": "x", "plugin": "y", "options": {"text": "\ud800"}}]},
        ("rewards", 0, "options", "text"),
        "\\ud800 given",
        "no text may contain",
        "take it out",
    ),
    # Rules between fields
    ppo(
        "both stop tokens",
        {"stop_token": "eos", "stop_token_id": 7},
        "stop_token_id",
        '7 given together with stop_token "eos"',
        "exclude each other",
        "give one",
    ),
    ppo(
        "both stop tokens, one of them 0",
        {"stop_token": "eos", "stop_token_id": 0},
        "stop_token_id",
        '0 given together with stop_token "eos"',
        "exclude each other",
        "give one",
    ),
    ppo(
        "episodes of less than a batch",
        {"total_episodes": 7},
        "total_episodes",
        "7 given, with a batch of 8 rows",
        "at least one batch",
        "raise it",
    ),
    ppo(
        "a batch that does not divide",
        {"num_mini_batches": 3},
        "num_mini_batches",
        "3 given",
        "8 rows per process; the rows must divide",
        "give a divisor",
    ),
    ppo(
        "whitening of too few rows",
        {"per_device_train_batch_size": 4, "whiten_rewards": True},
        "whiten_rewards",
        "true given with a batch of 4 rows",
        "at least 8",
        "raise per_device_train_batch_size",
    ),
    ppo(
        "a divergence in the loss that holds nothing",
        {"kl_placement": "loss"},
        "kl_estimator",
        '"k1" given with kl_placement "loss"',
        "expected gradient is 0",
        'give "k2"',
    ),
    ppo(
        "a horizon without a target",
        {"adaptive_kl_horizon": 1000.0},
        "adaptive_kl_horizon",
        "1000.0 given",
        "without adaptive_kl_target",
        "give the target",
    ),
    ppo(
        "a coefficient that cannot adapt",
        {"adaptive_kl_target": 6.0, "kl_coef": 0.0},
        "kl_coef",
        "0 given with adaptive_kl_target",
        "0 would stay 0",
        "give one above 0",
    ),
    ppo(
        "a horizon of less than a batch",
        {"adaptive_kl_target": 6.0, "adaptive_kl_horizon": 7.0},
        "adaptive_kl_horizon",
        "7 given, with a batch of 8 rows",
        "a fifth per horizon",
        "give at least 8",
    ),
    ppo(
        "one response to compare",
        {"advantage_estimator": "rloo"},
        "num_return_sequences",
        '1 given with advantage_estimator "rloo"',
        "compares the responses to one prompt",
        "give 2 or more",
    ),
    ppo(
        "groups that do not fill a batch",
        {"num_return_sequences": 3},
        "num_return_sequences",
        "3 given, with per_device_train_batch_size 8",
        "whole groups of responses",
        "give a divisor",
    ),
    ppo(
        "a critic's argument without a critic",
        {"advantage_estimator": "reinforce++", "vf_coef": 0.5},
        "vf_coef",
        '0.5 given with advantage_estimator "reinforce++"',
        "has no use for it",
        "leave it out",
    ),
    ppo(
        "a token's argument where responses are judged whole",
        {"advantage_estimator": "grpo", "num_return_sequences": 4, "gamma": 0.9},
        "gamma",
        '0.9 given with advantage_estimator "grpo"',
        "has no use for it",
        "leave it out",
    ),
    ppo(
        "a policy that would never learn",
        {"critic_warmup": 8},
        "critic_warmup",
        "8 given, and the run has 8 updates",
        "the policy would never learn",
        "give fewer",
    ),
    ppo("a dual clip of 1", {"dual_clip": 1.0}, "dual_clip", "1.0 given", "greater than 1", "above 1"),
    bad_spec(
        "a critic that nothing asks",
        {
            "method": {"type": "lora", "value": {"type": "head"}},
            "ppo": {"total_episodes": 64, "advantage_estimator": "rloo", "num_return_sequences": 4},
        },
        ("method", "value"),
        '{"type": "head"} given',
        "needs no critic",
        "leave it out",
    ),
    ppo(
        "a negative penalty",
        {"missing_eos_penalty": -1.0, "stop_token": "eos"},
        "missing_eos_penalty",
        "-1.0 given",
        "greater than 0",
        "give a number above 0",
    ),
    bad_spec(
        "a reference adapter without LoRA",
        {"method": {"type": "full"}, "ppo": {"total_episodes": 64, "ref_adapter_name": "old"}},
        ("ppo", "ref_adapter_name"),
        '"old" given',
        "nothing has adapters in full fine-tuning",
        'use method "lora"',
    ),
    bad_spec(
        "modules the architecture lacks",
        {"method": {"type": "lora", "target_modules": ["c_attn", "q_proj"]}},
        ("method", "target_modules", 1),
        '"q_proj" given',
        'gpt2 has the linear modules ["c_attn", "c_fc"]',
        'give "all-linear"',
    ),
    ppo(
        "an answer longer than the context",
        {"response_length": 64},
        "response_length",
        "64 given",
        "64 positions",
        "give fewer",
    ),
    ppo(
        "a token that is none",
        {"stop_token_id": 30},
        "stop_token_id",
        "30 given",
        "ids 0 to 29",
        "give one of",
    ),
    bad_spec(
        "a plug-in nobody installed",
        {"rewards": [{"type": "plugin", "name": "x", "plugin": "none-such"}]},
        ("rewards", 0, "plugin"),
        '"none-such" given',
        "installed here are",
        "ask the operator",
    ),
    # Patterns
    bad_spec(
        "a column that the prompts lack",
        {"rewards": [{"type": "string_check", "name": "right", "column": "answer"}]},
        ("rewards", 0, "column"),
        '"answer"',
        "prompts.train has the columns []",
        "give prompts that have it",
    ),
    pattern("a pattern that is none", "(", "missing ) at position 1", "correct it there"),
    pattern("a pattern that unfolds", "(?:(?:(?:a){200}){200}){200}", "10000 are the most", "repeat less"),
    pattern("a pattern with a long count", "a{1000000000}", "10000 are the most", "repeat less"),
    pattern("a deep pattern", "(" * 400 + "a" + ")" * 400, "20 deep", "nest fewer"),
    pattern("a pattern both deep and long", "(?:" * 100 + "a" + "){9}" * 100, "20 deep", "nest fewer"),
    # Models
    model(
        "a model elsewhere", "/etc", '"/etc" given', "inside a directory the operator", "relative to", "path"
    ),
    model("a way out", "tiny/../../x", '"tiny/../../x" given', 'without ".."', "give it relative", "path"),
    model("a link out", "link", '"link" given, a link that leads out', "inside", "copy the model", "path"),
    model(
        "a model that is not there", "huge", '"huge" given', "no such directory", "correct the path", "path"
    ),
    model("a path that is too long", "a" * 5000, '"aaaa', "cannot be followed", "correct the path", "path"),
    model("a directory that is no model", "empty", "empty", "has no config.json", "save_pretrained", "path"),
    model("no causal language model", "bert", "BertForMaskedLM", "causal language models", "give one"),
    model("no pad and no eos", "mute", "A model given", "neither a pad token nor an eos token", "name one"),
    bad_spec(
        "a judge that is none",
        {"rewards": [{"type": "model", "name": "judge", "source": {"type": "local", "path": "tiny"}}]},
        ("rewards", 0, "source"),
        '["GPT2LMHeadModel"] given',
        "...ForSequenceClassification",
        "give one",
    ),
    bad_spec(
        "a hub model where none are allowed",
        {"model": {"type": "hub", "repo": "owner/name"}},
        ("model", "repo"),
        '"owner/name" of the hub given',
        "local models only",
        "give the path",
    ),
    bad_spec(
        "a data set of the hub where none are allowed",
        {"prompts": {"train": {"type": "hub", "repo": "owner/name"}}},
        ("prompts", "train", "repo"),
        '"owner/name" of the hub given',
        "uploaded files only",
        "give the id of the file",
    ),
    bad_spec(
        "a data set without a kind",
        {"prompts": {"train": {"repo": "owner/name"}}},
        ("prompts", "train", "type"),
        "Nothing given",
        "required",
        "add it",
    ),
    bad_spec(
        "an adapter elsewhere",
        {"method": {"type": "lora", "adapters": {"old": {"type": "local", "path": "/etc"}}}},
        ("method", "adapters", "old", "path"),
        '"/etc" given',
        "inside a directory",
        "relative to",
    ),
    # Files
    bad_file("an empty file", b"", (), "an empty file (0 bytes) given", "at least one row", "give at least"),
    bad_file(
        "a truncated file",
        b'{"prompt": "b',
        (1,),
        '"prompt\\": \\"b"',
        "ends in the middle",
        "upload it whole",
    ),
    bad_file(
        "a file that is not UTF-8", b'{"prompt": "\xe9"}\n', (1,), "0xE9 given", "not UTF-8", "save the file"
    ),
    bad_file(
        "a name twice",
        b'{"prompt": "a", "prompt": "b"}',
        (1, "prompt"),
        '"prompt" given 2 times',
        "",
        "keep one",
    ),
    bad_file(
        "a deep row",
        b'{"prompt": "a", "x": ' + b"[" * 300 + b"]" * 300 + b"}",
        (1, "x", 0),
        "given",
        "64 deep",
        "flatten",
    ),
    Case(
        "a gigabyte",
        a_gigabyte,
        413,
        "too_large",
        ("body",),
        f"{GIB} bytes given",
        "are the most",
        "split it",
    ),
    Case(
        "two files in one form",
        lambda world: world.client.post(
            "/v1/files", files=[("file", ("a.jsonl", b"{}")), ("file", ("b.jsonl", b"{}"))]
        ),
        422,
        "invalid_request",
        ("file",),
        '["a.jsonl", "b.jsonl"] given',
        "gives it once",
        "keep one",
    ),
    Case(
        "a file without a name",
        lambda world: world.client.post("/v1/files", data={"file": "text"}),
        422,
        "invalid_request",
        ("file",),
        '"text" given',
        "part with a filename",
        "add one",
    ),
    Case(
        "an unknown part of a form",
        lambda world: world.client.post(
            "/v1/files", files={"file": ("a.jsonl", b"{}"), "more": ("b.txt", b"")}
        ),
        422,
        "invalid_request",
        ("more",),
        'a file "b.txt" given',
        "unknown field",
        "remove it",
    ),
    Case(
        "a name of 100 kB",
        lambda world: world.client.post("/v1/files", files={"file": ("a" * 100_000 + ".jsonl", b"{}")}),
        400,
        "bad_request",
        ("body",),
        "A body given",
        "short names",
        "correct it",
    ),
    Case(
        "a form of very many parts",
        lambda world: world.client.post("/v1/files", files=[("file", ("a.jsonl", b"{}"))] * 100),
        400,
        "bad_request",
        ("body",),
        "Too many files",
        "few parts",
        "correct it",
    ),
    Case(
        "a file of another project, to train on",
        lambda world: world.client.post("/v1/jobs", json={"spec": spec(foreign_file(world))}),
        422,
        "invalid_request",
        ("spec", "prompts", "train"),
        '"file_',
        "this project has no such file",
        "upload it",
    ),
    Case(
        "a file of another project, to look at",
        lambda world: world.client.get(f"/v1/files/{foreign_file(world)}"),
        404,
        "not_found",
        ("file_id",),
        '"file_',
        "no such file in this project",
        "GET /v1/files",
    ),
    # Bodies
    Case(
        "a body over the limit",
        lambda world: world.client.post("/v1/jobs", json={"name": "x" * MAX_BODY}),
        413,
        "too_large",
        ("body",),
        "bytes given",
        f"{MAX_BODY} bytes are the most",
        "send less",
    ),
    Case(
        "a body over the limit that does not say so",
        lambda world: world.client.post("/v1/jobs", content=iter([b"x" * MAX_BODY] * 2), headers=JSON),
        413,
        "too_large",
        ("body",),
        f"More than {MAX_BODY} bytes given",
        "are the most",
        "send less",
    ),
    bad_body("no JSON", b'{"spec": ', ("body",), "No JSON given", "Expecting value", "correct it"),
    bad_body(
        "no UTF-8", b'{"spec": "\xff"}', ("body",), "0xFF given at position 11", "not UTF-8", "send text"
    ),
    bad_body("a long number", b"9" * 5000, ("body",), "thousands of digits", "given", "shorten it"),
    bad_body("deep from the start", b"[" * 30_000, ("body",), "given", "64 deep", "flatten"),
    bad_body(
        "deep in a spec",
        b'{"spec":{"x":' + b"[" * 950 + b"]" * 950 + b"}}",
        ("spec", "x"),
        "given",
        "64 deep",
        "flatten",
    ),
    bad_body(
        "a name twice", b'{"name": "a", "name": "b"}', ("name",), '"name" given 2 times', "in one", "keep one"
    ),
    bad_body(
        "a name twice in a spec",
        b'{"spec": {"ppo": {"lam": 1.0, "lam": 0.9}}}',
        ("spec", "ppo", "lam"),
        '"lam" given 2 times',
        "in one object",
        "keep one",
    ),
    # Keys
    bad_key("no key", lambda _: None, "missing_api_key", "No API key was given", "send the header"),
    bad_key("a malformed key", lambda _: "Bearer sk-12345", "malformed_api_key", "given", "copy all of it"),
    bad_key(
        "an unknown key", lambda _: f"Bearer {keys.generate()}", "unknown_api_key", "given", "send one of"
    ),
    bad_key("a revoked key", revoked, "revoked_api_key", "was revoked", "ask the operator"),
    # Ids and cursors
    unknown("/v1/jobs/job_nothing", "job_id", '"job_nothing"', "no such job", "GET /v1/jobs"),
    unknown("/v1/jobs/job_nothing/events", "job_id", '"job_nothing"', "no such job", "GET /v1/jobs"),
    unknown("/v1/files/file_nothing", "file_id", '"file_nothing"', "no such file", "GET /v1/files"),
    unknown("/v1/jobs/JOB/checkpoints/7", "update", '"7"', "no such checkpoint", "/checkpoints"),
    unknown("/v1/jobs/JOB/adapter", "job_id", '"job_', "no such adapter", "/checkpoints"),
    Case(
        "a cursor of another list",
        lambda world: world.client.get("/v1/jobs", params={"after": world.file_id}),
        400,
        "unknown_cursor",
        ("after",),
        "'file_",
        "no id in this list of jobs",
        "give the id of the last item",
    ),
    Case(
        "a parameter twice",
        lambda world: world.client.get("/v1/jobs?limit=1&limit=2"),
        422,
        "invalid_request",
        ("limit",),
        '["1", "2"] given',
        "gives it once",
        "keep one",
    ),
    Case(
        "a parameter out of range",
        lambda world: world.client.get("/v1/jobs?limit=101"),
        422,
        "invalid_request",
        ("limit",),
        '"101" given',
        "less than or equal to 100",
        "give 100 or less",
    ),
    # Idempotency
    Case(
        "two requests with one key",
        two_with_one_key,
        422,
        "idempotency_key_reused",
        ("Idempotency-Key",),
        "'one' was sent",
        "with another body",
        "give every new request a new key",
    ),
    Case(
        "a key that is none",
        lambda world: world.client.post(
            "/v1/jobs", json={"spec": spec(world.file_id)}, headers={"Idempotency-Key": "two words"}
        ),
        422,
        "invalid_request",
        ("Idempotency-Key",),
        '"two words" given',
        "visible ASCII characters without spaces",
        "give a UUID",
    ),
]


@pytest.fixture(scope="module")
def world(service: Running) -> Iterator[World]:
    with service.client() as client:
        yield World(client, service, upload(client))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_input_is_refused_with_all_that_helps(
    world: World, case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    answer = case.ask(world)

    demand(answer, case.status, case.code, case.loc, case.given, case.rule, case.fix)
    assert str(world.service.settings.model_roots[0]) not in answer.text, "the operator's disks are not shown"
    assert [record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info] == []
    assert world.client.post("/v1/jobs/estimate", json={"spec": spec(world.file_id)}).status_code == 200
