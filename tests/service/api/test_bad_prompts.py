"""Every way in which a spec's prompts can be wrong at submit: the field, what was given, rule, and fix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.service.api.running import Running, demand, spec, upload

JSON = {"Content-Type": "application/json"}
OTHERS_FILE = "file_0190f3a2b4c57d8e9f00112233445566"

Case = tuple[dict[str, Any], tuple[str, ...], str, str, str]

CASES: dict[str, Case] = {
    # Files
    "no file": ({"train": None}, ("train",), "null given", "valid string", "give text in quotes"),
    "no such file": ({"train": OTHERS_FILE}, ("train",), OTHERS_FILE, "has no such file", "upload it"),
    "no such held-out file": ({"eval": OTHERS_FILE}, ("eval",), OTHERS_FILE, "has no such file", "upload it"),
    "a path": ({"train": "../train"}, ("train",), '"../train" given', "letters", "give"),
    "a field of scripts": (
        {"max_prompt_length": 8},
        ("max_prompt_length",),
        "8 given",
        "unknown field",
        "correct its name",
    ),
    # Prompts that are too long
    "a wrong word": (
        {"overlong": "cut"},
        ("overlong",),
        '"cut" given',
        "'drop' or 'truncate'",
        "give one of",
    ),
    "no word": ({"overlong": None}, ("overlong",), "null given", "'drop' or 'truncate'", "give one of"),
    "a truth": ({"overlong": True}, ("overlong",), "true given", "'drop' or 'truncate'", "give one of"),
    "no tokens": ({"max_length": 0}, ("max_length",), "0 given", "equal to 1", "give 1 or more"),
    "less than none": ({"max_length": -5}, ("max_length",), "-5 given", "equal to 1", "give 1 or more"),
    "half a token": ({"max_length": 7.5}, ("max_length",), "7.5 given", "valid integer", "a whole number"),
    "a length as text": (
        {"max_length": "8"},
        ("max_length",),
        '"8" given',
        "valid integer",
        "a whole number",
    ),
    "a length without end": (
        {"max_length": 2**31},
        ("max_length",),
        "2147483648 given",
        "less than 2147483648",
        "give a number below",
    ),
    "one token too many": (
        {"max_length": 49, "overlong": "truncate"},
        ("max_length",),
        "49 given",
        "the model has 64 positions, and response_length 16 leaves 48 for a prompt",
        "give at most 48",
    ),
}


@pytest.fixture(scope="module")
def sender(service: Running) -> Iterator[tuple[httpx.Client, str]]:
    with service.client() as client:
        yield client, upload(client)


@pytest.mark.parametrize("name", CASES)
def test_bad_prompts_are_refused_with_all_that_helps(sender: tuple[httpx.Client, str], name: str) -> None:
    client, file_id = sender
    prompts, where, given, rule, fix = CASES[name]
    content = json.dumps({"spec": spec(file_id, prompts={"train": file_id, **prompts})})
    job, estimate = (
        client.post(route, content=content, headers=JSON) for route in ("/v1/jobs", "/v1/jobs/estimate")
    )
    demand(job, 422, "invalid_request", ("spec", "prompts", *where), given, rule, fix)
    assert estimate.json()["issues"] == job.json()["issues"]


def test_what_is_right_is_kept_and_changes_no_plan(sender: tuple[httpx.Client, str]) -> None:
    client, file_id = sender
    lengths = {"overlong": "drop", "max_length": 48}
    whole = {"ppo": {"num_train_epochs": 2.0, "response_length": 16}}
    plain, dropping = (
        client.post("/v1/jobs", json={"spec": spec(file_id, prompts={"train": file_id, **given}, **whole)})
        for given in ({}, lengths)
    )
    assert plain.json()["spec"]["prompts"] == {
        "train": file_id,
        "eval": None,
        "overlong": "refuse",
        "max_length": None,
    }
    assert dropping.json()["spec"]["prompts"] == {"train": file_id, "eval": None, **lengths}
    assert dropping.json()["plan"] == plain.json()["plan"]
    assert plain.json()["plan"]["total_episodes"] == 32
