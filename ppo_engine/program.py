"""One run, from its directory to its policy: what `python -m ppo_engine` does once it has a directory.

Here the trainer's logs become events, its saves become checkpoints and exports, and a wish to stop becomes
a stop at the end of the update. Knows no worker, no queue, no HTTP.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from ppo_engine import checkpoint, reporting
from ppo_engine.config import PPOConfig
from ppo_engine.events import BEGUN_AGAIN, Event, EventType, encode
from ppo_engine.issues import Issue, Loc, SpecError
from ppo_engine.learn import NotFinite
from ppo_engine.load import load, read_facts, read_rows
from ppo_engine.memory import OutOfMemory
from ppo_engine.model_sources import HubData
from ppo_engine.parallel import has_bf16, offload_of, processes_started
from ppo_engine.plan import plan
from ppo_engine.rewards import build
from ppo_engine.run_dir import Halvings, Reason, Result, RunDir
from ppo_engine.saving import FREE
from ppo_engine.spec import Lora, Resources, RunSpec, identity, public
from ppo_engine.trainer import PPOTrainer
from ppo_engine.watch import Watch

_ACK_POLL_SECONDS = 0.2


class EventLog:
    """Appends to `events.jsonl`.

    suffix: ends every key. On a GPU a repeated update may differ in its last digits, so the events of each
        attempt are its own; on a CPU they are the same, and whoever has them drops them.
    """

    def __init__(self, path: Path, suffix: str) -> None:
        self.path, self.suffix = path, suffix

    def say(self, kind: EventType, update: int, name: str, data: dict[str, Any]) -> None:
        event = Event(key=f"{name}{self.suffix}", type=kind, update=update, time=time.time(), data=data)
        with self.path.open("ab") as file:
            file.write(encode(event))

    def position(self) -> dict[str, int | str]:
        """What has been said so far, as its length and digest; it is on disk when this returns."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": file.tell(), "sha256": digest}

    def cut_back(self, position: dict[str, Any]) -> bool:
        """Drop what was said after a position. False: this is another file, with a history of its own."""
        size = int(position["bytes"])
        if not self.path.exists():
            return False
        with self.path.open("rb") as file:
            if hashlib.sha256(file.read(size)).hexdigest() != position["sha256"]:
                return False
        os.truncate(self.path, size)
        return True


