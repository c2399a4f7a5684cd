"""From the spec a user sent to the run that will be: parsed, its files and models found, planned.

Every rule it applies is the engine's own; what this module adds is where things are looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio.to_thread
from sqlalchemy.ext.asyncio import AsyncSession

from ppo_engine.issues import Issue, Loc, SpecError, shortened, shown
from ppo_engine.model_sources import HubData
from ppo_engine.plan import Plan, check, plan
from ppo_engine.spec import RunSpec, parse
from service import models
from service.errors import Invalid, NotFound
from service.settings import Settings
from service.specs import unstorable
from service.store import files
from service.store.models import File
from service.store.session import Store

ROOT: Loc = ("spec",)


@dataclass(frozen=True)
class Planned:
    """A run that can be.

    spec: as its owner wrote it, with every default. Where models really lie is not theirs to see: the worker
    looks for them again. plan: None where it needs the number of prompts, which nobody knows before a worker
    has read them on the hub.
    """

    spec: RunSpec
    plan: Plan | None


class Planner:
    """Turns specs into runs, for one installation's models and files."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._roots: tuple[Path, ...] = settings.model_roots
        self._allow_hub = settings.allow_hub_models
        self._store = store

    async def plan(self, project_id: str, raw: Mapping[str, Any]) -> Planned:
        """Plan a spec for a project.

        Raises:
            Invalid: with every issue found, by the path of its field from the body.
        """
        try:
            return await self._plan(project_id, raw)
        except SpecError as error:
            issues = [Issue(loc=ROOT + issue.loc, msg=issue.msg) for issue in error.issues]
            raise invalid(issues) from None

    async def _plan(self, project_id: str, raw: Mapping[str, Any]) -> Planned:
        # Disks may be slow and specs large: neither is to be waited for on the event loop.
        given = await anyio.to_thread.run_sync(_read, raw)
        async with self._store.read() as session:
            found, issues = await _find_prompts(session, project_id, given)
        return await anyio.to_thread.run_sync(self._fit, given, found, issues)

    def _fit(self, given: RunSpec, found: Mapping[str, File], issues: list[Issue]) -> Planned:
        try:
            spec = models.resolve(given, self._roots, allow_hub=self._allow_hub)
        except SpecError as error:
            raise SpecError([*issues, *error.issues]) from None
        if issues:
            raise SpecError(issues)
        rows = found["train"].rows if "train" in found else None
        columns = {field: file.columns for field, file in found.items()}
        facts = models.read_facts(spec, given, rows, columns)
        if rows is not None or spec.ppo.total_episodes is not None:
            return Planned(given, plan(spec, facts))
        if broken := check(spec, facts):
            raise SpecError(broken)
        return Planned(given, None)


def _read(raw: Mapping[str, Any]) -> RunSpec:
    if issues := list(unstorable(raw)):
        raise SpecError(shortened(issues, len(issues)))
    return parse(raw)


def invalid(issues: list[Issue]) -> Invalid:
    """A refusal that names the first fields in its sentence, and all of them in its issues."""
    more = f"; and {len(issues) - 3} more" if len(issues) > 3 else ""
    return Invalid("; ".join(map(str, issues[:3])) + more, issues)


async def _find_prompts(
    session: AsyncSession, project_id: str, spec: RunSpec
) -> tuple[dict[str, File], list[Issue]]:
    """The uploaded files of prompts, by their fields, and what is wrong with those named."""
    found: dict[str, File] = {}
    issues: list[Issue] = []
    for field, source in spec.prompts.sources().items():
        if isinstance(source, HubData):
            continue  # a worker looks for it
        try:
            found[field] = await files.get_file(session, project_id, source)
        except NotFound:
            msg = f"{shown(source)} given; this project has no such file: upload it, and give its id."
            issues.append(Issue(loc=("prompts", field), msg=msg))
    return found, issues
