"""Where the things of one attempt lie on disk, and the small files its two sides talk through.

The worker writes `spec.json`, `data/`, `control.json`, and `acks.json`; the engine writes `events.jsonl`,
`checkpoints/`, `exports/`, `reports/`, `engine.log`, `halvings.json`, and `result.json`. Small files are
replaced atomically. A checkpoint or export exists from the moment its manifest does, and not before.
This module knows no torch, no queue, no database.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from ppo_engine.issues import Issue, SpecError
from ppo_engine.spec import RunSpec, parse

MANIFEST = "manifest.json"

Wanted = Literal["run", "pause", "cancel"]
Reason = Literal[
    "finished",
    "pause",
    "cancel",
    "sigterm",
    "lease",
    "parent",
    "oom",
    "nan",
    "spec",
    "reward",
    "crash",
]


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Control(_File):
    """What the engine is asked to do. lease_until: unix seconds; None: there is no lease to lose."""

    wanted: Wanted = "run"
    lease_until: float | None = None


class Acks(_File):
    """Updates whose full checkpoint is safe elsewhere: only those may be deleted by the engine."""

    checkpoints: tuple[int, ...] = ()


class Halvings(_File):
    """How often what is computed at a time has been halved, since memory ended; by kind of work.

    Written by an engine that cannot go on itself (sharded weights), for the one that is started after it.
    """

    rollout: int = 0
    reward: int = 0
    scoring: int = 0
    update: int = 0


class Result(_File):
    """How the engine ended. `stopped` runs can go on from their last checkpoint; the others cannot."""

    outcome: Literal["succeeded", "stopped", "failed"]
    reason: Reason
    update: int
    message: str
    issues: tuple[Issue, ...] = ()


class ManifestFile(_File):
    """One file of a checkpoint or an export. size: bytes. sha256: hexadecimal."""

    name: str
    size: int
    sha256: str


class Manifest(_File):
    """What makes a directory a checkpoint or an export: the list of its files, written last."""

    update: int
    files: tuple[ManifestFile, ...]
    metrics: dict[str, JsonValue] = {}


_M = TypeVar("_M", bound=BaseModel)


class RunDir:
    """The paths of one run directory, and typed reading and writing of its small files."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.spec = self.path / "spec.json"
        self.data_dir = self.path / "data"
        self.events = self.path / "events.jsonl"
        self.control = self.path / "control.json"
        self.acks = self.path / "acks.json"
        self.result = self.path / "result.json"
        self.halvings = self.path / "halvings.json"
        self.log = self.path / "engine.log"
        self.checkpoints = self.path / "checkpoints"
        self.exports = self.path / "exports"
        self.reports = self.path / "reports"

    def name(self, attempt: int) -> str:
        """What people know the run by: its job, where this is one of its attempts (`<job>/a<attempt>`)."""
        path = self.path.absolute()
        return path.parent.name if path.name == f"a{attempt}" else path.name

    def data(self, file_id: str) -> Path:
        """The prompts of one file, as canonical JSONL."""
        return self.data_dir / f"{file_id}.jsonl"

    def checkpoint(self, update: int) -> Path:
        return self.checkpoints / f"update-{update}"

    def export(self, update: int) -> Path:
        return self.exports / f"update-{update}"

    def write_spec(self, spec: RunSpec) -> None:
        write_atomic(self.spec, spec.model_dump_json(indent=2).encode())

    def read_spec(self) -> RunSpec:
        """Raises SpecError when the file is not JSON, or nested beyond reading, or the spec breaks a rule."""
        try:
            raw = json.loads(self.spec.read_bytes())
        except (ValueError, RecursionError) as error:
            raise SpecError([Issue(loc=(), msg=f"{self.spec.name} is not JSON: {error}.")]) from None
        return parse(raw)

    def write_control(self, control: Control) -> None:
        write_atomic(self.control, control.model_dump_json().encode())

    def read_control(self) -> Control:
        """What is wanted; without the file, to run, with no lease."""
        return _read(self.control, Control) or Control()

    def write_acks(self, acks: Acks) -> None:
        write_atomic(self.acks, acks.model_dump_json().encode())

    def read_acks(self) -> Acks | None:
        """What is safe elsewhere; None: nobody takes checkpoints elsewhere."""
        return _read(self.acks, Acks)

    def write_result(self, result: Result) -> None:
        """Say how the engine ended, unless that has been said: what fails first makes the rest fail."""
        if not self.result.exists():
            write_atomic(self.result, result.model_dump_json(indent=2).encode())

    def read_result(self) -> Result | None:
        return _read(self.result, Result)

    def write_halvings(self, halvings: Halvings) -> None:
        write_atomic(self.halvings, halvings.model_dump_json().encode())

    def read_halvings(self) -> Halvings:
        """What an engine before this one has found out; without the file, nothing."""
        return _read(self.halvings, Halvings) or Halvings()

    def complete_checkpoints(self) -> list[int]:
        """Updates whose checkpoint is whole, oldest first."""
        return complete_updates(self.checkpoints)

    def complete_exports(self) -> list[int]:
        """Updates whose export is whole, oldest first."""
        return complete_updates(self.exports)


def _read(path: Path, model: type[_M]) -> _M | None:
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file so that a reader, or a crash, sees the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe(directory: Path, update: int, metrics: dict[str, JsonValue]) -> Manifest:
    """The manifest of a directory as it lies there; its files are flushed to disk on the way."""
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    files = tuple(_describe_file(directory, name) for name in names if name != MANIFEST)
    return Manifest(update=update, files=files, metrics=metrics)


def _describe_file(directory: Path, name: str) -> ManifestFile:
    path = directory / name
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return ManifestFile(name=name, size=os.fstat(file.fileno()).st_size, sha256=digest)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a directory; None when it has none that can be read: then it is not complete."""
    try:
        return _read(directory / MANIFEST, Manifest)
    except ValidationError:
        return None


def damage(directory: Path, manifest: Manifest) -> str | None:
    """What differs between a directory and its manifest, in words; None when nothing does."""
    for file in manifest.files:
        path = directory / file.name
        if not path.is_file():
            return f"{file.name} is missing"
        if path.stat().st_size != file.size:
            return f"{file.name} has {path.stat().st_size} bytes instead of {file.size}"
        with path.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256:
                return f"{file.name} does not have the sha256 of its manifest"
    return None


def complete_updates(parent: Path, prefix: str = "update") -> list[int]:
    """The updates N of all directories `<prefix>-N` that have a manifest, ascending."""
    return [n for n in named_updates(parent, prefix) if read_manifest(parent / f"{prefix}-{n}") is not None]


def named_updates(parent: Path, prefix: str = "update") -> list[int]:
    """The updates N of all directories `<prefix>-N`, ascending, whatever is left of them."""
    if not parent.is_dir():
        return []
    found = [re.fullmatch(rf"{prefix}-(\d+)", path.name) for path in parent.iterdir()]
    return sorted(int(match[1]) for match in found if match)
