"""Two processes, plain and under DeepSpeed, do what one does; and where one of them fails, all say why.

What they do stands in `ranks.py`. Two groups of processes are started, and each goes through many scenarios.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine import ranks
from tests.engine.test_program import ENVIRONMENT, LAUNCH, PATIENCE
from tests.engine.training import PROMPTS

Seen = Callable[[str], list[Any]]

PLAIN = (
    "full",
    "lora",
    "resume",
    "warmup",
    "warmup_full",
    "two_steps",
    "drawn_apart",
    "chosen",
    "in_turns",
    "out_of_memory",
    "reward_out_of_memory",
    "diverged",
    "reward_fails",
    "stopped_twice",
    "slow_uploads",
    "roles",
    "spec_for_one_process",  # its processes do not find each other; no scenario can follow
)
SHARDED = (
    *("gathered", "rollout_fails", "in_step", "diverged_in_step", "zero_3_in_turns"),
    *("zero_1", "zero_2", "zero_3", "zero_2_bf16"),
    *("zero_1_roles", "zero_2_roles", "zero_3_roles"),
    *("zero_2_warmup", "zero_3_warmup", "zero_2_chosen"),
    *("zero_1_offload", "zero_2_offload", "zero_3_offload"),
    *("zero_1_drawn_apart", "zero_2_drawn_apart", "zero_3_drawn_apart"),
    *("zero_1_resume", "zero_2_resume", "zero_3_resume", "nothing_to_load"),
    *("zero_2_spoiled", "zero_3_spoiled", "zero_2_spoiled_bf16", "zero_3_spoiled_bf16"),
)


def start(directory: Path, scenarios: tuple[str, ...], *kind: str) -> Seen:
    """Two processes go through the scenarios; what each saw of one, by rank."""
    program = [sys.executable, "-m", "tests.engine.ranks", str(directory), *scenarios]
    log = directory / "log"
    with (
        log.open("wb") as file,
        subprocess.Popen([*LAUNCH, *kind, *program], env=ENVIRONMENT, stdout=file, stderr=file) as process,
    ):
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.terminate()

    def seen(scenario: str) -> list[Any]:
        files = sorted(directory.glob(f"{scenario}.?.json"))
        assert len(files) == 2, f"{scenario} did not end:\n{log.read_text()[-8000:]}"
        told = [json.loads(file.read_text()) for file in files]
        assert all("seen" in one for one in told), told
        return [one["seen"] for one in told]

    return seen


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return start(tmp_path_factory.mktemp("plain"), PLAIN, "--multi_gpu")


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return start(tmp_path_factory.mktemp("zero"), SHARDED, "--use_deepspeed", "--zero_stage", "3")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    """What one process says and exports: with adapters (True), and in full (False)."""
    directory = tmp_path_factory.mktemp("alone")
    return {lora: ranks.trained(directory / str(lora), 0, lora=lora) for lora in (True, False)}


@pytest.fixture(scope="module")
def four_roles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ranks.roles(tmp_path_factory.mktemp("roles"))


def assert_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same metrics and the same export, but for the order in which numbers were summed."""
    for name, values in one["said"].items():
        assert other["said"][name][: len(values)] == pytest.approx(values, rel=1e-3, abs=1e-5), name
    assert one.get("export", {}).keys() == other.get("export", {}).keys()
    for name, (shape, size) in one.get("export", {}).items():
        assert other["export"][name] == [shape, pytest.approx(size, rel=1e-3)], name


# Plain data parallelism --------------------------------------------------------------------------------


def test_all_weights_dense_rewards_and_whitening_are_as_in_one_process(plain: Seen, tmp_path: Path) -> None:
    one = ranks.full(tmp_path)

    assert one["said"]["optimizer_steps"] == [4.0] * 3
    for two in plain("full"):
        assert_alike(one, two)
        for alone, together in zip(one["evaluated"], two["evaluated"], strict=True):
            assert together == pytest.approx(alone)
    first, second = plain("full")
    assert first["shown"] == [
        {**sample, "score": pytest.approx(sample["score"]), "rewards": pytest.approx(sample["rewards"])}
        for sample in one["shown"]
    ]
    assert len(first["shown"]) == 12
    assert second["shown"] == [], "the main process alone shows them"


def test_adapters_are_as_in_one_process(plain: Seen, alone: dict[bool, Any]) -> None:
    for two in plain("lora"):
        assert_alike(alone[True], two)
        assert all("lora_" in name for name in two["export"])


def test_the_same_experience_gives_the_same_gradient_and_steps(plain: Seen, tmp_path: Path) -> None:
    """Every number to 1e-4 of the greatest of its tensor; only the order of sums differs, in fp32."""
    one = ranks.two_steps(tmp_path)

    for two in plain("two_steps"):
        for kind, numbers in one.items():
            assert two[kind].keys() == numbers.keys()
            for name, row in numbers.items():
                tolerance = 1e-4 * max(map(abs, row))
                assert two[kind][name] == pytest.approx(row, rel=0, abs=tolerance), (kind, name)
    assert any(one["gradients"]["policy.model.rare"])
    assert "policy.model.unused" not in one["gradients"]
    assert one["weights"]["policy.model.unused"] == [1.0] * 3, "weight decay leaves it, too"


