"""Models and data sets of the Hugging Face hub, brought to this machine before an engine asks for them.

Each download is a program of its own (`hub_download.py`, `hub_prompts.py`): the worker itself speaks no HTTP.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import BaseModel, TypeAdapter

from ppo_engine.issues import Issue, SpecError
from ppo_engine.model_sources import HubData, HubModel
from ppo_engine.run_dir import RunDir
from ppo_engine.spec import data_id
from worker.outage import Outage, Patience, persist
from worker.process import Program, running

ROOT = Path(__file__).parents[1]
"""Where this package and the service's lie: programs are started from another directory."""
LATER = 75  # as there: what could not be had now may be had another time
PATIENCE_SECONDS = 60.0
"""For which an attempt waits for a hub that is away: other jobs wait for this one meanwhile."""
ANSWER = ".answer"
_ISSUES = TypeAdapter(list[Issue])


class ModelUnavailable(Exception):
    """A model of the hub cannot be had; the message says which, and why."""


class HubAway(Exception):
    """What is on the hub could not be had, and may be another time; the message says what, and why."""


class Fetched(BaseModel):
    """Prompts of the hub that lie in the run directory. commit: theirs. columns: all that their rows have."""

    commit: str
    rows: int
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Hub:
    """The way to the hub.

    environment: of the downloads, the engine's own. max_bytes: of a data set, as the JSONL it becomes.
    """

    environment: Mapping[str, str]
    max_bytes: int

    async def fetch(self, model: HubModel, run_dir: RunDir) -> Path:
        """The directory of a model's snapshot, downloaded where it is not here yet.

        Raises:
            ModelUnavailable: it cannot be had.
            HubAway: the hub, or the way to it, is away.
        """
        name = f"{model.repo} at {model.revision}"
        status, told = await self._download(name, run_dir, "hub_download", model.repo, model.revision)
        if status != 0:
            raise ModelUnavailable(_unavailable(name, status, told))
        return Path(told)

    async def fetch_prompts(self, field: str, source: HubData, run_dir: RunDir) -> Fetched:
        """Put the rows of a data set into the run directory, checked and in the form of uploaded files.

        field: in `prompts`, that names it.

        Raises:
            SpecError: it cannot be had, or has rows that are no prompts.
            HubAway: the hub, or the way to it, is away.
        """
        name, target = f"{source.repo} at {source.revision}", run_dir.data(data_id(field, source))
        arguments = (str(target), str(self.max_bytes), source.model_dump_json())
        status, told = await self._download(name, run_dir, "hub_prompts", *arguments)
        if status == 0:
            return Fetched.model_validate_json(told)
        issues = (
            _ISSUES.validate_json(told) if told else [Issue(loc=(), msg=_unavailable(name, status, told))]
        )
        raise SpecError([Issue(loc=("prompts", field, *issue.loc), msg=issue.msg) for issue in issues])

    async def _download(self, name: str, run_dir: RunDir, *command: str) -> tuple[int, str]:
        """Have a program download what is called so: its exit status, and what it answered."""
        try:
            attempt = partial(self._run, name, run_dir, *command)
            return await persist(attempt, Patience(PATIENCE_SECONDS))
        except Outage as outage:
            raise HubAway(str(outage)) from outage

    async def _run(self, name: str, run_dir: RunDir, module: str, *arguments: str) -> tuple[int, str]:
        answer = run_dir.path / ANSWER
        answer.unlink(missing_ok=True)
        path = os.pathsep.join(filter(None, [str(ROOT), self.environment.get("PYTHONPATH", "")]))
        program = Program(
            command=[sys.executable, "-P", "-m", f"worker.{module}", str(answer), *arguments],
            environment={**self.environment, "PYTHONPATH": path},
            directory=run_dir.path,
            output=run_dir.log,
            grace_seconds=1.0,
        )
        async with running(program) as process:
            status = await process.wait()
        told = answer.read_text() if answer.exists() else ""
        if status == LATER:
            raise Outage(_unavailable(name, status, told))
        return status, told


def _unavailable(name: str, status: int, told: str) -> str:
    return f"{name} cannot be had from the hub: {told or f'The download ended with status {status}.'}"
