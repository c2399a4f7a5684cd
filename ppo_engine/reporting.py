"""What a run reports to: TensorBoard, Weights & Biases, MLflow, through transformers' own callbacks.

A tracker serves people who look on. One that fails is told of and left out, and the run goes on. This module
knows neither what is reported nor the algorithm.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    CometCallback,
    NeptuneCallback,
    SwanLabCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    is_mlflow_available,
    is_tensorboard_available,
    is_wandb_available,
)
from transformers.trainer_callback import CallbackHandler

from ppo_engine.issues import Issue, shown
from ppo_engine.run_dir import RunDir

PROJECT = "proxima"
"""What jobs are put under, where the operator's environment names no project or experiment."""
_IS_INSTALLED: dict[str, Callable[[], bool]] = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "mlflow": is_mlflow_available,
}
_EVENTS = tuple(name for name in vars(TrainerCallback) if name.startswith("on_"))
_RENAMING = (  # these write "train/" before every name but those that begin with "eval_" or "test_"
    *(TensorBoardCallback, WandbCallback, TrackioCallback),
    *(CometCallback, NeptuneCallback, SwanLabCallback),
)
Warn = Callable[[str, str, Mapping[str, str]], None]


def check_trackers(names: Sequence[str]) -> Iterator[Issue]:
    """Trackers that are not known, not installed where this runs, or told to upload what is of no use."""
    for index, name in enumerate(names):
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            msg = f"{shown(name)} given; there are {known}: choose of these, or leave it out."
        elif name in _IS_INSTALLED and not _IS_INSTALLED[name]():
            msg = (
                f"{shown(name)} given, which is not installed where the run trains: install the extra "
                "reporting (pip install 'proxima-ppo[reporting]'), or leave it out."
            )
        elif name == "wandb" and os.environ.get("WANDB_LOG_MODEL") == "end":
            msg = (
                '"wandb" given with WANDB_LOG_MODEL=end in the environment, which would upload policy and '
                "critic as one module that nothing loads: unset it, and log what save_model writes."
            )
        else:
            continue
        yield Issue(loc=("report_to", index), msg=msg)


class Callbacks(CallbackHandler):
    """The callbacks of a trainer; a tracker among them cannot end the run.

    It also has trackers name the metrics of an evaluation `eval/…`, as they are named elsewhere, instead of
    `train/eval/…`. A callback stays the object it was, so that scripts find and remove it by its class.

    like: the callbacks so far. warn: told of a tracker that failed, with the code `report_failed`.
    """

    def __init__(self, like: CallbackHandler, warn: Warn) -> None:
        self._warn = warn
        self._failed: set[TrainerCallback] = set()
        super().__init__(  # type: ignore[no-untyped-call]
            like.callbacks, like.model, like.processing_class, like.optimizer, like.lr_scheduler
        )

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        super().add_callback(callback)  # type: ignore[no-untyped-call]
        added = self.callbacks[-1]
        names = [name for name, kind in INTEGRATION_TO_CALLBACK.items() if isinstance(added, kind)]
        for event in _EVENTS if names else ():
            setattr(added, event, partial(self._tell, added, names[0], getattr(added, event)))

    def _tell(
        self, tracker: TrainerCallback, name: str, tell: Callable[..., object], *given: Any, **named: Any
    ) -> None:
        if tracker in self._failed:
            return
        if "logs" in named and isinstance(tracker, _RENAMING):
            named["logs"] = {
                re.sub(r"^(eval|test)/", r"\1_", name): value for name, value in named["logs"].items()
            }
        try:
            tell(*given, **named)
        except Exception as error:  # a library's or a server's, of any type: none is worth the run
            self._failed.add(tracker)
            message = f"{name} failed, and is reported to no more: {type(error).__name__}: {error}"
            self._warn("report_failed", message, {"tracker": name})


# Jobs ------------------------------------------------------------------------------------------------------


def environment(given: Mapping[str, str], run_dir: RunDir, name: str) -> dict[str, str]:
    """The variables that tell the trackers of a job where to write, and how long to wait for a server.

    What the operator says in the environment holds. Otherwise files go under the run directory, which lives
    as long as the attempt.
    """
    boards = given.get("TENSORBOARD_LOGGING_DIR")
    defaults = {
        "WANDB_DIR": str(run_dir.reports),
        "WANDB_PROJECT": PROJECT,
        # Neither a server that is away nor one that is slow may hold a GPU for long after the last update.
        "WANDB_FINISH_TIMEOUT": "300",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_EXPERIMENT_NAME": PROJECT,
        "MLFLOW_TRACKING_URI": f"sqlite:///{run_dir.reports.absolute()}/mlflow.db",
    }
    return {
        **{variable: given.get(variable, default) for variable, default in defaults.items()},
        "TENSORBOARD_LOGGING_DIR": f"{boards}/{name}" if boards else str(run_dir.reports / "tensorboard"),
        # These would look for a script's checkpoints, which a job does not have.
        "WANDB_LOG_MODEL": "false",
        "HF_MLFLOW_LOG_ARTIFACTS": "false",
    }


def open_runs(trackers: Sequence[str]) -> dict[str, str]:
    """The ids that trackers gave the run of this process, by their names, for a resume to go on in it."""
    runs = {}
    if "wandb" in trackers and (run := import_module("wandb").run) is not None:
        runs["wandb"] = str(run.id)
    if "mlflow" in trackers and (run := import_module("mlflow").active_run()) is not None:
        runs["mlflow"] = str(run.info.run_id)
    return runs


def go_on(runs: Mapping[str, str], trackers: Sequence[str]) -> None:
    """Have the trackers of this process go on in the runs that `open_runs` told of, where they know them."""
    if "wandb" in trackers and "wandb" in runs:
        os.environ |= {"WANDB_RUN_ID": runs["wandb"], "WANDB_RESUME": "allow"}
    if "mlflow" in trackers and "mlflow" in runs and _has_mlflow_run(runs["mlflow"]):
        os.environ["MLFLOW_RUN_ID"] = runs["mlflow"]


def _has_mlflow_run(run_id: str) -> bool:
    mlflow = import_module("mlflow")
    try:
        mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_run(run_id)
    except mlflow.MlflowException:  # its store is another one, or away: a new run is begun
        return False
    return True
