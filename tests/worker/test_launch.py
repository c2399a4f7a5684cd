"""How an engine is started: devices, command, environment."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from ppo_engine.issues import SpecError
from ppo_engine.spec import Resources, Tracker, parse
from tests.engine.test_spec import raw
from worker import launch

ENGINE = (sys.executable, "-m", "ppo_engine")

RANK = """
import json, os, sys
names = ["RANK", "WORLD_SIZE", "ACCELERATE_DEEPSPEED_ZERO_STAGE"]
told = {name: os.environ.get(name) for name in names} | {"arguments": sys.argv[1:]}
open(f"rank-{os.environ['RANK']}", "w").write(json.dumps(told))
"""


def test_a_single_process_is_started_directly() -> None:
    command = launch.command(ENGINE, (), Resources(), Path("/runs/a2"), 2)
    assert command == [*ENGINE, "/runs/a2", "--attempt", "2"]


def test_the_operators_launcher_stands_in_front() -> None:
    launcher = ("srun", "--ntasks={processes}")
    command = launch.command(ENGINE, launcher, Resources(gpus=4), Path("/runs/a1"), 1)
    assert command == ["srun", "--ntasks=4", *ENGINE, "/runs/a1", "--attempt", "1"]


@pytest.mark.parametrize(
    ("resources", "stage"), [(Resources(gpus=2), None), (Resources(gpus=2, zero_stage=2), "2")]
)
def test_several_processes_are_started_without_a_gpu_and_whatever_the_users_configuration(
    tmp_path: Path, resources: Resources, stage: str | None
) -> None:
    config = tmp_path / "home" / "accelerate" / "default_config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("num_processes: 1\ndistributed_type: 'NO'\nmixed_precision: bf16\nuse_cpu: true\n")
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": ""}

    command = launch.command((sys.executable, str(program)), (), resources, tmp_path / "run", 1)
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)

    ranks = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in range(2)]
    assert [rank["WORLD_SIZE"] for rank in ranks] == ["2", "2"]
    assert {rank["ACCELERATE_DEEPSPEED_ZERO_STAGE"] for rank in ranks} == {stage}
    assert [rank["arguments"] for rank in ranks] == [[str(tmp_path / "run"), "--attempt", "1"]] * 2


def test_a_sharded_run_on_one_gpu_is_launched_too() -> None:
    command = launch.command(ENGINE, (), Resources(zero_stage=3), Path("/runs/a1"), 1)
    assert "--use_deepspeed" in command
    assert command[command.index("--zero_stage") + 1] == "3"
    assert "--offload_optimizer_device" not in command


def test_an_optimizer_is_offloaded_where_that_is_asked_for() -> None:
    resources = Resources(zero_stage=2, offload="optimizer")
    command = launch.command(ENGINE, (), resources, Path("/runs/a1"), 1)
    assert command[command.index("--offload_optimizer_device") + 1] == "cpu"


@pytest.mark.parametrize("gpus", [1, 2, 3])
def test_resources_are_refused_at_their_field_or_launched_as_they_are(gpus: int) -> None:
    """By accelerate's own reading of the command; what each really starts, `tests/engine` runs."""
    for stage, offload, precision in product((0, 1, 2, 3), ("none", "optimizer"), ("fp32", "bf16")):
        given = {"gpus": gpus, "zero_stage": stage, "offload": offload, "precision": precision}
        if (stage, offload) == (0, "optimizer"):
            with pytest.raises(SpecError) as caught:
                parse(raw(resources=given))
            assert [issue.loc for issue in caught.value.issues] == [("resources", "offload")]
            continue
        resources = parse(raw(resources=given)).resources
        command = launch.command(ENGINE, (), resources, Path("/runs/a1"), 1)
        if (gpus, stage) == (1, 0):
            assert command[: len(ENGINE)] == [*ENGINE]
            continue
        assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
        read = launch_command_parser().parse_args(command[3:])
        assert (read.num_processes, read.use_deepspeed, read.multi_gpu) == (gpus, stage > 0, stage == 0)
        assert not stage or int(read.zero_stage) == stage
        assert (read.offload_optimizer_device == "cpu") == (offload == "optimizer")
        assert [read.training_script, *read.training_script_args] == [*ENGINE, "/runs/a1", "--attempt", "1"]


def test_devices_are_those_of_the_driver_or_of_cudas_own_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    monkeypatch.setattr(launch, "DRIVER", tmp_path / "gpus")
    assert launch.find_gpus({}) == ("0", "1")
    assert launch.find_gpus({"CUDA_VISIBLE_DEVICES": "1"}) == ("1",)
    assert launch.find_gpus({"CUDA_VISIBLE_DEVICES": "MIG-a, MIG-b"}) == ("MIG-a", "MIG-b")
    assert launch.find_gpus({"CUDA_VISIBLE_DEVICES": ""}) == ()
    assert launch.find_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == ()


def test_where_the_driver_is_hidden_its_program_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "DRIVER", tmp_path / "hidden")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch.find_gpus({"CUDA_VISIBLE_DEVICES": "0"}) == (), "no driver, no GPU"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: H200 (UUID: GPU-1)'\necho '  MIG 1g.18gb (UUID: MIG-1)'\n")
    program.chmod(0o755)
    assert launch.find_gpus({}) == ("0",)


def test_the_environment_is_what_is_allowed_and_no_more() -> None:
    given = {
        "PATH": "/bin",
        "HF_TOKEN": "hub",
        "NCCL_DEBUG": "INFO",
        "LC_ALL": "C",
        "MY_REWARD_URL": "http://here",
        "PROXIMA_DATABASE_URL": "postgresql://user:secret@host/name",
        "PROXIMA_KEY_SECRET": "secret",
        "CELERY_BROKER_URL": "redis://:secret@host",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "PGPASSWORD": "secret",
    }
    environment = launch.environment(given, ("MY_REWARD_URL",), ("0", "1"), allow_hub=False)
    assert "secret" not in " ".join(environment.values())
    kept = {name: environment.get(name) for name in given if name in environment}
    assert kept == {
        name: given[name] for name in ("PATH", "HF_TOKEN", "NCCL_DEBUG", "LC_ALL", "MY_REWARD_URL")
    }
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert environment["HF_HUB_OFFLINE"] == "1", "where the operator allows no models of the hub"
    assert "HF_HUB_OFFLINE" not in launch.environment(given, (), (), allow_hub=True)


def test_a_tracker_is_told_what_is_its_own_where_the_run_reports_to_it() -> None:
    given = {
        "WANDB_API_KEY": "key",
        "WANDB_MODE": "offline",
        "WANDB_RUN_ID": "one for all",
        "WANDB_LOG_MODEL": "end",
        "MLFLOW_TRACKING_URI": "http://mlflow",
        "MLFLOW_RUN_ID": "one for all",
        "TENSORBOARD_LOGGING_DIR": "/boards",
    }

    def kept(*trackers: Tracker) -> set[str]:
        return set(given) & set(launch.environment(given, (), (), allow_hub=True, trackers=trackers))

    assert kept() == set()
    assert kept("wandb") == {"WANDB_API_KEY", "WANDB_MODE"}
    assert kept("mlflow", "tensorboard") == {"MLFLOW_TRACKING_URI", "TENSORBOARD_LOGGING_DIR"}


def test_the_engine_is_found_from_another_directory(tmp_path: Path) -> None:
    environment = launch.environment({"PYTHONPATH": "/mine"}, (), (), allow_hub=True)
    assert environment["PYTHONPATH"].endswith(":/mine")
    code = "import ppo_engine.spec"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