class StopWhenAsked(TrainerCallback):
    """Ends the run at the end of an update, with a checkpoint, when any process has a reason to."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer
        self.reason: Reason | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.trainer.watch.progress = state.global_step
        reasons = [reason for reason in self.trainer.parallel.gather(self.trainer.watch.reason()) if reason]
        if reasons and state.global_step < state.max_steps:
            self.reason = reasons[0]
            control.should_save = control.should_training_stop = True
        return control


class RunTrainer(PPOTrainer):
    """A trainer that lives in a run directory: it resumes there, speaks there, and saves there."""

    def __init__(
        self, run_dir: RunDir, watch: Watch, attempt: int, introduction: dict[str, Any], **arguments: Any
    ) -> None:
        self.run_dir, self.watch, self.attempt, self.introduction = run_dir, watch, attempt, introduction
        self._damage: list[str] = []
        super().__init__(**arguments)
        is_repeatable = self.parallel.device.type == "cpu" or attempt == 1
        self.events = EventLog(run_dir.events, "" if is_repeatable else f"@a{attempt}")
        self.stop = StopWhenAsked(self)
        self.add_callback(self.stop)

    limit_names = ("prompts.overlong", "prompts.max_length")

    def prompts_loc(self, name: str) -> Loc:
        return ("prompts", "eval" if name == "eval_dataset" else "train")

    # Speaking ------------------------------------------------------------------------------------------

    def say(self, kind: EventType, name: str, data: dict[str, Any], update: int | None = None) -> None:
        """Append an event, on the main process."""
        if self.parallel.is_main:
            self.events.say(kind, self.state.global_step if update is None else update, name, data)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        kind: EventType = "evaluation" if any(name.startswith("eval/") for name in logs) else "metrics"
        self.say(kind, f"{kind}:{self.state.global_step}", dict(logs))
        super().log(logs, start_time)

    def log_samples(self, samples: list[dict[str, Any]], update: int) -> None:
        self.say("samples", f"samples:{update}", {"samples": samples}, update)

    def _say_checkpoint(self) -> None:
        update = self.state.global_step
        self.say("checkpoint", f"checkpoint:{update}", {"update": update, "metrics": dict(self.latest)})

    def _take_over(self, halvings: Halvings) -> None:
        """What an engine before this one found out, which could only end, is said in its place."""
        given = halvings.model_dump()
        if not any(given.values()):
            return
        self.room.at_least(given)
        times = ", ".join(f"{work} {number}" for work, number in given.items() if number)
        message = f"Out of memory: the run was started again, with rows at a time halved so often: {times}."
        self.say("warning", BEGUN_AGAIN + times, {"code": "out_of_memory", "message": message, **given})

    def warn(self, code: str, message: str, numbers: Mapping[str, JsonValue]) -> None:
        update = self.state.global_step
        self._say_warning(f"{code}:{update}:{'-'.join(map(str, numbers.values()))}", code, message, numbers)

    def _say_warning(
        self, key: str, code: str, message: str, numbers: Mapping[str, JsonValue] | None = None
    ) -> None:
        self.say("warning", f"warning:{key}", {"code": code, "message": message, **(numbers or {})})

    # Resuming ------------------------------------------------------------------------------------------

    def _resume(self, resume_from_checkpoint: str | Path | bool | None) -> None:
        super()._resume(resume_from_checkpoint)
        if self.state.global_step == 0:
            if self.parallel.is_main:
                self.run_dir.events.unlink(missing_ok=True)  # of a run that never came to a checkpoint
            prompts = {self.prompts_loc(name)[-1]: read.counts() for name, read in self.prompt_sets.items()}
            self.say("started", "started", {**self.introduction, "prompts": prompts})
        for message in self._damage:
            self._say_warning(f"damaged:{message.split()[1]}", "damaged_checkpoint", message)
        self._take_over(self.run_dir.read_halvings())

    def _checkpoint_to_resume(self, resume_from_checkpoint: str | Path | bool | None) -> Path | None:
        return checkpoint.newest_whole(self.run_dir.checkpoints, self._damage.append)

    def load_checkpoint(self, directory: Path) -> None:
        super().load_checkpoint(directory)
        update = self.state.global_step
        self.watch.progress = update
        if self.parallel.is_main:
            saved = checkpoint.read_run_state(directory)
            reporting.go_on(saved["reports"], self.run_dir.read_spec().report_to)
            if not self.events.cut_back(saved["events"]):
                self.say("rewound", f"rewound:a{self.attempt}:{update}", {"to": update})
        # A crash may have come between the checkpoint and the word of it.
        self._say_checkpoint()
        changed = checkpoint.differences(checkpoint.read_run_state(directory)["made_with"])
        if changed:
            message = (
                f"The checkpoint of update {update} was made elsewhere ({'; '.join(changed)}): the run goes "
                "on, and may differ in its last digits from one that was never interrupted."
            )
            self._say_warning(f"not_exact:a{self.attempt}:{update}", "not_exact", message)
        if update not in self.run_dir.complete_exports():
            self._export(update)

    # Saving --------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Export and checkpoint, then the word of them; older checkpoints go once they are safe elsewhere."""
        update = self.state.global_step
        self._await_acks()
        self._export(update)
        self.judge()
        self.save_checkpoint(self.run_dir.checkpoint(update))
        self._say_checkpoint()
        if self.parallel.is_main:
            self._drop_old_checkpoints()

    def _export(self, update: int) -> None:
        method = self.run_dir.read_spec().method
        save = self.save_merged_model if isinstance(method, Lora) and method.merge else self.save_model

        def fill(directory: Path) -> None:
            save(str(directory))

        checkpoint.write(self.run_dir.export(update), update, self.parallel, fill, self.latest)

    def keep_policy(self, further_steps: int) -> None:
        """Export the policy of a run that cannot go on: no step that was not finite is in it.

        further_steps: of the update that could not be done, those that were taken; the card tells of them.
        """
        self.further_steps = further_steps
        update = self.state.global_step
        if update > 0 and update not in self.run_dir.complete_exports():
            self._export(update)

    def data_name(self, name: str) -> str:
        source = self.run_dir.read_spec().prompts.sources()[str(self.prompts_loc(name)[-1])]
        return f"{name}: {source}" if isinstance(source, HubData) else name

    def settings(self) -> tuple[str, dict[str, JsonValue]]:
        return "Spec", public(self.run_dir.read_spec())

    def extra_state(self) -> dict[str, Any]:
        return {
            "events": self.events.position(),
            "reports": reporting.open_runs(self.run_dir.read_spec().report_to),
        }

    def extra_identity(self) -> dict[str, JsonValue]:
        return identity(self.run_dir.read_spec())

    def _await_acks(self) -> None:
        """Where checkpoints are taken elsewhere, let no more than one be on its way.

        All processes ask again and again: a single long wait for the main one would exceed the time that
        collectives are given.
        """
        while self.parallel.any(self.parallel.is_main and self._is_upload_behind()):
            time.sleep(_ACK_POLL_SECONDS)

    def _is_upload_behind(self) -> bool:
        acks = self.run_dir.read_acks()
        waiting = self.run_dir.complete_checkpoints()[-2:-1]
        return acks is not None and not set(waiting) <= set(acks.checkpoints) and self.watch.reason() is None

    def _drop_old_checkpoints(self) -> None:
        acks = self.run_dir.read_acks()
        updates = self.run_dir.complete_checkpoints()
        for update in self._outdated(updates, self.run_dir.checkpoint):
            if acks is None or update in acks.checkpoints:
                shutil.rmtree(self.run_dir.checkpoint(update))


