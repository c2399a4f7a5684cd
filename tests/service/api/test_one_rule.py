"""One rule, one place: the API, `PPOConfig.from_spec`, and the trainer's own check say the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppo_engine import PPOConfig
from ppo_engine.config import check_args
from ppo_engine.facts import Facts, ModelFacts, read_model_facts
from ppo_engine.spec import Issue, SpecError, parse
from tests.service.api.running import Running, spec, upload

ROWS = 16
Told = list[tuple[tuple[Any, ...], str]]

ADAPTER_NAMES = st.none() | st.sampled_from(["sft", "default", "no such name"])
PPO = st.fixed_dictionaries(
    {},
    optional={
        "total_episodes": st.none() | st.integers(0, 64),
        "num_train_epochs": st.sampled_from([0.0, 0.25, 1.0, 3.0]),
        "per_device_train_batch_size": st.integers(0, 9),
        "gradient_accumulation_steps": st.integers(1, 4),
        "num_mini_batches": st.integers(1, 5),
        "response_length": st.sampled_from([0, 1, 16, 31, 32, 1000]),
        "temperature": st.sampled_from([0.0, 0.7, "hot"]),
        "stop_token": st.sampled_from([None, "eos", "stop"]),
        "stop_token_id": st.sampled_from([None, 0, 1, 10**6, -1]),
        "missing_eos_penalty": st.sampled_from([None, 1.0, 0.0, -1.0]),
        "kl_estimator": st.sampled_from(["k1", "k3", "k2"]),
        "whiten_rewards": st.booleans(),
        "gamma": st.sampled_from([0.0, 1.0, 1.1]),
        "lam": st.sampled_from([-0.1, 0.0, 1.0]),
        "eval_steps": st.sampled_from([None, 1]),
        "model_adapter_name": ADAPTER_NAMES,
        "ref_adapter_name": ADAPTER_NAMES,
    },
)
METHODS = st.sampled_from(
    [
        {"type": "full"},
        {"type": "lora"},
        {"type": "lora", "r": 0},
        {"type": "lora", "target_modules": ["q_proj"]},
        {"type": "lora", "target_modules": ["q_proj", "c_attn"]},
    ]
)


def told(issues: list[Issue]) -> Told:
    return sorted((tuple(issue.loc), issue.msg) for issue in issues)


def api_says(client: httpx.Client, raw: dict[str, Any]) -> Told:
    answer = client.post("/v1/jobs/estimate", json={"spec": raw})
    if answer.status_code == 200:
        return []
    assert answer.status_code == 422, answer.text
    issues = [Issue.model_validate(issue) for issue in answer.json()["issues"]]
    assert all(issue.loc[0] == "spec" for issue in issues)
    return told([Issue(loc=issue.loc[1:], msg=issue.msg) for issue in issues])


def engine_says(raw: dict[str, Any], facts: Facts, output_dir: str) -> Told:
    try:
        PPOConfig.from_spec(parse(raw), facts, output_dir, use_cpu=True, report_to="none")
    except SpecError as error:
        return told(error.issues)
    return []


def trainer_says(ppo: dict[str, Any], model: ModelFacts, output_dir: str) -> Told:
    """What a script's arguments are told, where they are the same hyperparameters."""
    try:
        args = PPOConfig(
            output_dir=output_dir,
            use_cpu=True,
            bf16=False,
            report_to="none",
            **{"gradient_checkpointing": False, **ppo},
        )
        check_args(args, ROWS, model)
    except SpecError as error:
        return told([Issue(loc=("ppo", *issue.loc), msg=issue.msg) for issue in error.issues])
    return []


@pytest.fixture(scope="module")
def file_id(service: Running) -> str:
    with service.client("one-rule") as client:
        return upload(client)


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[httpx.Client]:
    with service.client("one-rule") as client:
        yield client


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("trainer"))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(ppo=PPO, method=METHODS)
def test_api_and_engine_accept_the_same_and_refuse_with_the_same_words(
    client: httpx.Client,
    file_id: str,
    models: Path,
    output_dir: str,
    ppo: dict[str, Any],
    method: dict[str, Any],
) -> None:
    raw = spec(file_id, ppo=ppo, method=method)
    facts = Facts(model=read_model_facts(models / "tiny"), prompts=ROWS)

    assert api_says(client, raw) == engine_says(raw, facts, output_dir)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(ppo=PPO)
def test_a_script_is_told_what_the_api_tells(
    client: httpx.Client, file_id: str, models: Path, output_dir: str, ppo: dict[str, Any]
) -> None:
    for name in ("eval_steps", "model_adapter_name", "ref_adapter_name"):  # a script has its own ways
        ppo.pop(name, None)
    raw = spec(file_id, ppo=ppo, method={"type": "full"})
    from_api = api_says(client, raw)
    from_trainer = trainer_says(raw["ppo"], read_model_facts(models / "tiny"), output_dir)

    assert from_api == from_trainer
