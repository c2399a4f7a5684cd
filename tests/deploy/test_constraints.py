"""The constraints file: every pin exact, free of local builds, and inside what `pyproject.toml` allows."""

import re
import tomllib

from packaging.requirements import Requirement

from tests.deploy.places import ROOT


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        lines += extra
    return [one for one in map(Requirement, lines) if one.name != "proxima-ppo"]


def test_every_pin_is_a_release_without_a_local_suffix() -> None:
    release = re.compile(r"[\d.]+(b\d+|post\d+)?")  # some of what wandb and mlflow need has betas only
    assert [pin for pin in pins().items() if not release.fullmatch(pin[1])] == []


def test_every_requirement_is_pinned_inside_its_bounds() -> None:
    found = {name.lower(): version for name, version in pins().items()}
    wrong = {
        str(one): found.get(one.name.lower())
        for one in requirements()
        if one.name.lower() not in found or not one.specifier.contains(found[one.name.lower()])
    }
    assert wrong == {}