@pytest.mark.parametrize(
    ("group", "scenario"),
    [("plain", "drawn_apart"), *(("zero", f"zero_{stage}_drawn_apart") for stage in (1, 2, 3))],
)
def test_all_processes_begin_with_the_weights_of_the_first(
    request: pytest.FixtureRequest, tmp_path: Path, group: str, scenario: str
) -> None:
    one = ranks.drawn_apart(tmp_path)

    assert all(one.values())
    for two in request.getfixturevalue(group)(scenario):
        assert two == one


def test_memory_that_ends_on_one_process_makes_all_take_fewer_rows(
    plain: Seen, alone: dict[bool, Any]
) -> None:
    first, second = plain("out_of_memory")

    assert_alike(alone[True], first)
    assert first == second
    assert {warning["work"] for warning in first["heard"]} == {"rollout", "scoring", "update"}


def test_memory_that_ends_in_a_reward_on_one_process_is_agreed_on_by_all(plain: Seen, tmp_path: Path) -> None:
    one = ranks.reward_out_of_memory(tmp_path)
    first, second = plain("reward_out_of_memory")

    assert_alike(one, first)
    assert first == second
    assert first["heard"][-1]["rows"] <= 2, "the others go on with as few rows, and are told of it"
    assert {warning["work"] for warning in first["heard"]} == {"reward"}
    assert first["halvings"]["reward"] > 0
    assert 'Reward "model": Out of memory (reward): a single row' in first["end"], "nobody waits for it"


def test_a_reward_sees_every_response_once(plain: Seen) -> None:
    first, second = plain("full")

    rows = [row["prompt"] for row in PROMPTS[:5]]
    # Sampled, then greedy.
    assert first["seen"] == [*rows[:3] * 2, *rows[:1] * 2]
    assert second["seen"] == rows[3:] * 2


