"""Settings: what follows from the data directory, what is refused, and the secret that is made once."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings, wrong

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"PROXIMA_{name.upper()}", raising=False)


def test_one_directory_holds_everything(tmp_path: Path):
    settings = Settings(data_dir=tmp_path)
    assert settings.database_url == f"sqlite:///{tmp_path}/proxima.db"
    assert settings.broker_url == f"filesystem://{tmp_path}/broker"
    assert settings.storage_url == f"file://{tmp_path}/storage"
    assert settings.runs_dir == tmp_path / "runs"
    assert settings.model_roots == (tmp_path / "models",)


def test_a_relative_directory_is_relative_to_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert Settings().database_url == f"sqlite:///{tmp_path}/proxima-data/proxima.db"
    assert Settings(data_dir="here").data_dir == tmp_path / "here"


def test_what_is_set_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PROXIMA_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("PROXIMA_DATABASE_URL", "postgresql://db/proxima")
    monkeypatch.setenv("PROXIMA_MODEL_ROOTS", '["/models", "/more"]')
    monkeypatch.setenv("PROXIMA_STORAGE_OPTIONS", '{"region": "eu"}')
    monkeypatch.setenv("PROXIMA_ALLOW_HUB_MODELS", "false")
    monkeypatch.setenv("PROXIMA_BROKER_URL", "")
    settings = Settings()
    assert settings.database_url == "postgresql://db/proxima"
    assert settings.model_roots == (Path("/models"), Path("/more"))
    assert settings.storage_options == {"region": "eu"}
    assert settings.allow_hub_models is False
    assert settings.broker_url == f"filesystem://{tmp_path}/broker"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"key_secret": "short"}, "PROXIMA_KEY_SECRET has under 32 characters; make one with"),
        ({"lease_seconds": 15}, "PROXIMA_HEARTBEAT_SECONDS is 10 and PROXIMA_LEASE_SECONDS is 15"),
        ({"lease_seconds": 0}, "greater than 0"),
        ({"max_body_bytes": -1}, "greater than 0"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, object], told: str):
    with pytest.raises(ValidationError, match=re.escape(told)):
        Settings.model_validate(given)


PROGRAMS = [
    ["-m", "service.embedded", "--port", "0"],
    ["-m", "uvicorn", "--factory", "service.main:create_app", "--port", "0"],
    ["-m", "service.admin", "list-keys", "--project", "default"],
    ["-m", "service.migrate"],
    ["-m", "worker"],
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program[1])
def test_a_program_ends_with_a_message_about_a_bad_setting(tmp_path: Path, program: list[str]):
    bad = {"PROXIMA_DATA_DIR": str(tmp_path), "PROXIMA_MODEL_ROOTS": "/a/path", "PROXIMA_ALLOW_CPU": "maybe"}
    if program[1] == "service.embedded":
        program = [*program, "--data-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *program], cwd=REPOSITORY, env={**os.environ, **bad}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert sorted(done.stderr.splitlines()) == [
        'PROXIMA_ALLOW_CPU: "maybe" given; it is true or false: give that.',
        """PROXIMA_MODEL_ROOTS: "/a/path" given; it is a JSON list, such as '["one", "two"]': give that.""",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"model_roots": "/a"}, 'PROXIMA_MODEL_ROOTS: "/a" given; it is a JSON list'),
        ({"model_roots": '["/a", 1]'}, "PROXIMA_MODEL_ROOTS.1: 1 given; it is a path, as text"),
        ({"storage_options": "region=eu"}, "PROXIMA_STORAGE_OPTIONS: A value given; it is a JSON object"),
        ({"storage_options": '{"secret": 12345}'}, "PROXIMA_STORAGE_OPTIONS.secret: A value given"),
        ({"max_body_bytes": "1.5"}, 'PROXIMA_MAX_BODY_BYTES: "1.5" given; it is a whole number'),
        ({"lease_seconds": "0"}, 'PROXIMA_LEASE_SECONDS: "0" given. Input should be greater than 0; give'),
        ({"lease_seconds": 15}, "PROXIMA_HEARTBEAT_SECONDS is 10 and PROXIMA_LEASE_SECONDS is 15"),
        ({"key_secret": "12345"}, "PROXIMA_KEY_SECRET has under 32 characters; make one with"),
        (
            {"database_url": "mysql://me:12345@host/name"},
            "PROXIMA_DATABASE_URL: A value given; it begins with",
        ),
        ({"broker_url": "host:6379"}, "PROXIMA_BROKER_URL: A value given; it begins with redis:// or"),
        ({"storage_url": "bucket"}, "PROXIMA_STORAGE_URL: A value given; it begins with file:// or s3://"),
        ({"data_dir": __file__}, 'test_settings.py" given; it is a directory, or is not there yet'),
    ],
)
def test_a_bad_setting_is_told_by_its_variable_and_secrets_are_not(given: dict[str, object], told: str):
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(given)
    [line] = wrong(caught.value)
    assert told in line
    assert "12345" not in line


def test_the_secret_of_keys_can_be_set(tmp_path: Path):
    settings = Settings(data_dir=tmp_path, key_secret="s" * 32)
    assert settings.read_key_secret() == b"s" * 32
    assert "s" * 32 not in repr(settings)
    assert list(tmp_path.iterdir()) == []


def test_the_secret_of_keys_is_made_once_and_for_its_owner_alone(tmp_path: Path):
    settings = Settings(data_dir=tmp_path / "new")
    with ThreadPoolExecutor(8) as threads:
        secrets = set(threads.map(lambda _: settings.read_key_secret(), range(64)))
    assert len(secrets) == 1
    assert len(secrets.pop()) == 64
    [path] = settings.data_dir.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nothing_else_reads_the_environment():
    """But the program that starts the others hands its own on to them."""
    readers = {
        path.name
        for path in (REPOSITORY / "service").rglob("*.py")
        if re.search(r"\benviron\b|\bgetenv\b", path.read_text())
    }
    assert readers <= {"embedded.py"}


@pytest.mark.parametrize(
    "module", ["service.settings", "service.store.jobs", "service.storage", "service.queue"]
)
def test_no_torch_and_no_web_framework_is_loaded(module: str):
    code = (
        f"import sys, {module}; print({{'torch', 'transformers', 'fastapi', 'starlette'}} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
