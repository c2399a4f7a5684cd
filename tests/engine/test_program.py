"""`python -m ppo_engine` as its worker uses it: a real process, killed, stopped, and resumed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ppo_engine import program
from ppo_engine.__main__ import main
from ppo_engine.events import Event, read_complete
from ppo_engine.run_dir import Acks, Control, Reason, Result, RunDir
from tests.engine import tiny
from tests.engine.training import PROMPTS, make_run

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
UPDATES = 6
PATIENCE = 300.0


def command(run_dir: RunDir, attempt: int = 1) -> list[str]:
    return [sys.executable, "-m", "ppo_engine", str(run_dir.path), "--attempt", str(attempt)]


@contextmanager
def engine(
    run_dir: RunDir, attempt: int = 1, around: list[str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A running engine; its output goes to engine.log, and it is gone afterwards."""
    with run_dir.log.open("ab") as log:
        process = subprocess.Popen(
            [*(around or []), *command(run_dir, attempt)], env=ENVIRONMENT, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finish(run_dir: RunDir, attempt: int = 1) -> Result:
    """Run to the end, in this process; what the engine says of it."""
    main([str(run_dir.path), "--attempt", str(attempt)])
    result = run_dir.read_result()
    assert result is not None
    return result


def events(run_dir: RunDir) -> list[Event]:
    return read_complete(run_dir.events)[0]


def keys(run_dir: RunDir) -> list[str]:
    return [event.key for event in events(run_dir)]


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[bytes]) -> None:
    """Poll, since a file is what the engine speaks through; fail when it ends first, or takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, "the engine ended first"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def timeless(run_dir: RunDir) -> list[dict[str, Any]]:
    """The events, without what no repeated run repeats."""
    kept = [event.model_dump(exclude={"time"}) for event in events(run_dir)]
    for event in kept:
        event["data"] = {n: v for n, v in event["data"].items() if not n.startswith("time/") and n != "eps"}
    return kept


def digest(run_dir: RunDir, update: int = UPDATES) -> str:
    return hashlib.sha256((run_dir.export(update) / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, policy_dir: Path) -> RunDir:
    """A run that nobody interrupted."""
    run_dir = make_run(tmp_path_factory.mktemp("whole") / "run", policy_dir)
    with engine(run_dir) as process:
        assert process.wait(PATIENCE) == 0, run_dir.log.read_text()
    return run_dir


def test_a_run_says_what_it_does(whole: RunDir) -> None:
    said = events(whole)

    assert said[0].type == "started"
    assert [event.key for event in said if event.type == "metrics"] == [f"metrics:{n}" for n in range(1, 7)]
    assert [event.update for event in said if event.type == "checkpoint"] == [2, 4, 6]
    assert said[-1].type == "finished"
    assert len({event.key for event in said}) == len(said)
    samples = next(event for event in said if event.type == "samples").data["samples"]
    assert isinstance(samples, list)
    assert set(samples[0]) == {"kind", "prompt", "response", "score", "rewards"}  # type: ignore[arg-type]
    plan = said[0].data["plan"]
    assert isinstance(plan, dict)
    assert plan["num_total_batches"] == UPDATES
    assert whole.read_result() == Result(
        outcome="succeeded", reason="finished", update=6, message="All 6 updates are done."
    )


def test_checkpoints_are_few_and_exports_hold_the_policy_alone(whole: RunDir) -> None:
    assert whole.complete_checkpoints() == [4, 6]
    assert whole.complete_exports() == [2, 4, 6]
    weights = load_file(whole.export(6) / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)
    assert not list(whole.path.rglob("*partial*"))
    adapter = json.loads((whole.export(6) / "adapter_config.json").read_text())
    assert adapter["r"] == 4
    assert json.loads((whole.export(6) / "generation_config.json").read_text())["eos_token_id"] == 15


def test_an_export_names_its_base_and_not_where_it_lies(whole: RunDir, policy_dir: Path) -> None:
    adapter = json.loads((whole.export(6) / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == policy_dir.name
    for file in whole.export(6).iterdir():
        assert str(policy_dir).encode() not in file.read_bytes(), file.name


@pytest.mark.parametrize("moment", ["metrics:1", "samples:3", "metrics:4", "checkpoint:4", "metrics:6"])
def test_a_killed_run_resumes_to_the_same_bytes(
    tmp_path: Path, policy_dir: Path, whole: RunDir, moment: str
) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir)
    with engine(run_dir) as process:
        wait_until(lambda: moment in keys(run_dir), process)
    assert run_dir.read_result() is None

    assert finish(run_dir).outcome == "succeeded"
    assert digest(run_dir) == digest(whole)
    assert timeless(run_dir) == timeless(whole)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, policy_dir: Path) -> RunDir:
    """A run that nobody interrupted, evaluated at times when no checkpoint is made."""
    run_dir = make_evaluated(tmp_path_factory.mktemp("evaluated") / "run", policy_dir)
    assert finish(run_dir).outcome == "succeeded"
    return run_dir


def make_evaluated(directory: Path, policy_dir: Path) -> RunDir:
    steps = {"eval_steps": 3, "save_steps": 4, "total_episodes": 16 * 7}
    run_dir = make_run(directory, policy_dir, ppo=steps, prompts={"train": "file_1", "eval": "file_2"})
    run_dir.data("file_2").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS[40:47]))
    return run_dir


# Before any checkpoint, between an evaluation and its checkpoint, and with one to repeat after a checkpoint.
@pytest.mark.parametrize("moment", ["evaluation:3", "samples:6", "metrics:7", "evaluation:7"])
def test_a_killed_run_neither_repeats_nor_loses_an_evaluation(
    tmp_path: Path, policy_dir: Path, evaluated: RunDir, moment: str
) -> None:
    run_dir = make_evaluated(tmp_path / "run", policy_dir)
    with engine(run_dir) as process:
        wait_until(lambda: moment in keys(run_dir), process)
    assert finish(run_dir).outcome == "succeeded"

    said = [event for event in events(run_dir) if event.type in ("evaluation", "samples")]
    assert [event.update for event in said if event.type == "evaluation"] == [3, 6, 7]
    assert {event.update for event in said if event.type == "samples"} == set(range(1, 8))
    assert len({event.key for event in said}) == len(said)
    assert timeless(run_dir) == timeless(evaluated)


def test_another_attempt_goes_on_in_another_directory(
    tmp_path: Path, policy_dir: Path, whole: RunDir
) -> None:
    run_dir = make_run(tmp_path / "a2", policy_dir)
    run_dir.checkpoints.mkdir()
    shutil.copytree(whole.checkpoint(4), run_dir.checkpoint(4))

    assert finish(run_dir, attempt=2).outcome == "succeeded"
    assert digest(run_dir) == digest(whole)
    assert keys(run_dir)[:2] == ["rewound:a2:4", "checkpoint:4"]
    assert events(run_dir)[0].data == {"to": 4}
    assert run_dir.complete_exports() == [4, 6]  # the checkpoint's export may never have been taken away
    assert [key for key in keys(run_dir) if key.startswith("metrics")] == ["metrics:5", "metrics:6"]


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, policy_dir: Path, whole: RunDir) -> None:
    run_dir = RunDir(tmp_path / "run")
    shutil.copytree(whole.path, run_dir.path)
    state = run_dir.checkpoint(6) / "training_state.pt"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    (run_dir.checkpoints / ".update-8.partial").mkdir()

    assert finish(run_dir).outcome == "succeeded"
    assert digest(run_dir) == digest(whole)
    warning = next(event for event in events(run_dir) if event.type == "warning")
    assert "update-6 is damaged" in str(warning.data["message"])


@pytest.mark.parametrize(("wanted", "reason"), [("pause", "pause"), ("cancel", "cancel")])
def test_what_is_wanted_is_done_at_the_end_of_the_update(
    tmp_path: Path, policy_dir: Path, whole: RunDir, wanted: Any, reason: Reason
) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir, ppo={"save_steps": 100})
    with engine(run_dir) as process:
        wait_until(lambda: "metrics:1" in keys(run_dir), process)
        run_dir.write_control(Control(wanted=wanted))
        process.wait(PATIENCE)
    result = run_dir.read_result()

    assert result is not None
    assert (result.outcome, result.reason) == ("stopped", reason)
    assert 1 < result.update < UPDATES
    assert run_dir.complete_checkpoints() == run_dir.complete_exports() == [result.update]
    run_dir.write_control(Control(wanted="run"))
    assert finish(run_dir).outcome == "succeeded"
    assert digest(run_dir) == digest(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_with_a_checkpoint(tmp_path: Path, policy_dir: Path, number: signal.Signals) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir)
    with engine(run_dir) as process:
        wait_until(lambda: "metrics:1" in keys(run_dir), process)
        process.send_signal(number)
        assert process.wait(PATIENCE) == 0
    result = run_dir.read_result()

    assert result is not None
    assert (result.outcome, result.reason) == ("stopped", "sigterm")
    assert run_dir.complete_checkpoints()[-1] == result.update


def test_who_interrupts_twice_does_not_wait_for_the_update(tmp_path: Path, policy_dir: Path) -> None:
    run_dir = make_run(
        tmp_path / "run", policy_dir, ppo={"total_episodes": 2**20, "gradient_accumulation_steps": 2**18}
    )
    with engine(run_dir) as process:
        wait_until(lambda: "started" in keys(run_dir), process)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        assert process.wait(PATIENCE) == 0
    result = run_dir.read_result()

    assert result is not None
    assert (result.outcome, result.update) == ("stopped", 0)
    assert result.message == "Interrupted in update 1; the last checkpoint stands."


def test_a_run_whose_lease_is_over_stops_by_itself(tmp_path: Path, policy_dir: Path) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir)
    run_dir.write_control(Control(lease_until=time.time() - 1))
    with engine(run_dir) as process:
        process.wait(PATIENCE)
    result = run_dir.read_result()

    assert result is not None
    assert (result.outcome, result.reason) == ("stopped", "lease")
    assert result.update <= 1


def test_a_run_whose_parent_is_gone_stops_by_itself(tmp_path: Path, policy_dir: Path) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir, ppo={"total_episodes": 16 * 500})
    shell = ["sh", "-c", '"$@" & wait', "sh"]
    with engine(run_dir, around=shell) as parent:
        wait_until(lambda: "metrics:1" in keys(run_dir), parent)
        parent.kill()
    deadline = time.monotonic() + PATIENCE
    while run_dir.read_result() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    result = run_dir.read_result()

    assert result is not None
    assert (result.outcome, result.reason) == ("stopped", "parent")


def test_checkpoints_that_are_not_safe_elsewhere_stay(tmp_path: Path, policy_dir: Path) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir, ppo={"save_steps": 1})
    run_dir.write_acks(Acks())
    with engine(run_dir) as process:
        wait_until(lambda: "metrics:3" in keys(run_dir), process)
        assert run_dir.complete_checkpoints() == [1, 2]  # the third waits until the first is safe
        assert "checkpoint:3" not in keys(run_dir)
        run_dir.write_acks(Acks(checkpoints=tuple(range(1, UPDATES + 1))))
        process.wait(PATIENCE)
    assert run_dir.complete_checkpoints() == [5, 6]


# What cannot be ----------------------------------------------------------------------------------------


def never(*_: Any) -> None:
    raise AssertionError("no model is loaded for a run that cannot be")


def change_spec(run_dir: RunDir, **changes: Any) -> None:
    run_dir.spec.write_text(json.dumps({**json.loads(run_dir.spec.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "reason", "loc", "words"),
    [
        ({"colour": "red"}, "spec", ("colour",), "unknown field"),
        ({"model": {"type": "local", "path": "/nowhere"}}, "spec", ("model",), "not a directory"),
        ({"prompts": {"train": "file_2"}}, "spec", ("prompts", "train"), "no file_2.jsonl"),
        (
            {"prompts": {"train": {"type": "hub", "repo": "org/prompts"}}},
            "spec",
            ("prompts", "train"),
            "no hub-train.jsonl. Only a worker brings data sets of the hub",
        ),
        (
            {"method": {"type": "lora", "target_modules": ["c_attn"]}},
            "spec",
            ("method", "target_modules", 0),
            "c_attn",
        ),
        (
            {"rewards": [{"type": "plugin", "name": "x", "plugin": "nobody"}]},
            "spec",
            ("rewards", 0, "plugin"),
            "nobody",
        ),
    ],
)
def test_a_run_that_cannot_be_says_why(
    tmp_path: Path, policy_dir: Path, changes: dict[str, Any], reason: str, loc: tuple[Any, ...], words: str
) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir)
    change_spec(run_dir, **changes)
    result = finish(run_dir)

    assert (result.outcome, result.reason) == ("failed", reason)
    assert [issue.loc for issue in result.issues] == [loc]
    assert words in result.issues[0].msg


@pytest.mark.parametrize(
    ("resources", "name", "words"),
    [
        ({"gpus": 4}, "gpus", "4 given, but the run was started with 1: .*--num_processes 4 --multi_gpu"),
        ({"zero_stage": 3}, "zero_stage", "3 given, but the run was started with 0: .*--zero_stage 3"),
    ],
)
def test_a_run_that_was_not_started_as_planned_is_refused(
    tmp_path: Path, policy_dir: Path, resources: dict[str, Any], name: str, words: str
) -> None:
    result = finish(make_run(tmp_path / "run", policy_dir, resources=resources))

    assert (result.outcome, result.reason) == ("failed", "spec")
    assert [issue.loc for issue in result.issues] == [("resources", name)]
    assert re.match(words, result.issues[0].msg)


def test_a_spec_nested_beyond_reading_is_refused(tmp_path: Path, policy_dir: Path) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir)
    run_dir.spec.write_text("[" * 100_000)

    assert finish(run_dir).reason == "spec"


def test_a_library_that_cannot_be_imported_is_told(tmp_path: Path, policy_dir: Path) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir)
    (tmp_path / "torch.py").write_text("raise ImportError('libcuda.so is of another time')")
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    subprocess.run(command(run_dir), env=environment, stderr=subprocess.DEVNULL, check=False)
    result = run_dir.read_result()

    assert result is not None
    assert (result.outcome, result.reason) == ("failed", "crash")
    assert result.message == "ImportError: libcuda.so is of another time"


@pytest.mark.parametrize(("given", "seen"), [({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")])
def test_torch_is_told_of_huge_pages_before_it_is_imported(
    tmp_path: Path, policy_dir: Path, given: dict[str, str], seen: str
) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir)
    (tmp_path / "torch.py").write_text("import os\nraise ImportError(os.environ['THP_MEM_ALLOC_ENABLE'])")
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{ROOT}", **given}
    subprocess.run(command(run_dir), env=environment, stderr=subprocess.DEVNULL, check=False)
    result = run_dir.read_result()

    assert result is not None
    assert result.message == f"ImportError: {seen}"


@pytest.mark.parametrize(
    ("resources", "loc", "words"),
    [
        ({"precision": "bf16"}, ("resources", "precision"), 'bf16" given; .* give "fp32"'),
        ({"zero_stage": 2}, ("resources", "zero_stage"), "2 given; this machine has no DeepSpeed: give 0"),
    ],
)
def test_what_this_machine_lacks_is_told_before_anything_is_loaded(
    tmp_path: Path,
    policy_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    resources: dict[str, Any],
    loc: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.setattr(program, "has_bf16", lambda: False)
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    monkeypatch.setattr(program, "load", never)
    result = finish(make_run(tmp_path / "run", policy_dir, resources=resources))

    assert (result.outcome, result.reason) == ("failed", "spec")
    assert [issue.loc for issue in result.issues] == [loc]
    assert re.search(words, result.issues[0].msg)


def test_prompts_that_leave_no_room_are_named(tmp_path: Path, policy_dir: Path) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir)
    rows = [PROMPTS[0], {"prompt": "one " * 30}, *PROMPTS[:30]]
    run_dir.data("file_1").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = finish(run_dir)

    assert (result.outcome, result.reason) == ("failed", "spec")
    assert result.issues[0].loc == ("prompts", "train")
    assert "Row 2 " in result.issues[0].msg
    assert "31 tokens" in result.issues[0].msg


def test_a_mistake_of_the_user_leaves_no_trace_in_the_log(tmp_path: Path, policy_dir: Path) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir, ppo={"response_length": 32})
    with engine(run_dir) as process:
        process.wait(PATIENCE)
    assert "response_length: 32 given" in run_dir.log.read_text()
    assert "Traceback" not in run_dir.log.read_text()


def copy_of(whole: RunDir, directory: Path) -> tuple[RunDir, dict[str, Any]]:
    shutil.copytree(whole.path, directory)
    run_dir = RunDir(directory)
    run_dir.result.unlink(missing_ok=True)
    return run_dir, json.loads(run_dir.spec.read_text())


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("ppo", {"gamma": 0.5}, "(gamma: 1.0 then, 0.5 now)"),
        ("method", {"lora_alpha": 5}, "method.lora_alpha: 32 then, 5 now"),
        ("rewards", {"pattern": "six"}, "(rewards.0.pattern: 'seven' then, 'six' now)"),
    ],
)
def test_a_checkpoint_of_another_spec_is_refused_before_a_model_is_loaded(
    tmp_path: Path,
    whole: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    changes: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.setattr(program, "load", never)
    run_dir, spec = copy_of(whole, tmp_path / "run")
    given = spec[part]
    changed = [{**given[0], **changes}] if isinstance(given, list) else {**given, **changes}
    change_spec(run_dir, **{part: changed})
    result = finish(run_dir)

    assert (result.outcome, result.reason) == ("failed", "spec")
    assert words in result.message


def test_a_checkpoint_of_other_prompts_is_refused(tmp_path: Path, whole: RunDir) -> None:
    run_dir, _ = copy_of(whole, tmp_path / "run")
    rows = [*PROMPTS[1:], PROMPTS[0]]
    run_dir.data("file_1").write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert "(prompts: '100 rows, sha256 " in finish(run_dir).message


def test_a_model_that_lies_elsewhere_is_the_same(tmp_path: Path, policy_dir: Path, whole: RunDir) -> None:
    elsewhere = tmp_path / "elsewhere" / policy_dir.name
    shutil.copytree(policy_dir, elsewhere)
    run_dir, _ = copy_of(whole, tmp_path / "run")
    change_spec(run_dir, model={"type": "local", "path": str(elsewhere)})

    assert finish(run_dir).outcome == "succeeded"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bf16_trains_and_begins_at_the_reference(tmp_path: Path, policy_dir: Path, method: str) -> None:
    run_dir = make_run(
        tmp_path / "run",
        policy_dir,
        ppo={"total_episodes": 32},
        method={"type": method},
        resources={"precision": "bf16"},
    )
    assert finish(run_dir).outcome == "succeeded"

    first, second = metrics(run_dir, "objective/kl")
    assert first == 0
    assert second != 0
    assert metrics(run_dir, "optimizer_steps") == [4.0, 4.0]


# Several processes -------------------------------------------------------------------------------------

LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"),
    *("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", "--no_python"),
]


def two_processes(run_dir: RunDir, *kind: str) -> Result:
    with engine(run_dir, around=[*LAUNCH, *kind]) as process:
        process.wait(2 * PATIENCE)
    result = run_dir.read_result()
    assert result is not None, run_dir.log.read_text()
    assert result.outcome == "succeeded", result
    return result


def metrics(run_dir: RunDir, name: str) -> list[Any]:
    return [event.data[name] for event in events(run_dir) if event.type == "metrics"]


SAME = {"total_episodes": 32, "save_steps": 1, "num_mini_batches": 2}


def half(ppo: dict[str, Any]) -> dict[str, Any]:
    return {**ppo, "gradient_accumulation_steps": 2}


def test_two_processes_train_as_one_does(tmp_path: Path, policy_dir: Path) -> None:
    one = make_run(tmp_path / "one", policy_dir, ppo=SAME)
    two = make_run(tmp_path / "two", policy_dir, ppo=half(SAME), resources={"gpus": 2})
    assert finish(one).outcome == "succeeded"
    two_processes(two, "--multi_gpu")

    assert "find_unused_parameters" not in two.log.read_text()  # torch's words for a search in vain
    assert metrics(one, "objective/scores") == metrics(two, "objective/scores")
    for name in ("loss/policy_avg", "loss/value_avg", "policy/grad_norm", "objective/kl"):
        assert metrics(one, name) == pytest.approx(metrics(two, name), rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("method", ["lora", "full"])
def test_zero_3_trains_as_one_process_does_and_saves_the_policy_whole(
    tmp_path: Path, policy_dir: Path, method: str
) -> None:
    one = make_run(tmp_path / "one", policy_dir, ppo=SAME, method={"type": method})
    two = make_run(
        tmp_path / "two",
        policy_dir,
        ppo=half(SAME),
        method={"type": method},
        resources={"gpus": 2, "zero_stage": 3},
    )
    assert finish(one).outcome == "succeeded"
    two_processes(two, "--use_deepspeed", "--zero_stage", "3")

    assert metrics(one, "policy/grad_norm") == pytest.approx(metrics(two, "policy/grad_norm"), rel=1e-2)
    file = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    alone, sharded = load_file(one.export(1) / file), load_file(two.export(1) / file)
    assert alone.keys() == sharded.keys()
    for name, weight in alone.items():
        assert weight.shape == sharded[name].shape
        assert weight.sub(sharded[name]).abs().max() < 1e-2, name
    assert not any(name.startswith("value") or "score" in name for name in sharded)
    assert (
        len(tiny.WORDS) in {shape for weight in sharded.values() for shape in weight.shape}
        or method == "lora"
    )
