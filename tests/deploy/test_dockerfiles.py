"""The images: linted, unprivileged, made of files that exist, and the API's without torch."""

import importlib.util
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.deploy.places import DOCKERFILES, ROOT, run_tool

each_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of every instruction, continuation lines joined."""
    text = re.sub(r"\\\n\s*", "", dockerfile.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


@each_dockerfile
def test_the_linter_finds_nothing(dockerfile: Path) -> None:
    done = run_tool("hadolint", str(dockerfile))
    assert done.returncode == 0, done.stdout + done.stderr


@each_dockerfile
def test_builds_in_a_stage_of_its_own_and_ends_as_an_unprivileged_user(dockerfile: Path) -> None:
    steps = instructions(dockerfile)
    assert [name for name, _ in steps].count("FROM") == 2
    final = steps[max(index for index, (name, _) in enumerate(steps) if name == "FROM") :]
    assert [arguments for name, arguments in final if name == "USER"] == ["10001:10001"]
    assert [name for name, _ in final][-1] == "CMD"


@each_dockerfile
def test_copies_files_that_exist_and_that_the_build_context_holds(dockerfile: Path) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for name, arguments in instructions(dockerfile)
        if name == "COPY" and not arguments.startswith("--from")
        for source in arguments.split()[:-1]
    }
    assert copied <= kept
    assert [source for source in copied if not (ROOT / source).exists()] == []


@each_dockerfile
def test_starts_modules_that_exist(dockerfile: Path) -> None:
    (command,) = [arguments for name, arguments in instructions(dockerfile) if name == "CMD"]
    modules = re.findall(r"\b(?:service|worker)(?:\.\w+)*", command)
    assert modules
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


def requirements_of_extra(extra: str) -> set[str]:
    """Everything that installing the project with `extra` brings, followed through what is installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    seen: set[str] = set()
    todo = [Requirement(line) for line in [f"proxima-ppo[{extra}]", *project["dependencies"]]]
    while todo:
        wanted = todo.pop()
        if wanted.name == "proxima-ppo":
            extras = project["optional-dependencies"]
            todo += [Requirement(line) for name in wanted.extras for line in extras[name]]
        elif wanted.name not in seen:
            seen.add(wanted.name)
            todo += _requirements_of(wanted)
    return seen


def _requirements_of(wanted: Requirement) -> list[Requirement]:
    try:
        lines = metadata.requires(wanted.name) or []
    except metadata.PackageNotFoundError:
        return []
    contexts = [{"extra": extra} for extra in wanted.extras or {""}]
    parsed = [Requirement(line) for line in lines]
    return [one for one in parsed if one.marker is None or any(map(one.marker.evaluate, contexts))]


def test_the_api_image_has_no_torch() -> None:
    steps = instructions(ROOT / "deploy/Dockerfile.api")
    assert any(arguments.endswith('".[service]"') for name, arguments in steps if name == "RUN")
    brought = requirements_of_extra("service")
    assert "starlette" in brought  # the walk follows what is installed
    assert brought.isdisjoint({"torch", "transformers", "peft", "accelerate", "deepspeed"})


def test_the_worker_image_has_the_compiler_that_triton_calls() -> None:
    steps = instructions(ROOT / "deploy/Dockerfile.worker")
    final = steps[max(index for index, (name, _) in enumerate(steps) if name == "FROM") :]
    [install] = [arguments for name, arguments in final if name == "RUN" and "apt-get install" in arguments]
    assert {"gcc", "libc6-dev"} <= set(install.split())


def test_the_worker_image_has_torch() -> None:
    assert {"torch", "transformers", "peft", "celery"} <= requirements_of_extra("worker")
