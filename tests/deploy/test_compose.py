"""The compose file: valid, complete, without secrets or privileges, and true to the code it starts."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.settings import Settings
from tests.conftest import NewDatabase
from tests.deploy.places import COMPOSE, ROOT, compose, run_tool
from worker import launch
from worker.settings import WorkerSettings

SERVICES: dict[str, Any] = compose()["services"]
OURS = ("migrate", "api", "worker")


def test_follows_the_compose_specification() -> None:
    done = run_tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE))
    assert done.returncode == 0, done.stdout + done.stderr


def test_has_every_part_of_a_production_stack() -> None:
    assert set(SERVICES) == {"postgres", "redis", "migrate", "api", "worker"}


@pytest.mark.parametrize("name", SERVICES)
def test_runs_without_root_and_without_new_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["user"].split(":")[0] not in ("root", "0")
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["cap_drop"] == ["ALL"]
    assert not service.get("privileged")


@pytest.mark.parametrize("name", sorted(set(SERVICES) - {"migrate"}))
def test_is_started_again_when_it_dies(name: str) -> None:
    assert SERVICES[name]["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", ["postgres", "redis", "api", "worker"])
def test_says_when_it_is_healthy(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"]


@pytest.mark.parametrize("name", ["api", "worker"])
def test_starts_after_the_migration_and_a_healthy_broker(name: str) -> None:
    conditions = {on: rule["condition"] for on, rule in SERVICES[name]["depends_on"].items()}
    assert conditions == {"migrate": "service_completed_successfully", "redis": "service_healthy"}


def test_migration_runs_once_after_a_healthy_database() -> None:
    assert SERVICES["migrate"]["restart"] == "no"
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}


def test_secrets_come_from_the_environment_and_have_no_default() -> None:
    references = re.findall(r"\$\{(\w+)([^}]*)\}", COMPOSE.read_text())
    secrets = {(name, rule[:2]) for name, rule in references if re.search("PASSWORD|SECRET", name)}
    assert secrets == {("POSTGRES_PASSWORD", ":?"), ("REDIS_PASSWORD", ":?"), ("PROXIMA_KEY_SECRET", ":?")}


def test_redis_keeps_what_it_is_told() -> None:
    command = " ".join(SERVICES["redis"]["command"])
    assert "--maxmemory-policy noeviction" in command
    assert "--appendonly yes" in command
    assert "--requirepass" in command


def test_worker_reserves_gpus() -> None:
    (device,) = SERVICES["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting_or_the_engines(name: str) -> None:
    settings = WorkerSettings if name == "worker" else Settings
    known = {settings.model_config["env_prefix"] + field.upper() for field in settings.model_fields}
    others = set(SERVICES[name]["environment"]) - known
    assert others == ({"HF_TOKEN"} if name == "worker" else set())
    assert all(launch.PASSED.fullmatch(other) for other in others)


def test_worker_is_given_the_time_that_it_may_take_to_stop() -> None:
    minutes = re.fullmatch(r"(\d+)m", SERVICES["worker"]["stop_grace_period"])
    assert minutes is not None
    settings = WorkerSettings(data_dir=ROOT)
    # The engine ends its update, or is ended; its checkpoint is stored; the job is handed back.
    assert int(minutes[1]) * 60 > 3 * settings.stop_grace_seconds + settings.kill_grace_seconds


@pytest.mark.parametrize(
    ("settings", "healthy"),
    [
        ({}, True),
        ({"PROXIMA_DATABASE_URL": "postgresql://127.0.0.1:1/none"}, False),
        ({"PROXIMA_STORAGE_URL": "file:///dev/null/none"}, False),
    ],
)
def test_worker_is_healthy_when_database_and_storage_answer(
    settings: dict[str, str], healthy: bool, new_sqlite: NewDatabase, tmp_path: Path
) -> None:
    _, program, *arguments = SERVICES["worker"]["healthcheck"]["test"]
    assert program == "python"
    given = {"PROXIMA_DATA_DIR": str(tmp_path), "PROXIMA_DATABASE_URL": new_sqlite(), **settings}
    asked = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=given, capture_output=True, text=True)
    assert (asked.returncode == 0) == healthy, asked.stderr
    assert "SyntaxError" not in asked.stderr


def test_only_the_api_is_published_and_only_to_this_machine() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"api": ["${PROXIMA_LISTEN:-127.0.0.1:8000}:8000"]}


def test_every_volume_is_declared_and_shared_by_those_who_read_it() -> None:
    named = {
        volume.split(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
        if not volume.startswith("${")
    }
    assert named == set(compose()["volumes"])
    assert "storage:/var/lib/proxima/storage" in SERVICES["api"]["volumes"]
    assert "storage:/var/lib/proxima/storage" in SERVICES["worker"]["volumes"]


@pytest.mark.parametrize("name", OURS)
def test_builds_from_a_dockerfile_that_exists(name: str) -> None:
    assert (ROOT / SERVICES[name]["build"]["dockerfile"]).is_file()


@pytest.mark.parametrize("name", OURS)
def test_modules_named_by_its_command_exist(name: str) -> None:
    command = SERVICES[name].get("command") or []
    test = SERVICES[name].get("healthcheck", {}).get("test", [])
    for module in re.findall(r"\b(?:service|worker)(?:\.\w+)*", " ".join([*command, *test])):
        assert importlib.util.find_spec(module), module


def test_example_environment_names_exactly_what_the_compose_file_reads() -> None:
    passed_on = {
        name for part in OURS for name, value in SERVICES[part]["environment"].items() if value is None
    }
    read = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text())) | passed_on
    example = (ROOT / ".env.example").read_text()
    assert set(re.findall(r"^#?(\w+)=", example, re.MULTILINE)) == read


def test_example_environment_holds_no_secret() -> None:
    example = (ROOT / ".env.example").read_text()
    values = dict(re.findall(r"^(\w+)=(.*)$", example, re.MULTILINE))
    assert {name: value for name, value in values.items() if value} == {}
