"""The settings only a worker has, beside those it shares with the service. Same prefix: PROXIMA_.

Lists are JSON: `PROXIMA_LAUNCHER='["srun", "--ntasks={processes}"]'`.
"""

from __future__ import annotations

import sys
from typing import Annotated

from pydantic import Field, PositiveFloat

from service.settings import Json, Settings


class WorkerSettings(Settings):
    """What a worker is given, and how it treats its engines."""

    queue: str = "default"
    """The queue whose jobs it takes."""
    gpus: Annotated[tuple[str, ...] | None, Json] = None
    """The GPUs it owns, as CUDA names them; `[]` for none. Default: all that CUDA_VISIBLE_DEVICES, or the
    driver, shows."""
    engine_command: Annotated[tuple[str, ...], Json] = Field(
        default=(sys.executable, "-m", "ppo_engine"), min_length=1
    )
    """The engine; the run directory and the attempt are added."""
    launcher: Annotated[tuple[str, ...], Json] = ()
    """Command put in front of the engine's, with `{processes}` for their number, instead of what Proxima
    would use: nothing for one process, `accelerate launch` for several."""
    engine_environment: Annotated[tuple[str, ...], Json] = ()
    """Names of further variables of the worker's environment that its engines get."""
    http_allow_private: bool = False
    """Let rewards of type `http` be asked for at private addresses, loopback among them: whoever may submit a
    job can then send requests to whatever the worker's network reaches."""
    stop_grace_seconds: PositiveFloat = 60.0
    """How long an engine that is to stop may go on to the end of its update, and save."""
    kill_grace_seconds: PositiveFloat = 10.0
    """How long it may then take after SIGTERM, before it is killed."""
