"""The models and data sets a job names: which it may name, and what can be told of them from here.

A local path is followed only inside the directories the operator allows, symlinks included. Where such a
directory is not mounted on this machine, nothing is told of the model, and the worker judges it.
This module knows no HTTP, no database, and loads no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path, PurePosixPath
from typing import Any

from ppo_engine.facts import AdapterFacts, Facts, FactsError, ModelFacts, facts_at, gather
from ppo_engine.issues import Issue, Loc, SpecError, shown
from ppo_engine.model_sources import HubData, HubModel, LocalModel, ModelSource
from ppo_engine.reward_kinds import Plugin
from ppo_engine.spec import RunSpec, parse
from ppo_engine.spec import sources as sources

REWARD_PLUGINS = "proxima.rewards"

_RULE = "a model's path lies inside a directory the operator allows"


class PathRefused(ValueError):
    """A path that may not be followed; the message says why and what to give instead."""


def locate(path: str, roots: Sequence[Path]) -> Path:
    """The real directory that a path names: absolute, or relative to one of the roots.

    Raises:
        PathRefused: it names, or leads to, a place outside all roots, or nothing at all.
    """
    if not roots:
        raise PathRefused(f"{shown(path)} given; the operator allows no local models here.")
    if ".." in PurePosixPath(path).parts:
        raise PathRefused(f'{shown(path)} given; {_RULE}, named without "..": give it relative to that.')
    candidates = list(_candidates(Path(path), roots))
    if not candidates:
        raise PathRefused(f"{shown(path)} given; {_RULE}: give a path relative to it.")
    try:
        there = [pair for pair in candidates if pair[1].exists()]
        unseen = [pair for pair in candidates if not pair[0].exists()]
        for root, candidate in there + unseen:
            return _resolved(path, root, candidate)
    except (OSError, RuntimeError):
        # A name too long for the file system, a link that leads to itself.
        raise PathRefused(f"{shown(path)} given, which cannot be followed; correct the path.") from None
    raise PathRefused(
        f"{shown(path)} given; there is no such directory among the allowed models: correct the path, or "
        "have the operator put it there."
    )


def _candidates(path: Path, roots: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """(root, path below it) for every root the path may be meant to lie in, by its words alone."""
    for root in roots:
        candidate = root.absolute() / path  # an absolute path replaces the root
        if candidate.is_relative_to(root.absolute()):
            yield root, candidate
        elif candidate.is_relative_to(root.resolve()):
            yield root.resolve(), candidate


def _resolved(path: str, root: Path, candidate: Path) -> Path:
    real = candidate.resolve()
    if not real.is_relative_to(root.resolve()):
        raise PathRefused(
            f"{shown(path)} given, a link that leads out; {_RULE}, links followed: copy the model there."
        )
    return real


def resolve(spec: RunSpec, roots: Sequence[Path], *, allow_hub: bool) -> RunSpec:
    """The spec with every local path made real and absolute.

    Raises:
        SpecError: with every model and data set that may not be named.
    """
    issues: list[Issue] = []
    raw = spec.model_dump(mode="json")
    for loc, source in sources(spec):
        if isinstance(source, HubModel):
            if not allow_hub:
                given = f"{shown(source.repo)} of the hub given"
                msg = f"{given}; the operator allows local models only: give the path of one."
                issues.append(Issue(loc=(*loc, "repo"), msg=msg))
            continue
        try:
            _part(raw, loc)["path"] = str(locate(source.path, roots))
        except PathRefused as refusal:
            issues.append(Issue(loc=(*loc, "path"), msg=str(refusal)))
    if not allow_hub:
        issues += _data_issues(spec)
    issues += _plugin_issues(spec)
    if issues:
        raise SpecError(issues)
    return parse(raw)


def _part(raw: Any, loc: Loc) -> dict[str, Any]:
    for step in loc:
        raw = raw[step]
    assert isinstance(raw, dict)
    return raw


def _data_issues(spec: RunSpec) -> Iterator[Issue]:
    for field, source in spec.prompts.sources().items():
        if isinstance(source, HubData):
            yield Issue(
                loc=("prompts", field, "repo"),
                msg=f"{shown(source.repo)} of the hub given; the operator allows uploaded files only: upload "
                "its rows, and give the id of the file.",
            )


def _plugin_issues(spec: RunSpec) -> Iterator[Issue]:
    installed = sorted(entry_points(group=REWARD_PLUGINS).names)
    for index, reward in enumerate(spec.rewards):
        if isinstance(reward, Plugin) and reward.plugin not in installed:
            yield Issue(
                loc=("rewards", index, "plugin"),
                msg=f"{shown(reward.plugin)} given; the plug-ins installed here are {shown(installed)}: "
                "choose of these, or ask the operator to install it.",
            )


def read_facts(
    spec: RunSpec,
    given: RunSpec,
    prompts: int | None,
    columns: Mapping[str, Iterable[str]] | None = None,
) -> Facts:
    """What can be told of a resolved spec's models from here; `given` is the spec as its owner wrote it.

    columns: as in the engine's `facts.gather`.

    Raises:
        SpecError: with every directory that is no model.
    """
    issues: list[Issue] = []
    found: dict[Loc, ModelFacts | AdapterFacts] = {}
    written = dict(sources(given))
    for loc, source in sources(spec):
        if not _is_visible(source):
            continue
        # The owner knows the path as written; where the operator's disks are is not theirs to see.
        wrote = written[loc]
        name = wrote.path if isinstance(wrote, LocalModel) else wrote.repo
        assert isinstance(source, LocalModel)
        try:
            found[loc] = facts_at(Path(source.path), loc)
        except FactsError as error:
            issues.append(Issue(loc=(*loc, "path"), msg=str(error).replace(source.path, name)))
        except OSError as error:
            msg = f"{shown(name)} given, which cannot be read ({error.strerror}); ask the operator."
            issues.append(Issue(loc=(*loc, "path"), msg=msg))
    if issues:
        raise SpecError(issues)
    return gather(spec, found, prompts, columns)


def _is_visible(source: ModelSource) -> bool:
    return isinstance(source, LocalModel) and Path(source.path).exists()
