"""Checkpoints and exports on disk: written beside, made durable, then named; read back only when whole.

A checkpoint is everything a run needs to go on exactly; an export is the policy alone, for others to load.
Both are directories with a manifest. This module does not know when to save, or what for.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue

from ppo_engine.issues import Issue, SpecError
from ppo_engine.parallel import Parallel
from ppo_engine.retention import number
from ppo_engine.run_dir import (
    MANIFEST,
    damage,
    describe,
    named_updates,
    read_manifest,
    sync_directory,
    write_atomic,
)

TRAINER_STATE = "trainer_state.json"
RUN_STATE = "run_state.json"
_LIBRARIES = ("proxima-ppo", "torch", "transformers", "peft", "accelerate", "numpy", "deepspeed")


class CheckpointMismatch(ValueError):
    """A checkpoint that belongs to another run; the message names the fields that differ."""


def write(
    directory: Path,
    update: int,
    parallel: Parallel,
    fill: Callable[[Path], None],
    metrics: dict[str, JsonValue],
) -> None:
    """Make a directory with a manifest out of what `fill` writes into it; every process calls this.

    Until the last moment it has another name, so a crash leaves nothing that could be taken for whole; that
    one begins with what Trainer does not push to the hub.
    """
    partial = directory.with_name(f"_{directory.name}.partial")
    if parallel.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    parallel.barrier()
    fill(partial)
    parallel.barrier()
    if parallel.is_main:
        manifest = describe(partial, update, metrics)
        write_atomic(partial / MANIFEST, manifest.model_dump_json(indent=2).encode())
        for folder, _, _ in os.walk(partial):
            sync_directory(Path(folder))
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
        sync_directory(directory.parent)
    parallel.barrier()


def newest_whole(parent: Path, warn: Callable[[str], None], prefix: str = "update") -> Path | None:
    """The newest checkpoint whose files are those of its manifest; `warn` hears of each one passed over."""
    damaged, newest = {}, None
    for update in reversed(named_updates(parent, prefix)):
        directory = parent / f"{prefix}-{update}"
        if (wrong := fault(directory)) is None:
            newest = directory
            break
        damaged[directory.name] = wrong
    then = "no whole one is left, so the run begins anew" if newest is None else f"{newest.name} is used"
    for name, wrong in damaged.items():
        warn(f"checkpoint {name} is damaged ({wrong}); {then}.")
    return newest


def fault(directory: Path) -> str | None:
    """What makes a directory no whole checkpoint, in words; None: nothing does."""
    manifest = read_manifest(directory)
    return "its manifest is gone" if manifest is None else damage(directory, manifest)


def require_whole(directory: Path) -> None:
    """Raises SpecError where a script names what is no whole checkpoint, with the file that is damaged."""
    wrong = fault(directory) if directory.is_dir() else "there is no such directory"
    if wrong is not None:
        msg = (
            f"{directory} given, which is no whole checkpoint ({wrong}): give another one, or True for the "
            "newest whole one in output_dir."
        )
        raise SpecError([Issue(loc=("resume_from_checkpoint",), msg=msg)])


def is_of(directory: Path, run: Mapping[str, Any]) -> bool:
    """Whether a checkpoint says that it is of this run."""
    try:
        return not _differing(read_run_state(directory)["run"], run)
    except (OSError, ValueError, KeyError, TypeError):  # it cannot be read, and may be anybody's
        return False


def metric_at(directory: Path, metric: str | None) -> float | None:
    """A metric of a checkpoint, from its manifest; None: there is none."""
    manifest = read_manifest(directory)
    return None if manifest is None else number(manifest.metrics, metric)


def write_run_state(directory: Path, state: dict[str, Any]) -> None:
    """What identifies the run a checkpoint belongs to, and where it stands; JSON."""
    write_atomic(directory / RUN_STATE, json.dumps({**state, "made_with": environment()}, indent=2).encode())


def read_run_state(directory: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((directory / RUN_STATE).read_bytes())
    return state


def require_alike(directory: Path, known: Mapping[str, Any]) -> None:
    """Raises CheckpointMismatch where a checkpoint is of another run, by what is known of this one."""
    try:
        saved = read_run_state(directory)["run"]
    except (OSError, ValueError, KeyError):  # it is damaged, and will be passed over
        return
    require_same({name: saved.get(name) for name in known}, known)


def require_same(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raises CheckpointMismatch with the names of all fields that differ, and both values."""
    if names := _differing(saved, current):
        told = "; ".join(f"{name}: {saved.get(name)!r} then, {current.get(name)!r} now" for name in names)
        raise CheckpointMismatch(f"the checkpoint belongs to a run with other settings ({told}).")


def _differing(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in saved.keys() | current.keys() if saved.get(name) != current.get(name))


def differences(saved: Mapping[str, Any]) -> list[str]:
    """In words, how a checkpoint's environment differs from this one; of none, the run goes on exactly."""
    now = environment()
    return [
        f"{name}: {saved.get(name)} then, {now.get(name)} now"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, str | int]:
    """What a byte-equal continuation on a CPU depends on."""
    return {
        **{name: _version(name) for name in _LIBRARIES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
