"""How an engine is started: on which devices, with which command, in which environment.

The command and the environment are values made by functions; starting a process is `process.py`'s part.
This module loads no torch: it counts GPUs by what the driver shows.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import ppo_engine
from ppo_engine.spec import Resources, Tracker

DRIVER = Path("/proc/driver/nvidia/gpus")
SMI_SECONDS = 30.0
_OFFLOAD = {"none": (), "optimizer": ("--offload_optimizer_device", "cpu")}

# All that an engine may see of the worker's environment. It runs code that users choose by name (models,
# plug-ins): the database, the broker, the storage, and the keys are none of its business.
PASSED = re.compile(
    r"""
    PATH | HOME | USER | LOGNAME | LANG | LANGUAGE | LC_\w+ | TZ | TMPDIR | XDG_CACHE_HOME
    | PYTHONPATH | PYTHONHASHSEED | VIRTUAL_ENV | LD_LIBRARY_PATH | CC | CXX
    | SSL_CERT_FILE | SSL_CERT_DIR | REQUESTS_CA_BUNDLE | (HTTPS? | NO)_PROXY | (https? | no)_proxy
    | (OMP | MKL | OPENBLAS | CUDA | NVIDIA | NCCL | GLOO | TORCH | TORCHINDUCTOR | PYTORCH | TRITON)_\w+
    | (HF | TRANSFORMERS | TOKENIZERS | ACCELERATE | DS)_\w+
    """,
    re.VERBOSE,
)

# What the trackers of a run are told besides, where its spec names them. The id of one run is not for every
# job, and their models are stored by us.
PASSED_FOR = {
    "tensorboard": re.compile(r"TENSORBOARD_LOGGING_DIR"),
    "wandb": re.compile(r"WANDB_(?!RUN_ID|RESUME|LOG_MODEL)\w+"),
    "mlflow": re.compile(r"MLFLOW_(?!RUN_ID)\w+"),
}


def find_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The devices this worker owns, as CUDA names them: those of CUDA_VISIBLE_DEVICES, or all there are."""
    count = _count_gpus()
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is None or not count:
        return tuple(str(index) for index in range(count))
    return tuple(name.strip() for name in named.split(",") if name.strip() not in ("", "-1"))


def _count_gpus() -> int:
    """As many as the driver shows; where its directory is hidden, as its own program tells."""
    if DRIVER.is_dir():
        return len(list(DRIVER.iterdir()))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith(b"GPU ") for line in listed.stdout.splitlines())


def command(
    engine: Sequence[str],
    launcher: Sequence[str],
    resources: Resources,
    run_dir: Path,
    attempt: int,
) -> list[str]:
    """What to run for one attempt.

    engine:
        The engine's own command, without its arguments.
    launcher:
        The operator's words in front of it, `{processes}` standing for their number. Without any: a single
        process is started directly, several (or a sharded one) through `accelerate launch`.
    """
    program = [*engine, str(run_dir), "--attempt", str(attempt)]
    if launcher:
        return [word.replace("{processes}", str(resources.gpus)) for word in launcher] + program
    if resources.gpus == 1 and resources.zero_stage == 0:
        return program
    return [*_accelerate(resources), *program]


def _accelerate(resources: Resources) -> list[str]:
    """Everything is said, so that no configuration file of the machine's user has a say.

    `--multi_gpu` also stands for several processes without a GPU: `--cpu` would start one only.
    """
    kind = (
        ["--use_deepspeed", "--zero_stage", str(resources.zero_stage), *_OFFLOAD[resources.offload]]
        if resources.zero_stage
        else ["--multi_gpu"]
    )
    threads = max(1, (os.cpu_count() or 1) // resources.gpus)
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *kind,
        *("--num_processes", str(resources.gpus)),
        *("--num_machines", "1", "--machine_rank", "0"),
        *("--main_process_port", "0"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", str(threads)),
        "--no_python",
    ]


def environment(
    given: Mapping[str, str],
    more: Sequence[str],
    gpus: Sequence[str],
    allow_hub: bool,
    trackers: Sequence[Tracker] = (),
) -> dict[str, str]:
    """What the engine sees of the environment.

    more:
        Names the operator adds to those that are passed anyway.
    trackers:
        What the run reports to.
    gpus:
        Devices it may use; none: it runs on the CPU.
    """
    kept = {name: value for name, value in given.items() if _passes(name, more, trackers)}
    kept["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    kept["PYTHONUNBUFFERED"] = "1"
    kept["TOKENIZERS_PARALLELISM"] = "false"
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [_engine_home(), given.get("PYTHONPATH", "")]))
    if not allow_hub:
        kept["HF_HUB_OFFLINE"] = "1"
    return kept


def _passes(name: str, more: Sequence[str], trackers: Sequence[Tracker]) -> bool:
    patterns = [PASSED, *(PASSED_FOR[tracker] for tracker in trackers)]
    return name in more or any(pattern.fullmatch(name) for pattern in patterns)


def _engine_home() -> str:
    """Where the engine's package lies: it is started from another directory."""
    assert ppo_engine.__file__ is not None
    return str(Path(ppo_engine.__file__).parents[1])
