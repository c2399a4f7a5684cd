"""The rules of a spec: each wrong field is named with what was given, the rule, and the fix."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import regex

from ppo_engine.findings import IDENTIFIER, NAME, rule_and_fix
from ppo_engine.hyperparameters import Hyperparameters
from ppo_engine.issues import MAX_ISSUES, SpecError, shown
from ppo_engine.model_sources import HubModel
from ppo_engine.spec import (
    SPEC_VERSION,
    Lora,
    RunSpec,
    ValueHead,
    ValueModel,
    critic,
    data_id,
    identity,
    parse,
    sources,
    upgrade,
)


def raw(**changes: Any) -> dict[str, Any]:
    """A spec that keeps every rule, with changes."""
    return {
        "model": {"type": "local", "path": "walks"},
        "prompts": {"train": "file_1"},
        "rewards": [{"type": "length", "name": "short", "target": 5}],
        **changes,
    }


def issues(spec: object) -> dict[str, str]:
    with pytest.raises(SpecError) as error:
        parse(spec)
    return {".".join(map(str, issue.loc)): issue.msg for issue in error.value.issues}


def test_a_spec_needs_a_model_prompts_and_rewards_only() -> None:
    spec = parse(raw())

    assert isinstance(spec.method, Lora)
    assert critic(spec) == ValueHead()
    assert parse(spec.model_dump(mode="json")) == spec
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("method", "ppo", "expected"),
    [
        ({"type": "lora"}, {}, ValueHead()),
        ({"type": "full"}, {}, ValueModel()),
        ({"type": "full", "value": {"type": "head"}}, {}, ValueHead()),
        ({"type": "full"}, {"advantage_estimator": "reinforce++"}, None),
    ],
)
def test_the_critic_follows_from_method_and_estimator(
    method: dict[str, Any], ppo: dict[str, Any], expected: object
) -> None:
    assert critic(parse(raw(method=method, ppo=ppo))) == expected


@pytest.mark.parametrize(
    ("changes", "loc", "words"),
    [
        ({"optimiser": "adam"}, "optimiser", ['"adam"', "unknown field"]),
        ({"method": {"type": "lora", "rank": 8}}, "method.rank", ["8", "unknown field"]),
        ({"method": {"type": "lora", "r": "8"}}, "method.r", ['"8"', "integer"]),
        ({"method": {"type": "lora", "target_modules": []}}, "method.target_modules", ["[]", "at least 1"]),
        ({"ppo": {"cliprange": -0.1}}, "ppo.cliprange", ["-0.1", "greater than 0", "give a number above 0"]),
        (
            {"ppo": {"kl_estimator": "k9"}},
            "ppo.kl_estimator",
            ['"k9"', "'k1', 'k2', 'k3' or 'abs'", "give one of these"],
        ),
        ({"ppo": []}, "ppo", ["[] given", "JSON object", "in braces"]),
        ({"rewards": {}}, "rewards", ["{} given", "JSON array", "in brackets"]),
        ({"model": {}}, "model", ["{} given", "'type' is missing", "name it"]),
        ({"ppo": {"missing_eos_penalty": -1.0}}, "ppo.missing_eos_penalty", ["-1.0", "greater than 0"]),
        ({"ppo": {"missing_eos_penalty": 1.0}}, "ppo.missing_eos_penalty", ["1.0", "stop_token"]),
        ({"ppo": {"learning_rate": float("nan")}}, "ppo.learning_rate", ["NaN", "finite"]),
        (
            {"ppo": {"stop_token": "eos", "stop_token_id": 0}},
            "ppo.stop_token_id",
            ["0", '"eos"', "exclude each other"],
        ),
        ({"ppo": {"eval_steps": 5}}, "ppo.eval_steps", ["5", "prompts.eval"]),
        (
            {"method": {"type": "full"}, "ppo": {"ref_adapter_name": "sft"}},
            "ppo.ref_adapter_name",
            ['"sft"', "full fine-tuning"],
        ),
        ({"ppo": {"ref_adapter_name": "sft"}}, "ppo.ref_adapter_name", ['"sft"', "method.adapters"]),
        ({"rewards": []}, "rewards", ["[]", "at least 1"]),
        (
            {"rewards": [{"type": "lenght", "name": "x", "target": 5}]},
            "rewards.0",
            [
                "lenght",
                "'model', 'adapter', 'string_check', 'text_similarity'",
                "'regex', 'length', 'plugin'",
            ],
        ),
        (
            {"rewards": [{"type": "regex", "name": "x", "pattern": "("}]},
            "rewards.0.pattern",
            ['"("', "regular expression"],
        ),
        (
            {"rewards": [{"type": "string_check", "name": "x"}]},
            "rewards.0.reference",
            ["null", "exactly one"],
        ),
        (
            {"rewards": [{"type": "plugin", "name": "x", "plugin": "p", "options": {"api_key": "sk-1"}}]},
            "rewards.0.options.api_key",
            ["A text given", "a spec holds none", '{"secret": "NAME"}'],
        ),
        (
            {"rewards": [{"type": "plugin", "name": "x", "plugin": "p", "options": {"k": {"secret": "b"}}}]},
            "rewards.0.options.k",
            ['"b"', "in capitals"],
        ),
        ({"prompts": {"train": "../../etc/passwd"}}, "prompts.train", ["../../etc/passwd"]),
        ({"prompts": {"train": 3}}, "prompts.train", ["3 given"]),
        ({"prompts": {"train": {"type": "hub", "repo": "nobody"}}}, "prompts.train.repo", ['"owner/name"']),
        ({"prompts": {"train": {"repo": "a/b"}}}, "prompts.train.type", ["required"]),
        (
            {"prompts": {"train": {"type": "hub", "repo": "a/b", "splits": "train"}}},
            "prompts.train.splits",
            ["unknown field"],
        ),
        ({"model": {"type": "hub", "repo": "nobody"}}, "model.repo", ['"nobody"']),
    ],
)
def test_a_broken_rule_names_field_value_and_rule(
    changes: dict[str, Any], loc: str, words: list[str]
) -> None:
    found = issues(raw(**changes))

    assert list(found) == [loc]
    assert all(word in found[loc] for word in words), found[loc]


def test_two_rewards_of_one_name_are_refused() -> None:
    reward = {"type": "length", "name": "short", "target": 5}

    assert '"short"' in issues(raw(rewards=[reward, reward]))["rewards.1.name"]


def test_every_wrong_field_is_told_at_once() -> None:
    found = issues(raw(model=3, ppo={"gamma": 2.0, "lam": -1.0}, colour="red"))

    assert set(found) == {"model", "ppo.gamma", "ppo.lam", "colour"}


@pytest.mark.parametrize("given", [None, 3, [], "spec", {}])
def test_what_is_no_spec_is_refused(given: object) -> None:
    assert issues(given)


def test_an_older_version_is_read_and_a_newer_one_refused() -> None:
    assert upgrade(raw(), SPEC_VERSION) == raw()
    with pytest.raises(SpecError, match="version"):
        upgrade(raw(), SPEC_VERSION + 1)


def test_of_very_many_wrong_fields_the_first_are_told_and_the_rest_counted() -> None:
    wrong = {f"field{number}": number for number in range(70_000)}
    with pytest.raises(SpecError) as caught:
        parse(raw(**wrong))

    *told, last = caught.value.issues
    assert [issue.loc for issue in told] == [(name,) for name in list(wrong)[:MAX_ISSUES]]
    assert f"{70_000 - MAX_ISSUES} more things are wrong" in last.msg


def test_of_very_many_broken_rules_the_first_are_told_and_the_rest_counted() -> None:
    options = {f"api_key{number}": "" for number in range(1000)}
    found = issues(raw(rewards=[{"type": "plugin", "name": "x", "plugin": "p", "options": options}]))

    assert len(found) == MAX_ISSUES + 1
    assert "950 more" in found[""]


def test_no_number_of_a_run_is_beyond_what_32_bits_hold() -> None:
    numbers = [
        (name, field)
        for name, field in Hyperparameters.model_json_schema()["properties"].items()
        for field in field.get("anyOf", [field])
        if field.get("type") in ("integer", "number")
    ]
    assert len(numbers) > 25
    for name, field in numbers:
        biggest = 10**400 if field["type"] == "integer" else 1e308
        given = {"stop_token": "eos"} if name == "missing_eos_penalty" else {}
        assert "give" in issues(raw(ppo={**given, name: biggest}))[f"ppo.{name}"], name
    for reward in (
        {"type": "length", "name": "x", "target": 10**400},
        {"type": "length", "name": "x", "target": 1, "weight": -1e308},
        {"type": "regex", "name": "x", "pattern": "a", "match": 1e308},
        {"type": "regex", "name": "x", "pattern": "a", "no_match": 1e308},
    ):
        assert issues(raw(rewards=[reward]))
    assert "method.lora_alpha" in issues(raw(method={"type": "lora", "lora_alpha": 10**400}))


@pytest.mark.parametrize("name", ["temperature", "adam_epsilon"])
def test_what_is_divided_by_does_not_vanish_in_32_bits(name: str) -> None:
    assert "or more" in issues(raw(ppo={name: 1e-320}))[f"ppo.{name}"]


def test_a_value_is_shown_whatever_it_is() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "[" * 80 + "…"
    assert shown({"a": 10**5000}) == '{"a": …'
    assert shown({"b": [1, None, "ü"]}) == '{"b": [1, null, "ü"]}'
    while deep:  # taken apart by hand: to free it at once would recurse
        deep = deep[0]


def test_every_form_of_text_is_told_in_words() -> None:
    schema = str(RunSpec.model_json_schema())
    patterns = set(regex.findall(r"'pattern': '(\^.*?\$)'", schema))
    assert {IDENTIFIER, NAME} <= patterns
    for pattern in patterns:
        found = rule_and_fix("string_pattern_mismatch", "", {"pattern": pattern.replace(r"\\", "\\")})
        assert "form" not in found, pattern


@pytest.mark.parametrize(
    "module",
    [
        *("", ".findings", ".issues", ".patterns", ".hyperparameters", ".reward_kinds", ".model_sources"),
        *(".spec", ".facts", ".plan", ".events", ".run_dir", ".watch"),
    ],
)
def test_the_contract_loads_no_torch(module: str) -> None:
    program = f"import sys, ppo_engine{module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(("field", "value"), [("precision", "bf16"), ("zero_stage", 2)])
def test_precision_and_sharding_belong_to_a_run(field: str, value: object) -> None:
    """A run does not go on with others; with another number of processes it is refused by its world size."""
    name = f"resources.{field}"
    own, other = (identity(parse(given)) for given in (raw(), raw(resources={field: value})))
    assert {key for key in own if own[key] != other[key]} == {name}
    assert other[name] == value


def test_models_of_the_hub_can_be_put_at_their_commits() -> None:
    hub = {"type": "hub", "repo": "org/model"}
    spec = parse(raw(model=hub, rewards=[{"type": "model", "name": "judge", "source": hub}]))
    pinned = spec.at({("model",): "0123abc", ("rewards", 0, "source"): "4567def"})
    assert [(loc, source.revision) for loc, source in sources(pinned) if isinstance(source, HubModel)] == [
        (("model",), "0123abc"),
        (("rewards", 0, "source"), "4567def"),
    ]


def test_prompts_of_the_hub_are_known_by_their_commit() -> None:
    source = {"type": "hub", "repo": "org/prompts", "split": "test"}
    spec = parse(raw(prompts={"train": source, "eval": "file_1"}))
    assert spec.prompts.files() == {"file_1"}
    assert [data_id(*each) for each in spec.prompts.sources().items()] == ["hub-train", "file_1"]

    pinned = spec.at({("prompts", "train"): "0123abc"})
    assert pinned.prompts.eval == "file_1"
    assert str(pinned.prompts.train) == "org/prompts@0123abc (test)"
    differing = set(identity(spec).items()) ^ set(identity(pinned).items())
    assert differing == {("prompts.train.revision", "main"), ("prompts.train.revision", "0123abc")}
    assert identity(parse(raw()))["prompts.train"] == "file_1"
