"""What an attempt needs before its engine starts: its run directory, filled, and a spec that can be run.

The rules are the engine's own, applied with all that this machine can tell of the models; the API has applied
them with what it could see. This module starts no engine.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ppo_engine.issues import Issue, Loc, SpecError
from ppo_engine.model_sources import HubData, HubModel, LocalModel
from ppo_engine.plan import Plan, plan
from ppo_engine.run_dir import MANIFEST, Manifest, RunDir, write_atomic
from ppo_engine.spec import Resources, RunSpec, parse, upgrade
from service import models
from service.storage import Damaged, Storage
from service.store import files
from service.store.models import Artifact
from service.store.session import Store
from service.store.transitions import Claim
from worker.hub import Fetched, Hub


@dataclass(frozen=True)
class Ready:
    """A filled run directory.

    spec: as the engine reads it, with real paths. pinned: as its owner wrote it, with what is on the hub at
    the commits that were found; None where it names nothing there. damaged: checkpoints newer than the one
    it goes on from, which are not in storage as they were put there.
    """

    spec: RunSpec
    pinned: RunSpec | None
    plan: Plan
    damaged: Sequence[Artifact]


class Data(Protocol):
    """What is known of prompts in the run directory: a file of the project, or a data set of the hub."""

    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Preparation:
    """Everything that preparing takes."""

    store: Store
    storage: Storage
    hub: Hub
    model_roots: tuple[Path, ...]
    allow_hub_models: bool
    gpus: int
    launcher: tuple[str, ...]

    async def fill(self, claim: Claim, run_dir: RunDir) -> Ready:
        """Fill the run directory; it may be called again after an outage.

        Raises:
            SpecError: the spec breaks a rule that the API could not check.
            ModelUnavailable: a model of the hub cannot be had.
            HubAway: the hub, or the way to it, is away.
        """
        given = parse(upgrade(claim.spec, claim.spec_version))
        spec = models.resolve(given, self.model_roots, allow_hub=self.allow_hub_models)
        self._check_resources(spec.resources)
        uploads = await self._fetch_files(claim, run_dir, spec)
        damaged = await self._fetch_newest_whole(claim.checkpoints, run_dir)
        snapshots = await self._fetch_models(spec, run_dir)
        fetched = await self._fetch_hub_prompts(spec, run_dir)
        commits: dict[Loc, str] = {loc: snapshot.name for loc, snapshot in snapshots.items()}
        commits |= {("prompts", field): prompts.commit for field, prompts in fetched.items()}
        spec = spec.at(commits)
        plan = await asyncio.to_thread(_plan, spec, given, snapshots, {**uploads, **fetched})
        await asyncio.to_thread(run_dir.write_spec, spec)
        return Ready(spec, given.at(commits) if commits else None, plan, damaged)

    def _check_resources(self, resources: Resources) -> None:
        issues: list[Issue] = []
        if self.gpus and resources.gpus > self.gpus:
            msg = f"{resources.gpus} given; the worker that took the job has {self.gpus}: ask for fewer."
            issues.append(Issue(loc=("resources", "gpus"), msg=msg))
        # accelerate refuses to launch without it; what an operator's own launcher needs is not known.
        if resources.zero_stage and not self.launcher and find_spec("deepspeed") is None:
            msg = (
                f"{resources.zero_stage} given; the worker that took the job has no DeepSpeed: give 0, or "
                "have the operator install it."
            )
            issues.append(Issue(loc=("resources", "zero_stage"), msg=msg))
        if issues:
            raise SpecError(issues)

    async def _fetch_files(self, claim: Claim, run_dir: RunDir, spec: RunSpec) -> dict[str, Data]:
        """The uploaded files, by the fields of `prompts` that name them."""
        async with self.store.read() as session:
            found = await files.files_of(session, claim.project_id, claim.fence.job_id)
        run_dir.data_dir.mkdir(exist_ok=True)
        for file in found:
            await self.storage.download_to(file.storage_key, run_dir.data(file.id), file.sha256)
        by_id = {file.id: file for file in found}
        named = spec.prompts.sources().items()
        return {field: by_id[source] for field, source in named if isinstance(source, str)}

    async def _fetch_hub_prompts(self, spec: RunSpec, run_dir: RunDir) -> dict[str, Fetched]:
        """The hub's data sets, by the fields of `prompts` that name them."""
        return {
            field: await self.hub.fetch_prompts(field, source, run_dir)
            for field, source in spec.prompts.sources().items()
            if isinstance(source, HubData)
        }

    async def _fetch_newest_whole(
        self, checkpoints: Sequence[Artifact], run_dir: RunDir
    ) -> Sequence[Artifact]:
        """The first of the checkpoints that is whole; those before it, which are damaged, are returned."""
        for index, checkpoint in enumerate(checkpoints):
            try:
                await self._fetch_checkpoint(checkpoint, run_dir)
                return checkpoints[:index]
            except (Damaged, FileNotFoundError):
                await asyncio.to_thread(shutil.rmtree, run_dir.checkpoint(checkpoint.update))
        return checkpoints

    async def _fetch_checkpoint(self, resume: Artifact, run_dir: RunDir) -> None:
        """The files first, the manifest last: without it there is no checkpoint."""
        directory = run_dir.checkpoint(resume.update)
        manifest = Manifest.model_validate(
            {"update": resume.update, "files": resume.files, "metrics": resume.metrics}
        )
        for file in manifest.files:
            target = directory / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            await self.storage.download_to(resume.key_prefix + file.name, target, file.sha256)
        write_atomic(directory / MANIFEST, manifest.model_dump_json(indent=2).encode())

    async def _fetch_models(self, spec: RunSpec, run_dir: RunDir) -> dict[Loc, Path]:
        """Where the hub's models lie on this machine, by their place in the spec: in directories that are
        called as their commits.
        """
        return {
            loc: await self.hub.fetch(source, run_dir)
            for loc, source in models.sources(spec)
            if isinstance(source, HubModel)
        }


def _plan(spec: RunSpec, given: RunSpec, snapshots: Mapping[Loc, Path], prompts: Mapping[str, Data]) -> Plan:
    """Plan with the facts of all models, those of the hub read from their snapshots, and of all prompts.

    given: the spec as its owner wrote it, whose names of models messages use. prompts: by their fields.
    """
    raw = spec.model_dump(mode="json")
    for loc, snapshot in snapshots.items():
        _put(raw, loc, LocalModel(path=str(snapshot)).model_dump(mode="json"))
    columns = {field: data.columns for field, data in prompts.items()}
    return plan(spec, models.read_facts(parse(raw), given, prompts["train"].rows, columns))


def _put(raw: Any, loc: Loc, value: dict[str, Any]) -> None:
    *steps, last = loc
    for step in steps:
        raw = raw[step]
    raw[last] = value


def discard(run_dir: Path) -> None:
    """Remove the directory of an attempt, and that of its job when it was the last."""
    shutil.rmtree(run_dir, ignore_errors=True)
    with suppress(OSError):
        run_dir.parent.rmdir()
