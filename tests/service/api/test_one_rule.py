"""One rule, one place: the API, `PPOConfig.from_spec`, and the trainer's own check say the same.

The specs are generated over everything a rule reads: hyperparameters, resources, methods with value models
and adapters, rewards of each kind, prompts, and models of different shapes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ppo_engine import PPOConfig
from ppo_engine.config import check_args
from ppo_engine.facts import ModelFacts, read_model_facts
from ppo_engine.issues import Issue, SpecError
from ppo_engine.load import read_facts
from ppo_engine.model_sources import LocalModel
from ppo_engine.spec import parse, sources
from tests.service.api.running import Running, make_model, spec, upload

ROWS = 16
PROMPT = {"prompt": "one", "y": "two"}
Told = list[tuple[tuple[Any, ...], str]]

# Models ------------------------------------------------------------------------------------------------

POLICIES = ["tiny", "tiny", "tiny", "bert", "mute", "short", "small", "no-eos", "silent"]
CRITICS = ["critic", "causal", "two-labels", "encoder", "bert", "short", "small"]
JUDGES = ["critic", "two-labels", "encoder", "tiny"]
CLASSIFIER = {"architectures": ["GPT2ForSequenceClassification"]}


@pytest.fixture(scope="module")
def varied(models: Path) -> Path:
    """The directory of models, with more of them."""
    if (models / "sft").exists():
        return models
    names = {"tokenizer_class": "PreTrainedTokenizerFast"}
    make_model(models / "short", config={"n_positions": 24})
    make_model(models / "small", config={"vocab_size": 2})
    make_model(models / "no-eos", tokenizer={**names, "pad_token": "<pad>"})
    make_model(models / "silent", tokenizer={"tokenizer_class": "GPT2Tokenizer"}, config={"vocab_size": None})
    make_model(models / "causal", config={"n_positions": 128})
    make_model(models / "critic", config=CLASSIFIER, shapes={"score.weight": [1, 8]})
    make_model(models / "two-labels", config=CLASSIFIER, shapes={"score.weight": [2, 8]})
    encoder = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "good"}}
    make_model(models / "encoder", config=encoder, shapes={"classifier.weight": [1, 8]})
    make_adapter(models / "sft")
    return models


def make_adapter(path: Path) -> None:
    make_model(path, shapes={"c_attn.lora_A.weight": [4, 8], "c_attn.lora_B.weight": [24, 4]})
    (path / "config.json").unlink()
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]}
    (path / "adapter_config.json").write_text(json.dumps(config))


def local(name: str) -> dict[str, str]:
    return {"type": "local", "path": name}


# Specs -------------------------------------------------------------------------------------------------

ADAPTER_NAMES = st.sampled_from([None, "sft", "sft", "sft", "default", "other", "no such name"])
GROUPS = {
    "advantage_estimator": st.sampled_from(["gae", "rloo", "grpo", "reinforce++", "vtrace"]),
    "num_return_sequences": st.sampled_from([1, 2, 4, 5, 0]),
}
PPO = {
    "total_episodes": st.none() | st.integers(0, 64),
    "num_train_epochs": st.sampled_from([0.0, 0.25, 1.0, 3.0]),
    "per_device_train_batch_size": st.integers(0, 9),
    "gradient_accumulation_steps": st.integers(1, 4),
    "num_mini_batches": st.integers(1, 5),
    "response_length": st.sampled_from([0, 1, 16, 23, 24, 63, 64, 1000]),
    "temperature": st.sampled_from([0.0, 0.7, "hot"]),
    "stop_token": st.sampled_from([None, "eos", "stop"]),
    "stop_token_id": st.sampled_from([None, 0, 1, 5, 10**6, -1]),
    "missing_eos_penalty": st.sampled_from([None, 1.0, 0.0, -1.0]),
    "normalize_scores": st.sampled_from([True, False, 1]),
    "score_scale": st.sampled_from([1.0, 0.1, 0.0]),
    "score_clip": st.sampled_from([None, 5.0, 0.0]),
    "kl_coef": st.sampled_from([0.0, 0.05, -0.1]),
    "kl_estimator": st.sampled_from(["k1", "k2", "k3", "abs", "k4"]),
    "kl_placement": st.sampled_from(["reward", "loss", "loss", "both"]),
    "adaptive_kl_target": st.sampled_from([None, 6.0, 6.0, 0.0]),
    "adaptive_kl_horizon": st.sampled_from([None, 8.0, 1000.0, 0.0]),
    "early_stop_kl": st.sampled_from([None, 0.1, 0.0]),
    **GROUPS,
    "whiten_rewards": st.booleans(),
    "whiten_advantages": st.sampled_from([None, True, False, "no"]),
    "cliprange": st.sampled_from([0.2, 0.0]),
    "cliprange_high": st.sampled_from([None, 0.3, 0.0]),
    "dual_clip": st.sampled_from([None, 3.0, 1.0]),
    "loss_aggregation": st.sampled_from(["token_mean", "sequence_mean", "sum"]),
    "entropy_coef": st.sampled_from([0.0, 0.01, -0.01]),
    "vf_coef": st.sampled_from([0.1, 1.0, -1.0]),
    "cliprange_value": st.sampled_from([0.2, 0.5, 0.0]),
    "critic_warmup": st.sampled_from([0, 1, 4, -1]),
    "critic_learning_rate": st.sampled_from([None, 1e-4, 0.0]),
    "gamma": st.sampled_from([0.9, 1.0, 1.1]),
    "lam": st.sampled_from([-0.1, 0.0, 0.9, 1.0]),
    "learning_rate": st.sampled_from([1e-3, 1e-5, 0.0]),
    "lr_scheduler_type": st.sampled_from(["cosine", "constant", "step"]),
    "warmup_steps": st.sampled_from([0, 3, -1]),
    "max_grad_norm": st.sampled_from([0.0, 1.0, 2.0, -1.0]),
    "save_steps": st.sampled_from([1, 1000, -1]),
    "seed": st.sampled_from([0, 7, 8, 2**31]),
    "eval_steps": st.sampled_from([None, 1, 0]),
    "model_adapter_name": ADAPTER_NAMES,
    "ref_adapter_name": ADAPTER_NAMES,
}
LENGTHS = st.fixed_dictionaries(
    {},
    optional={
        "overlong": st.sampled_from(["refuse", "drop", "truncate", "cut"]),
        "max_length": st.sampled_from([None, 1, 8, 9, 47, 48, 49, 0]),
    },
)
RESOURCES = st.fixed_dictionaries(
    {},
    optional={
        "gpus": st.sampled_from([1, 2, 3, 5, 0]),
        "zero_stage": st.sampled_from([0, 1, 2, 3, 4]),
        "precision": st.sampled_from(["fp32", "bf16", "bf16", "fp16"]),
    },
)
VALUES = st.sampled_from([{"type": "head"}, {"type": "model"}]) | st.sampled_from(CRITICS).map(
    lambda name: {"type": "model", "source": local(name)}
)
TARGETS = st.sampled_from(["all-linear", ["c_attn"], ["attn.c_attn"], ["c_attn", "q_proj"], []])
FULL = st.fixed_dictionaries({"type": st.just("full")}, optional={"value": VALUES})
LORA = st.fixed_dictionaries(
    {"type": st.just("lora")},
    optional={
        "r": st.sampled_from([4, 4, 16, 0]),
        "lora_alpha": st.sampled_from([8, 8, 32, 0]),
        "target_modules": TARGETS,
        "adapters": st.just({"sft": local("sft")}),
        "value": VALUES,
    },
)
REWARD = st.one_of(
    st.fixed_dictionaries({"type": st.just("length"), "target": st.sampled_from([1, 5, 5, 0])}),
    st.fixed_dictionaries({"type": st.just("regex"), "pattern": st.sampled_from(["ok", "ok", "(", ""])}),
    st.fixed_dictionaries(
        {"type": st.just("string_check")},
        optional={
            "reference": st.just("x"),
            "column": st.sampled_from(["y", "y", "z"]),
            "operation": st.sampled_from(["eq", "in"]),
        },
    ),
    st.sampled_from(JUDGES).map(lambda name: {"type": "model", "source": local(name)}),
)
REWARDS = st.lists(REWARD, min_size=1, max_size=3).flatmap(
    lambda rewards: st.lists(st.sampled_from("abcdefgh"), min_size=len(rewards), max_size=len(rewards)).map(
        lambda names: [{**reward, "name": name} for reward, name in zip(rewards, names, strict=True)]
    )
)


def few(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """A few of the fields, so that many specs come to the rules between fields and models.

    Often the estimator and its groups are among them: more rules hang on these than chance would find.
    """
    names = st.lists(st.sampled_from(sorted(fields)), unique=True, max_size=4)
    return (names | names.map(lambda some: [*some, *(set(GROUPS) - set(some))])).flatmap(
        lambda names: st.fixed_dictionaries({name: fields[name] for name in names})
    )


# Who says what -----------------------------------------------------------------------------------------


def told(issues: list[Issue]) -> Told:
    return sorted((tuple(issue.loc), issue.msg) for issue in issues)


def api_says(client: httpx.Client, raw: dict[str, Any]) -> Told:
    """What both ways into the API say: the dry run, and the job itself, which is deleted again."""
    estimate = client.post("/v1/jobs/estimate", json={"spec": raw})
    job = client.post("/v1/jobs", json={"spec": raw})
    if estimate.status_code == 200:
        assert job.status_code == 201, job.text
        deleted = client.post(f"/v1/jobs/{job.json()['id']}/cancel")
        assert deleted.status_code == 200, deleted.text
        return []
    assert (estimate.status_code, job.status_code) == (422, 422), job.text
    assert estimate.json()["issues"] == job.json()["issues"]
    issues = [Issue.model_validate(issue) for issue in job.json()["issues"]]
    assert all(issue.loc[0] == "spec" for issue in issues)
    return told([Issue(loc=issue.loc[1:], msg=issue.msg) for issue in issues])


def engine_says(raw: dict[str, Any], models: Path, output_dir: str) -> Told:
    try:
        run = parse(raw)
        placed = run.model_dump(mode="json")
        for loc, source in sources(run):
            assert isinstance(source, LocalModel)
            part: Any = placed
            for step in loc:
                part = part[step]
            part["path"] = str(models / source.path)
        run = parse(placed)
        columns = {field: PROMPT for field in ("train", "eval") if getattr(run.prompts, field) is not None}
        facts = read_facts(run, ROWS, columns)
        PPOConfig.from_spec(run, facts, output_dir, use_cpu=True, report_to="none")
    except SpecError as error:
        return told(error.issues)
    return []


def trainer_says(
    ppo: dict[str, Any], model: ModelFacts, target_modules: str | list[str], output_dir: str
) -> tuple[Told, bool]:
    """What a script is told, where its arguments are the same hyperparameters; and whether it is all.

    A rule that needs no model is told by the arguments, before the trainer sees model and prompts.
    """
    args = None
    try:
        args = PPOConfig(
            output_dir=output_dir,
            use_cpu=True,
            bf16=False,
            report_to="none",
            **{"gradient_checkpointing": False, **ppo},
        )
        check_args(args, ROWS, model, target_modules)
    except SpecError as error:
        issues = told([Issue(loc=_in_spec(issue.loc), msg=issue.msg) for issue in error.issues])
        return issues, args is not None
    return [], True


def _in_spec(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Where a script's argument stands in a spec."""
    section = {"model": (), "peft_config": ("method",)}.get(str(loc[0]))
    if section is None:
        return ("ppo", *loc)
    return (*section, *(loc if loc[0] == "model" else loc[1:]))


