"""What a run reports to: TensorBoard, Weights & Biases, MLflow, through transformers' own callbacks.

A tracker serves people who look on. One that fails is told of and left out, and the run goes on. This module
knows neither what is reported nor the algorithm.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    CometCallback,
    MLflowCallback,
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
from ppo_engine.redaction import redacted
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
Columns = Mapping[str, Sequence[Any]]
"""Of a table, by their names, all as long."""


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

    like: the callbacks so far. warn: told of a tracker that failed, with the code `report_failed` and the
        error's type; its text, which may hold an operator's names and keys, goes to standard error.
    """

    def __init__(self, like: CallbackHandler, warn: Warn) -> None:
        self._warn = warn
        self._failed: set[tuple[TrainerCallback, str]] = set()
        super().__init__(  # type: ignore[no-untyped-call]
            like.callbacks, like.model, like.processing_class, like.optimizer, like.lr_scheduler
        )

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        super().add_callback(callback)  # type: ignore[no-untyped-call]
        added = self.callbacks[-1]
        name = _name(added)
        for event in _EVENTS if name else ():
            setattr(added, event, partial(self._tell, added, getattr(added, event)))

    def show(
        self,
        table: Columns,
        update: int,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
    ) -> None:
        """Have the trackers that know tables show an update's; on the main process.

        One that cannot (MLflow without its store of artifacts) still gets the metrics.
        """
        for tracker in self.callbacks:
            show = next((show for kind, show in _TABLES.items() if isinstance(tracker, kind)), None)
            if show is not None:
                if not _is_begun(tracker):
                    tracker.on_train_begin(args, state, control, model=self.model)
                self._attempt(tracker, "samples", partial(show, tracker, table, update))

    def _tell(self, tracker: TrainerCallback, tell: Callable[..., object], *given: Any, **named: Any) -> None:
        if "logs" in named and isinstance(tracker, _RENAMING):
            named["logs"] = {
                re.sub(r"^(eval|test)/", r"\1_", name): value for name, value in named["logs"].items()
            }
        self._attempt(tracker, "run", partial(tell, *given, **named))

    def _attempt(self, tracker: TrainerCallback, what: str, tell: Callable[[], object]) -> None:
        """Tell a tracker of the run or of its samples, where that has not failed before."""
        if self._failed & {(tracker, "run"), (tracker, what)}:
            return
        try:
            tell()
        except Exception as error:  # a library's or a server's, of any type: none is worth the run
            self._failed.add((tracker, what))
            name, kind = _name(tracker), type(error).__name__
            sys.stderr.write(redacted(f"{name} failed: {kind}: {error}\n"))
            left_out = "is reported to no more" if what == "run" else f"gets no more {what}"
            where = "the engine's log (of a script: standard error) says why"
            message = f"{name} failed ({kind}), and {left_out}; {where}."
            self._warn("report_failed", message, {"tracker": name, "of": what})


def _name(tracker: TrainerCallback) -> str:
    """As `report_to` has it; empty: it is no tracker."""
    return next((name for name, kind in INTEGRATION_TO_CALLBACK.items() if isinstance(tracker, kind)), "")


# Tables ----------------------------------------------------------------------------------------------------

_TABLE = "completions"
"""What trackers call samples, as with TRL."""


def _is_begun(tracker: Any) -> bool:
    """Whether it has opened its run: outside of a training nobody may have told it to."""
    return bool(getattr(tracker, "tb_writer", None) or getattr(tracker, "_initialized", False))


def _show_in_tensorboard(tracker: Any, table: Columns, update: int) -> None:
    rows = [table.keys(), ["---"] * len(table), *zip(*table.values(), strict=True)]
    lines = ["|".join(re.sub(r"\s", " ", str(cell)).replace("|", "\\|") for cell in row) for row in rows]
    tracker.tb_writer.add_text(_TABLE, "\n".join(f"|{line}|" for line in lines), update)
    tracker.tb_writer.flush()


def _show_in_wandb(tracker: Any, table: Columns, update: int) -> None:
    rows = [list(row) for row in zip(*table.values(), strict=True)]
    shown = tracker._wandb.Table(columns=list(table), data=rows)
    tracker._wandb.log({_TABLE: shown, "train/global_step": update})


def _show_in_mlflow(tracker: Any, table: Columns, update: int) -> None:
    # A training that has ended has ended its run as well.
    run = tracker._ml_flow.active_run() or tracker._ml_flow.last_active_run()
    columns = {name: list(column) for name, column in table.items()}
    tracker._ml_flow.log_table(columns, f"{_TABLE}/update-{update}.json", run_id=run.info.run_id)


_TABLES: dict[type[TrainerCallback], Callable[[Any, Columns, int], None]] = {
    TensorBoardCallback: _show_in_tensorboard,
    WandbCallback: _show_in_wandb,
    MLflowCallback: _show_in_mlflow,
}


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
    told = {variable: given.get(variable, default) for variable, default in defaults.items()}
    store = told["MLFLOW_TRACKING_URI"]
    # A database on disk has its tables beside it. MLflow would keep them where its first run happened to be.
    beside = {
        "_MLFLOW_SERVER_ARTIFACT_ROOT": str(Path(store.removeprefix("sqlite:///")).parent / "artifacts")
    }
    return {
        **told,
        **(beside if store.startswith("sqlite:///") else {}),
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
