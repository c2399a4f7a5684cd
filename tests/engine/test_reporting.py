"""Trackers: what TensorBoard, Weights & Biases, and MLflow have of a run, read back from their own files.

Nothing leaves the machine: W&B writes offline, MLflow into a file. Every run is a process of its own, since
trackers keep theirs in globals.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from ppo_engine.__main__ import main
from ppo_engine.config import PPOConfig
from ppo_engine.events import Event, read_complete
from ppo_engine.issues import SpecError
from ppo_engine.reporting import environment
from ppo_engine.run_dir import RunDir
from ppo_engine.spec import identity, parse
from tests.engine.training import PROMPTS, make_run

pytestmark = pytest.mark.filterwarnings(
    # MLflow's store uses what SQLAlchemy 2.1 deprecates.
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)
ROOT = Path(__file__).parents[2]
TRACKERS = ("tensorboard", "wandb", "mlflow")
Curves = dict[int, dict[str, float]]
Table = list[dict[str, Any]]

SCRIPT = """
import json, sys
from pathlib import Path
from transformers import TrainerCallback
from transformers.integrations import WandbCallback
import wandb
from tests.engine.training import PROMPTS, trainer

class EndsWandb(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 2:
            wandb.finish()

directory, ends = Path(sys.argv[1]), sys.argv[2] == "ends"
ours = trainer(
    directory / "output",
    changes={
        "report_to": ["tensorboard", "wandb", "mlflow"],
        "run_name": "polite",
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
    eval_dataset={"some": PROMPTS[:4], "others": PROMPTS[4:11]},
    callbacks=[EndsWandb] if ends else None,
)
ours.train()
ours.generate_completions()
(directory / "history.json").write_text(json.dumps(ours.state.log_history))
assert ours.pop_callback(WandbCallback) is not None, "a script finds it by its class"
"""


def places(directory: Path) -> dict[str, str]:
    """An operator's environment: where trackers write."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "MLFLOW"))}
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(directory),
        "TENSORBOARD_LOGGING_DIR": str(directory / "boards"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{directory}/mlflow.db",
    }


def script(directory: Path, how: str) -> str:
    """Run the script; what it printed."""
    command = [sys.executable, "-c", SCRIPT, str(directory), how]
    done = subprocess.run(command, env=places(directory), cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def engine(run_dir: RunDir, variables: dict[str, str], attempt: int = 1) -> list[Event]:
    """Run a job's attempt to its end; what it said."""
    command = [sys.executable, "-m", "ppo_engine", str(run_dir.path), "--attempt", str(attempt)]
    with run_dir.log.open("ab") as log:
        subprocess.run(command, env=variables, cwd=run_dir.path, stdout=log, stderr=log, check=False)
    result = run_dir.read_result()
    assert result is not None
    assert result.outcome == "succeeded", run_dir.log.read_text()
    return read_complete(run_dir.events)[0]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a script's trackers wrote, and its own history beside it."""
    directory = tmp_path_factory.mktemp("script")
    script(directory, "whole")
    return directory


# Readers -------------------------------------------------------------------------------------------------


def wandb_records(path: Path) -> Iterator[Record]:
    """The records of an offline run: LevelDB's log format, behind a header of seven bytes."""
    written, at, whole = path.read_bytes(), 7, b""
    while at < len(written):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(written[at + 4 : at + 6], "little"), written[at + 6]
        whole += written[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def wandb_runs(directory: Path) -> list[Path]:
    return sorted(directory.glob("wandb/offline-run-*/run-*.wandb"))


def wandb_curves(path: Path) -> Curves:
    curves: Curves = defaultdict(dict)
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            update = items.pop("train/global_step")
            if "completions/path" not in items:
                curves[update] |= {name: value for name, value in items.items() if not name.startswith("_")}
    return curves


def wandb_tables(path: Path) -> list[Table]:
    """In the order in which they were logged."""
    found = []
    for record in wandb_records(path):
        items = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if name := items.get("completions/path"):
            read = json.loads((path.parent / "files" / name).read_text())
            found.append([dict(zip(read["columns"], row, strict=True)) for row in read["data"]])
    return found


def wandb_config(path: Path) -> dict[str, Any]:
    return {
        item.key: json.loads(item.value_json)
        for record in wandb_records(path)
        if record.WhichOneof("record_type") == "config"
        for item in record.config.update
    }


def board(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()


def board_curves(directory: Path) -> Curves:
    curves: Curves = defaultdict(dict)
    events = board(directory)
    for name in events.Tags()["scalars"]:
        for point in events.Scalars(name):
            curves[point.step][name] = point.value
    return curves


def board_tables(directory: Path) -> list[str]:
    """Markdown, in the order in which they were written."""
    points = board(directory).Tensors("completions/text_summary")
    return [point.tensor_proto.string_val[0].decode() for point in points]


def mlflow_table(run: Run, update: int) -> Table:
    """All that was logged for an update."""
    place = Path(run.info.artifact_uri.removeprefix("file://")) / "completions" / f"update-{update}.json"
    read = json.loads(place.read_text())
    return [dict(zip(read["columns"], row, strict=True)) for row in read["data"]]


def rounded(table: Table) -> Table:
    """MLflow keeps ten decimals."""
    return [{k: round(v, 8) if isinstance(v, float) else v for k, v in row.items()} for row in table]


def mlflow_runs(database: Path, experiment: str) -> list[Run]:
    client = MlflowClient(f"sqlite:///{database}")
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def mlflow_curves(database: Path, experiment: str) -> Curves:
    client = MlflowClient(f"sqlite:///{database}")
    curves: Curves = defaultdict(dict)
    for run in mlflow_runs(database, experiment):
        for name in run.data.metrics:
            for point in client.get_metric_history(run.info.run_id, name):
                curves[point.step][name] = point.value
    return curves


def prefixed(curves: Curves) -> Curves:
    """As TensorBoard and W&B name them."""
    return {
        update: {
            name if name.startswith("eval/") else f"train/{name}": value for name, value in metrics.items()
        }
        for update, metrics in curves.items()
    }


def assert_same(found: Curves, expected: Curves) -> None:
    assert found.keys() == expected.keys()
    for update, metrics in expected.items():
        assert found[update] == pytest.approx(metrics, rel=1e-6)


def history(directory: Path) -> Curves:
    """A script's own log, by update."""
    curves: Curves = defaultdict(dict)
    for entry in json.loads((directory / "history.json").read_text()):
        curves[entry.pop("step")] |= entry
    return curves


def said(events: list[Event]) -> Curves:
    """The metrics that a job told as events, and what Trainer adds to them."""
    curves: Curves = defaultdict(dict)
    for event in events:
        if event.type in ("metrics", "evaluation"):
            curves[event.update] |= event.data  # type: ignore[arg-type]
    return curves


def without_epoch(curves: Curves) -> Curves:
    return {
        update: {name: value for name, value in metrics.items() if not name.endswith("epoch")}
        for update, metrics in curves.items()
    }


# Scripts -------------------------------------------------------------------------------------------------


def test_every_metric_of_a_script_arrives_with_its_update(scripted: Path) -> None:
    expected = history(scripted)
    assert expected.keys() == {1, 2, 3}
    assert {"objective/kl", "eval/some/scores", "eval/others/greedy/scores"} <= expected[2].keys()

    assert_same(board_curves(scripted / "boards"), prefixed(expected))
    assert_same(wandb_curves(wandb_runs(scripted)[0]), prefixed(expected))
    assert_same(mlflow_curves(scripted / "mlflow.db", "Default"), expected)


def test_every_completion_that_a_script_generates_stands_in_the_tables(scripted: Path) -> None:
    """Those of the evaluations after updates 2 and 3, then all that were asked for after the training."""
    tables = wandb_tables(wandb_runs(scripted)[0])
    kinds = ["eval/some/greedy"] * 4 + ["eval/others/greedy"] * 7
    assert [[row["update"] for row in table] for table in tables] == [[2] * 18, [3] * 18, [3] * 11]
    assert [row["kind"] for row in tables[2]] == kinds
    assert tables[2][0].keys() == {"update", "kind", "prompt", "response", "score", "reward/likes_seven"}
    assert [row["prompt"] for row in tables[2]] == [row["prompt"] for row in PROMPTS[:11]]
    assert len({row["response"] for row in tables[2]}) > 1
    greedy = [row["score"] for row in tables[1] if row["kind"] == "eval/some/greedy"]
    assert sum(greedy) / 4 == pytest.approx(history(scripted)[3]["eval/some/greedy/scores"])

    (run,) = mlflow_runs(scripted / "mlflow.db", "Default")
    assert rounded(mlflow_table(run, 2)) == rounded(tables[0])
    assert rounded(mlflow_table(run, 3)) == rounded(tables[1] + tables[2])

    texts = board_tables(scripted / "boards")
    assert [text.count("\n") - 1 for text in texts] == [18, 18, 11]
    for text, table in zip(texts, tables, strict=True):
        assert text.splitlines()[0] == f"|{'|'.join(table[0])}|"
        assert text.splitlines()[2] == f"|{'|'.join(map(str, table[0].values()))}|"


def test_a_script_reports_its_arguments_and_its_model(scripted: Path) -> None:
    config = wandb_config(wandb_runs(scripted)[0])
    assert (config["kl_coef"], config["response_length"], config["model_type"]) == (0.05, 8, "llama")

    run = mlflow_runs(scripted / "mlflow.db", "Default")[0]
    assert run.info.run_name == "polite"
    assert (run.data.params["kl_coef"], run.data.params["model_type"]) == ("0.05", "llama")

    events = board(scripted / "boards")
    args, model = (
        events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0]
        for name in ("args", "model_config")
    )
    assert json.loads(args)["kl_coef"] == 0.05
    assert json.loads(model)["model_type"] == "llama"


def test_a_tracker_that_fails_is_told_of_once_and_the_run_goes_on(tmp_path: Path) -> None:
    printed = script(tmp_path, "ends")

    assert [line for line in printed.splitlines() if line.startswith("report_failed")] == [
        line for line in printed.splitlines() if "wandb failed (Error), and is reported to no more" in line
    ]
    assert printed.count("report_failed") == 1
    assert history(tmp_path).keys() == {1, 2, 3}
    assert wandb_curves(wandb_runs(tmp_path)[0]).keys() == {1}
    assert board_curves(tmp_path / "boards").keys() == {1, 2, 3}


@pytest.mark.parametrize("given", ["nowhere", ["tensorboard", "nowhere"]])
def test_a_tracker_that_there_is_not_is_refused(tmp_path: Path, given: str | list[str]) -> None:
    with pytest.raises(SpecError, match=r'"nowhere" given; there are .*wandb') as refused:
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=given)
    assert refused.value.issues[0].loc == ("report_to", 0 if given == "nowhere" else 1)


def test_a_model_that_nothing_loads_is_not_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    PPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="tensorboard")
    with pytest.raises(SpecError, match=r"report_to.0: .*unset it"):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="wandb")


# Jobs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, policy_dir: Path) -> RunDir:
    """The first attempt of a job, done; its trackers write where the operator says."""
    directory = tmp_path_factory.mktemp("jobs")
    run_dir = make_run(
        directory / "job_7" / "a1",
        policy_dir,
        prompts={"train": "file_1", "eval": "file_1"},
        ppo={"eval_steps": 3},
        report_to=list(TRACKERS),
    )
    engine(run_dir, places(directory))
    return run_dir


def operators(run_dir: RunDir) -> Path:
    return run_dir.path.parents[1]


def test_every_metric_of_a_job_arrives_with_its_update(job: RunDir) -> None:
    directory, expected = operators(job), said(read_complete(job.events)[0])
    assert expected.keys() == {1, 2, 3, 4, 5, 6}
    assert "eval/greedy/scores" in expected[3]

    assert_same(without_epoch(board_curves(directory / "boards" / "job_7")), prefixed(expected))
    assert_same(without_epoch(wandb_curves(wandb_runs(directory)[0])), prefixed(expected))
    assert_same(without_epoch(mlflow_curves(directory / "mlflow.db", "proxima")), expected)


def test_the_samples_of_a_job_stand_in_the_tables(job: RunDir) -> None:
    directory = operators(job)
    said = [
        {"update": event.update, **{name: sample[name] for name in ("kind", "prompt", "response", "score")}}
        for event in read_complete(job.events)[0]
        if event.type == "samples"
        for sample in event.data["samples"]  # type: ignore[union-attr]
    ]
    logged = [row for table in wandb_tables(wandb_runs(directory)[0]) for row in table]
    for row in logged:
        row.pop("reward/seven")
    # An event has five of each kind; between evaluations more have been generated.
    assert [row for row in logged if row in said] == said
    assert {row["kind"] for row in logged} == {"eval", "eval/greedy"}

    (run,) = mlflow_runs(directory / "mlflow.db", "proxima")
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(directory / "artifacts")
    assert [row["response"] for row in mlflow_table(run, 3)] == [
        row["response"] for row in logged if row["update"] == 3
    ]
    assert len(board_tables(directory / "boards" / "job_7")) == len({row["update"] for row in logged})


def test_a_job_reports_under_its_own_name(job: RunDir) -> None:
    assert [run.info.run_name for run in mlflow_runs(operators(job) / "mlflow.db", "proxima")] == ["job_7"]
    runs = [
        record.run
        for record in wandb_records(wandb_runs(operators(job))[0])
        if record.WhichOneof("record_type") == "run"
    ]
    assert {(run.display_name, run.project) for run in runs} == {("job_7", "proxima")}


def test_a_resume_goes_on_in_the_same_runs(job: RunDir, tmp_path: Path) -> None:
    """As another worker does it: with a checkpoint from storage, in a directory of the next attempt."""
    directory = tmp_path / "operators"
    shutil.copytree(operators(job), directory)
    second = RunDir(directory / "job_7" / "a2")
    second.path.mkdir()
    shutil.copy(job.spec, second.spec)
    shutil.copytree(job.data_dir, second.data_dir)
    shutil.copytree(job.checkpoint(4), second.checkpoint(4))

    engine(second, places(directory), attempt=2)

    client = MlflowClient(f"sqlite:///{directory}/mlflow.db")
    (run,) = mlflow_runs(directory / "mlflow.db", "proxima")
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "objective/kl")]
    assert sorted(steps) == [1, 2, 3, 4, 5, 5, 6, 6]
    ids = {path.stem.removeprefix("run-") for path in wandb_runs(directory)}
    assert len(wandb_runs(directory)) == 2
    assert len(ids) == 1, "both are sent to one run"
    assert len(list((directory / "boards" / "job_7").iterdir())) == 2