@pytest.fixture(scope="module")
def file_id(service: Running) -> str:
    with service.client("one-rule") as client:
        return upload(client, *[PROMPT] * ROWS)


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[httpx.Client]:
    with service.client("one-rule") as client:
        yield client


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("trainer"))


def case(ppo: dict[str, Any], method: dict[str, Any], resources: dict[str, Any], *, held_out: bool) -> Any:
    """A spec that is tried in any case, since chance seldom brings its parts together."""
    parts = {"policy": "tiny", "rewards": None, "resources": resources, "held_out": held_out, "lengths": {}}
    return example(ppo=ppo, method=method, **parts)


RLOO = {"advantage_estimator": "rloo", "num_return_sequences": 2}
SFT = {"type": "lora", "adapters": {"sft": local("sft")}}
SAME = {**SFT, "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]}
CRITIC = {"type": "full", "value": {"type": "model", "source": local("two-labels")}}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@case({"ref_adapter_name": "sft"}, SFT, {}, held_out=False)
@case({"ref_adapter_name": "sft"}, SAME, {}, held_out=False)
@case({"model_adapter_name": "sft", "ref_adapter_name": "sft"}, SAME, {}, held_out=False)
@case({"eval_steps": 1}, CRITIC, {"gpus": 2, "zero_stage": 3, "precision": "bf16"}, held_out=True)
@case({"kl_placement": "loss"}, {"type": "lora"}, {}, held_out=False)
@case({"kl_placement": "loss", "kl_estimator": "k2"}, {"type": "lora"}, {}, held_out=False)
@case({"adaptive_kl_target": 6.0, "adaptive_kl_horizon": 4.0}, {"type": "lora"}, {}, held_out=False)
@case({"adaptive_kl_target": 6.0, "kl_coef": 0.0}, {"type": "full"}, {}, held_out=False)
@case({"adaptive_kl_horizon": 100.0}, {"type": "full"}, {}, held_out=False)
@case({"critic_warmup": 6}, {"type": "full"}, {}, held_out=False)
@case({"advantage_estimator": "rloo"}, {"type": "full"}, {}, held_out=False)
@case({**RLOO, "gamma": 0.9, "vf_coef": 1.0, "critic_warmup": 1}, {"type": "lora"}, {}, held_out=False)
@case(RLOO, {"type": "lora", "value": {"type": "head"}}, {}, held_out=False)
@case(RLOO, {"type": "full"}, {"gpus": 2}, held_out=False)
@case({"advantage_estimator": "reinforce++", "gamma": 0.9}, {"type": "lora"}, {}, held_out=False)
@case({"num_return_sequences": 3}, {"type": "lora"}, {}, held_out=False)
@case({"total_episodes": 16, "whiten_rewards": True}, {"type": "full"}, {"gpus": 3}, held_out=False)
@given(
    ppo=few(PPO),
    policy=st.sampled_from(POLICIES),
    method=FULL | LORA,
    rewards=st.none() | REWARDS,
    resources=st.just({}) | RESOURCES,
    held_out=st.booleans(),
    lengths=st.just({}) | LENGTHS,
)
def test_api_and_engine_accept_the_same_and_refuse_with_the_same_words(
    client: httpx.Client,
    file_id: str,
    varied: Path,
    output_dir: str,
    ppo: dict[str, Any],
    policy: str,
    method: dict[str, Any],
    rewards: list[dict[str, Any]] | None,
    resources: dict[str, Any],
    held_out: bool,
    lengths: dict[str, Any],
) -> None:
    parts = {} if rewards is None else {"rewards": rewards}
    prompts = {"train": file_id, **({"eval": file_id} if held_out else {}), **lengths}
    raw = spec(file_id, model=local(policy), prompts=prompts, method=method, resources=resources, **parts)
    raw["ppo"] = {"response_length": 16, **ppo}

    assert api_says(client, raw) == engine_says(raw, varied, output_dir)


SCRIPT_PPO = {
    **PPO,
    # What transformers refuses by itself, with words of its own, is left out.
    "lr_scheduler_type": st.sampled_from(["cosine", "constant"]),
    "warmup_steps": st.sampled_from([0, 3]),
}
for name in (
    "eval_steps",
    "model_adapter_name",
    "ref_adapter_name",
    "missing_eos_penalty",
):  # a script has its own ways
    SCRIPT_PPO.pop(name)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    ppo=few(SCRIPT_PPO),
    policy=st.sampled_from(POLICIES),
    target_modules=st.sampled_from(["all-linear", ["c_attn"], ["c_attn", "q_proj"]]),
)
def test_a_script_is_told_what_the_api_tells(
    client: httpx.Client,
    file_id: str,
    varied: Path,
    output_dir: str,
    ppo: dict[str, Any],
    policy: str,
    target_modules: str | list[str],
) -> None:
    raw = spec(file_id, model=local(policy), method={"type": "lora", "target_modules": target_modules})
    raw["ppo"] = {"response_length": 16, **ppo}
    from_api = api_says(client, raw)
    facts = read_model_facts(varied / policy)
    from_trainer, is_all = trainer_says(raw["ppo"], facts, target_modules, output_dir)

    if is_all:
        assert from_api == from_trainer
    else:
        # The API tells rules between fields before it looks at batches; arguments tell both at once.
        common = [issue for issue in from_api if issue in from_trainer]
        assert common
        assert common in (from_api, from_trainer)
