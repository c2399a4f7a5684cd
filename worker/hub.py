"""Models of the Hugging Face hub, brought into this machine's cache before an engine asks for them.

The download is a program of its own (`hub_download.py`): the worker itself speaks no HTTP.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ppo_engine.model_sources import HubModel
from ppo_engine.run_dir import RunDir
from worker.outage import Outage, Patience, persist
from worker.process import Program, running

DOWNLOAD = Path(__file__).with_name("hub_download.py")
LATER = 75  # as there: what could not be had now may be had another time
PATIENCE_SECONDS = 60.0
"""For which an attempt waits for a hub that is away: other jobs wait for this one meanwhile."""
ANSWER = ".snapshot"


class ModelUnavailable(Exception):
    """A model of the hub cannot be had; the message says which, and why."""


class HubAway(Exception):
    """A model of the hub could not be had, and may be another time; the message says which, and why."""


@dataclass(frozen=True)
class Hub:
    """The way to the hub. environment: of the download, the engine's own."""

    environment: Mapping[str, str]

    async def fetch(self, model: HubModel, run_dir: RunDir) -> Path:
        """The directory of a model's snapshot, downloaded where it is not here yet.

        Raises:
            ModelUnavailable: it cannot be had.
            HubAway: the hub, or the way to it, is away.
        """
        try:
            return await persist(partial(self._fetch, model, run_dir), Patience(PATIENCE_SECONDS))
        except Outage as outage:
            raise HubAway(str(outage)) from outage

    async def _fetch(self, model: HubModel, run_dir: RunDir) -> Path:
        answer = run_dir.path / ANSWER
        answer.unlink(missing_ok=True)
        program = Program(
            command=[sys.executable, str(DOWNLOAD), model.repo, model.revision, str(answer)],
            environment=self.environment,
            directory=run_dir.path,
            output=run_dir.log,
            grace_seconds=1.0,
        )
        async with running(program) as process:
            status = await process.wait()
        told = answer.read_text() if answer.exists() else f"The download ended with status {status}."
        message = f"{model.repo} at {model.revision} cannot be had from the hub: {told}"
        if status == LATER:
            raise Outage(message)
        if status != 0:
            raise ModelUnavailable(message)
        return Path(told)