def test_a_resume_begins_a_new_run_where_the_old_is_not_and_may_report_elsewhere(
    job: RunDir, tmp_path: Path
) -> None:
    """The store of the first attempt was on another machine; the operator names no place on this one."""
    second = RunDir(tmp_path / "job_7" / "a2")
    second.path.mkdir(parents=True)
    spec = json.loads(job.spec.read_text()) | {"report_to": ["mlflow"]}
    second.spec.write_text(json.dumps(spec))
    shutil.copytree(job.data_dir, second.data_dir)
    shutil.copytree(job.checkpoint(4), second.checkpoint(4))
    variables = places(tmp_path)
    del variables["MLFLOW_TRACKING_URI"]

    events = engine(second, variables, attempt=2)

    assert not [event for event in events if event.type == "warning"]
    assert mlflow_curves(second.reports / "mlflow.db", "proxima").keys() == {5, 6}
    assert not wandb_runs(tmp_path)


def test_a_job_whose_tracker_is_away_goes_on_and_says_so(policy_dir: Path, tmp_path: Path) -> None:
    run_dir = make_run(
        tmp_path / "run", policy_dir, ppo={"total_episodes": 32}, report_to=["mlflow", "tensorboard"]
    )
    away = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}

    events = engine(run_dir, places(tmp_path) | away)

    assert [event.type for event in events][:2] == ["started", "warning"]
    (warning,) = [event for event in events if event.type == "warning"]
    assert (warning.data["code"], warning.data["tracker"]) == ("report_failed", "mlflow")
    assert "mlflow failed (MlflowException), and is reported to no more" in str(warning.data["message"])
    assert "127.0.0.1" not in json.dumps(warning.data), "where a tracker is, is the operator's"
    assert "mlflow failed: MlflowException: " in run_dir.log.read_text()
    assert board_curves(tmp_path / "boards" / "run").keys() == {1, 2}