@pytest.mark.parametrize(
    ("group", "scenario"),
    [
        ("plain", "resume"),
        ("zero", "zero_1_resume"),
        ("zero", "zero_2_resume"),
        ("zero", "zero_3_resume"),
        ("zero", "zero_3_offload"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    request: pytest.FixtureRequest, group: str, scenario: str
) -> None:
    for seen in request.getfixturevalue(group)(scenario):
        assert seen == {"same weights": True, "same metrics": True, "moved": True, "updates": 3}


@pytest.mark.parametrize(
    ("group", "scenario"),
    [("plain", "warmup"), ("plain", "warmup_full"), ("zero", "zero_2_warmup"), ("zero", "zero_3_warmup")],
)
def test_the_critic_learns_first_and_alone(request: pytest.FixtureRequest, group: str, scenario: str) -> None:
    for seen in request.getfixturevalue(group)(scenario):
        assert seen["policy moved"] == [False, False, False, True]
        assert seen["critic moved"] == [True] * 4
        # A fresh AdamW's first step is as long as the learning rate.
        assert seen["first step"] == pytest.approx(1.0, abs=1e-3)
        assert (seen["lr"], seen["lr/critic"]) == ([0.0, 0.0, 0.0, 3e-3], [3e-3] * 4)


@pytest.mark.parametrize(("group", "scenario"), [("plain", "chosen"), ("zero", "zero_2_chosen")])
def test_choices_of_the_algorithm_are_as_in_one_process(
    request: pytest.FixtureRequest, tmp_path: Path, group: str, scenario: str
) -> None:
    one = ranks.chosen(tmp_path)

    assert one["gae"]["optimizer_steps"] != [4.0] * 3  # some of its updates end early
    for two in request.getfixturevalue(group)(scenario):
        for name, metrics in one.items():
            assert_alike({"said": metrics}, {"said": two[name]})


@pytest.mark.parametrize(("group", "scenario"), [("plain", "in_turns"), ("zero", "zero_3_in_turns")])
def test_processes_take_unlike_numbers_of_turns(
    request: pytest.FixtureRequest, tmp_path: Path, group: str, scenario: str
) -> None:
    one = ranks.in_turns(tmp_path)

    answered = [row for row, written in enumerate(one["written"]) if not all(written)]
    assert len(answered) > 2
    assert max(answered) < 6
    assert request.getfixturevalue(group)(scenario) == [one, one]


def test_a_reward_that_fails_on_one_process_is_the_reason_on_all(plain: Seen) -> None:
    for seen in plain("reward_fails"):
        assert (seen["status"], seen["outcome"], seen["reason"]) == (1, "failed", "reward")
        assert seen["message"] == 'Reward "seven" failed: OSError: the disk is on fire'


@pytest.mark.parametrize(("group", "scenario"), [("plain", "diverged"), ("zero", "diverged_in_step")])
def test_a_policy_that_diverged_on_one_process_is_the_reason_on_all(
    request: pytest.FixtureRequest, group: str, scenario: str
) -> None:
    for seen in request.getfixturevalue(group)(scenario):
        assert "the policy has diverged" in seen


def test_a_signal_to_one_process_or_a_wish_stops_all_at_the_same_update(plain: Seen) -> None:
    for seen in plain("stopped_twice"):
        assert seen["ends"][:2] == [["stopped", "sigterm", 2], ["stopped", "pause", 4]]
        assert seen["ends"][2:] == [["succeeded", "finished", 6]] * 2
        assert seen["same"]
        assert seen["checkpoints"] == [4, 6]


def test_all_processes_stay_awake_while_uploads_lag(plain: Seen) -> None:
    for seen in plain("slow_uploads"):
        assert (seen["outcome"], seen["update"], seen["acks"]) == ("succeeded", 3, [1, 2, 3])


def test_processes_that_were_not_planned_are_refused(plain: Seen) -> None:
    for seen in plain("spec_for_one_process"):
        assert seen["reason"] == "spec"
        assert seen["issues"][0]["loc"] == ["resources", "gpus"]
        assert "1 given, but the run was started with 2" in seen["issues"][0]["msg"]


# DeepSpeed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "lora"),
    [
        ("zero_1", False),
        ("zero_2", True),
        ("zero_3", False),
        ("zero_1_offload", True),
        ("zero_2_offload", False),
    ],
)
def test_every_stage_trains_and_exports_as_one_process_does(
    zero: Seen, alone: dict[bool, Any], scenario: str, lora: bool
) -> None:
    for two in zero(scenario):
        assert two["moved"]
        assert_alike(alone[lora], two)
        assert not any("score" in name or "value" in name for name in two["export"])


@pytest.mark.parametrize("scenario", ["gathered", "in_step"])
def test_sharded_weights_sample_rows_that_end_at_different_times(
    zero: Seen, tmp_path: Path, scenario: str
) -> None:
    one, two = ranks.uneven(tmp_path, gathers=True), zero(scenario)

    for seen in two:
        assert seen["responses"] == one["responses"]
        assert_alike({"said": one["said"]}, {"said": seen["said"]})
    is_even = two[0]["forwards"] == two[1]["forwards"]
    assert is_even == (scenario == "in_step")


def test_while_the_policy_is_whole_to_sample_the_critic_stays_in_shards(zero: Seen) -> None:
    for seen in zero("gathered"):
        assert seen["held"] == {"whole": ["policy"], "in shards": ["critic"]}
    for seen in zero("in_step"):
        assert seen["held"] == {"whole": [], "in shards": ["critic", "policy"]}


def test_weights_are_sharded_again_after_a_rollout_that_failed(zero: Seen) -> None:
    assert zero("rollout_fails") == [[], []]


def test_bf16_trains_under_deepspeed(zero: Seen) -> None:
    for seen in zero("zero_2_bf16"):
        assert seen["moved"]
        assert seen["said"]["optimizer_steps"] == [4.0] * 3
        assert seen["said"]["objective/kl"][0] == 0


@pytest.mark.parametrize("stage", [2, 3])
def test_steps_that_are_not_finite_are_not_taken_and_leave_nothing_behind(
    zero: Seen, alone: dict[bool, Any], stage: int
) -> None:
    first_update = {name: values[:1] for name, values in alone[False]["said"].items()}
    for seen in [*zero(f"zero_{stage}_spoiled"), *zero(f"zero_{stage}_spoiled_bf16")]:
        assert [error.split(" in a row")[0][-17:] for error in seen["errors"]] == [
            "3 optimizer steps",
            "4 optimizer steps",
        ]
        assert seen["untouched"]
        assert seen["said"]["optimizer_steps"] == [4.0]
        assert seen["said"]["objective/kl"] == [pytest.approx(0.0, abs=1e-5)]
    for seen in zero(f"zero_{stage}_spoiled"):
        assert_alike({"said": first_update}, {"said": seen["said"]})


def test_a_checkpoint_that_deepspeed_does_not_load_is_named(zero: Seen) -> None:
    for empty, unread in zero("nothing_to_load"):
        assert empty.endswith("empty holds no DeepSpeed state that can be loaded.")
        assert unread.endswith("unread holds no DeepSpeed state that can be loaded.")


# Four roles on one base --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "scenario"),
    [("plain", "roles"), ("zero", "zero_1_roles"), ("zero", "zero_2_roles"), ("zero", "zero_3_roles")],
)
def test_four_roles_on_one_base_are_as_in_one_process(
    request: pytest.FixtureRequest, four_roles: dict[str, Any], group: str, scenario: str
) -> None:
    assert four_roles["switched"] == [True] * 4
    assert four_roles["moved"] == [False, True]
    for two in request.getfixturevalue(group)(scenario):
        assert_alike(four_roles, two)
        assert_alike({**four_roles, "export": four_roles["merged"]}, {**two, "export": two["merged"]})
        for what in ("switched", "moved", "untouched"):
            assert two[what] == four_roles[what]