def run(run_dir: RunDir, spec: RunSpec, attempt: int, watch: Watch) -> Result:
    """Train until the end, or until there is a reason to stop.

    Raises:
        SpecError: the run cannot be, and why.
        RewardError, NotFinite, OutOfMemory, CheckpointMismatch: as `PPOTrainer.train`.
    """
    trainer = _trainer(run_dir, spec, attempt, watch)
    try:
        trainer.train(resume_from_checkpoint=True)
    except OutOfMemory as error:
        if error.can_go_on:
            return _out_of_memory(run_dir, error, trainer)
        raise
    except NotFinite as error:
        trainer.keep_policy(error.steps_taken)
        raise
    update, reason = trainer.state.global_step, trainer.stop.reason
    if reason is not None:
        message = f"Stopped after update {update} of {trainer.plan.num_total_batches}."
        return Result(outcome="stopped", reason=reason, update=update, message=message)
    trainer.say("finished", "finished", {"outcome": "succeeded", "reason": "finished"})
    message = f"All {update} updates are done."
    return Result(outcome="succeeded", reason="finished", update=update, message=message)


def _out_of_memory(run_dir: RunDir, error: OutOfMemory, trainer: RunTrainer) -> Result:
    """Hand over what has been found out to the engine that is started next, in the same directory."""
    run_dir.write_halvings(Halvings(**trainer.room.halvings))
    return Result(outcome="stopped", reason="oom", update=trainer.state.global_step, message=str(error))


def _require_as_planned(resources: Resources, name: str, found: int | str) -> None:
    """Raises SpecError where the run was not started with the resources that it is planned for."""
    given = getattr(resources, name)
    if given == found:
        return
    kind = f"--use_deepspeed --zero_stage {resources.zero_stage}" if resources.zero_stage else "--multi_gpu"
    fix = f"start it through accelerate launch --num_processes {resources.gpus} {kind}"
    if resources.offload == "optimizer":
        fix += " --offload_optimizer_device cpu"
    if resources.gpus == 1 and not resources.zero_stage:
        fix = "start it without a launcher"
    msg = f"{given} given, but the run was started with {found}: {fix}."
    raise SpecError([Issue(loc=("resources", name), msg=msg)])


def _require_of_machine(resources: Resources) -> None:
    """Raises SpecError where this machine cannot do what the run is planned with."""
    issues: list[Issue] = []
    if resources.zero_stage and find_spec("deepspeed") is None:
        msg = f"{resources.zero_stage} given; this machine has no DeepSpeed: give 0, or have it installed."
        issues.append(Issue(loc=("resources", "zero_stage"), msg=msg))
    if resources.precision == "bf16" and not has_bf16():
        msg = '"bf16" given; the GPUs of this machine do not compute in it: give "fp32".'
        issues.append(Issue(loc=("resources", "precision"), msg=msg))
    if issues:
        raise SpecError(issues)


def _require_own_checkpoint(run_dir: RunDir, spec: RunSpec) -> None:
    """Raises CheckpointMismatch where the run cannot go on, as far as the spec tells."""
    if updates := run_dir.complete_checkpoints():
        known = {**spec.ppo.model_dump(exclude=FREE), "world_size": spec.resources.gpus, **identity(spec)}
        checkpoint.require_alike(run_dir.checkpoint(updates[-1]), known)


def _trainer(run_dir: RunDir, spec: RunSpec, attempt: int, watch: Watch) -> RunTrainer:
    """Everything loaded; what cannot be is said before the first model is."""
    _require_of_machine(spec.resources)
    _require_as_planned(spec.resources, "gpus", processes_started())
    rows = read_rows(run_dir, spec)
    columns = {field: {name for row in several for name in row} for field, several in rows.items()}
    facts = read_facts(spec, len(rows["train"]), columns)
    has_gpu = torch.cuda.is_available()
    name = run_dir.name(attempt)
    args = PPOConfig.from_spec(
        spec,
        facts,
        output_dir=run_dir.checkpoints,
        report_to=list(spec.report_to),
        run_name=name,
        disable_tqdm=True,
        use_cpu=not has_gpu,
        ddp_backend="gloo" if spec.resources.gpus > 1 and not has_gpu else None,
    )
    zero_stage = 0 if args.deepspeed_plugin is None else args.deepspeed_plugin.zero_stage
    _require_as_planned(spec.resources, "zero_stage", zero_stage)
    _require_as_planned(spec.resources, "offload", offload_of(args.deepspeed_plugin))
    introduction = {"plan": plan(spec, facts).model_dump(mode="json"), "made_with": checkpoint.environment()}
    if spec.report_to:
        run_dir.reports.mkdir(exist_ok=True)
        os.environ |= reporting.environment(os.environ, run_dir, name)
    _require_own_checkpoint(run_dir, spec)
    scorer = build(spec.rewards, device=args.device)
    set_seed(spec.ppo.seed)  # before new adapters and heads are drawn
    loaded = load(spec)
    return RunTrainer(
        run_dir,
        watch,
        attempt,
        introduction,
        args=args,
        processing_class=loaded.tokenizer,
        model=loaded.policy,
        ref_model=None,
        reward_model=scorer,
        train_dataset=rows["train"],
        eval_dataset=rows.get("eval"),
        value_model=loaded.value_model,
    )