def test_a_tracker_that_is_not_installed_is_told_before_any_model_is_loaded(
    policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as Python marks a module that cannot be imported
    weightless = tmp_path / "policy"
    shutil.copytree(policy_dir, weightless, ignore=shutil.ignore_patterns("*.safetensors"))
    (weightless / "model.safetensors").symlink_to(policy_dir / "model.safetensors")
    run_dir = make_run(tmp_path / "run", weightless, report_to=["tensorboard", "mlflow"])

    main([str(run_dir.path)])

    result = run_dir.read_result()
    assert result is not None
    assert (result.outcome, result.reason) == ("failed", "spec")
    (issue,) = result.issues
    assert issue.loc == ("report_to", 1)
    assert "proxima-ppo[reporting]" in issue.msg


def test_what_the_operator_says_holds_and_the_rest_stays_with_the_run(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "job_7" / "a1")

    alone = environment({"PATH": "/bin"}, run_dir, "job_7")
    told = environment({"WANDB_PROJECT": "ours", "WANDB_LOG_MODEL": "end"}, run_dir, "job_7")

    reports = str(run_dir.reports)
    assert alone["WANDB_DIR"] == reports
    assert alone["TENSORBOARD_LOGGING_DIR"].startswith(reports)
    assert alone["MLFLOW_TRACKING_URI"] == f"sqlite:///{reports}/mlflow.db"
    assert "PATH" not in alone
    assert (told["WANDB_PROJECT"], told["WANDB_LOG_MODEL"]) == ("ours", "false")


def test_a_run_is_known_by_its_job_where_it_is_an_attempt_of_one(tmp_path: Path) -> None:
    assert RunDir(tmp_path / "job_7" / "a2").name(2) == "job_7"
    assert RunDir(tmp_path / "a2").name(1) == "a2"


def test_no_tracker_is_named_twice_and_none_is_part_of_what_a_run_is(job: RunDir) -> None:
    raw = json.loads(job.spec.read_text())
    with pytest.raises(SpecError, match='"wandb" given twice') as refused:
        parse(raw | {"report_to": ["wandb", "mlflow", "wandb"]})
    assert refused.value.issues[0].loc == ("report_to", 2)
    assert identity(parse(raw)) == identity(parse(raw | {"report_to": []}))
