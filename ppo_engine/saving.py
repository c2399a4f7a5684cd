"""A trainer's checkpoints and exports: what goes into them, which stay, and how a run goes on from one.

`PPOTrainer` adds the loop. This module does not know when to save.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from ppo_engine import checkpoint, exports
from ppo_engine.actor_critic import ActorCritic
from ppo_engine.advantages import RunningMoments
from ppo_engine.card import Card, DataSet, model_card
from ppo_engine.config import PPOConfig, beside_hyperparameters
from ppo_engine.hyperparameters import Hyperparameters
from ppo_engine.learn import Learner
from ppo_engine.memory import Room
from ppo_engine.parallel import Parallel
from ppo_engine.plan import Schedule
from ppo_engine.prompts import Prompt, digest
from ppo_engine.reporting import Callbacks
from ppo_engine.retention import kept
from ppo_engine.roles import adapter_settings
from ppo_engine.rollout.collect import Collector
from ppo_engine.run_dir import complete_updates
from ppo_engine.spec import DEFAULT_ADAPTER

FREE = {  # to change between a checkpoint and going on: they do not change what is computed
    *("save_steps", "eval_steps", "num_sample_generations"),
    *("save_total_limit", "metric_for_best_model", "greater_is_better"),
}


@dataclass
class PPOTrainerState(TrainerState):
    """Trainer's state, and the responses sampled so far."""

    episode: int = 0


class SavingTrainer(Trainer):
    """A `Trainer` that saves a policy alone, and everything that a run needs to go on exactly."""

    args: PPOConfig
    model: ActorCritic
    model_wrapped: nn.Module
    deepspeed: Any
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    state: PPOTrainerState
    callback_handler: Callbacks
    ppo: Hyperparameters
    plan: Schedule
    parallel: Parallel
    prompts: list[Prompt]
    eval_prompts: dict[str, list[Prompt]]
    collector: Collector
    learner: Learner
    room: Room
    is_peft_model: bool
    kl_coef: float
    score_moments: RunningMoments
    latest: dict[str, Any]
    further_steps = 0
    """Optimizer steps in the policy beyond the updates that are done: of one that could not be."""

    @property
    def _output_dir(self) -> Path:
        assert self.args.output_dir is not None, "TrainingArguments gives it a default"
        return Path(self.args.output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the policy alone, with its tokenizer and card: an adapter, or a whole model.

        Every process calls this.
        """
        self._export_policy(output_dir, merge=False)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def save_merged_model(self, output_dir: str) -> None:
        """Write the policy as a whole model, with its adapter merged into a copy; every process calls this.

        The base that policy, reference, and value share is not touched.
        """
        self._export_policy(output_dir, merge=True)

    def _export_policy(self, output_dir: str | None, *, merge: bool) -> None:
        is_adapter = self.is_peft_model and not merge
        save = exports.save_adapter if is_adapter else exports.save_whole
        save(
            Path(output_dir or self._output_dir),
            self.parallel,
            self.model.policy,
            self.processing_class,
            self.args.model_adapter_name or DEFAULT_ADAPTER,
            model_card(self._card(), is_adapter=is_adapter),
        )

    def create_model_card(  # type: ignore[override]  # the YAML's own names
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        **metadata: Any,
    ) -> None:
        """Write the card of the policy into `output_dir`, as every export has one.

        model_name: taken for Trainer's sake; a directory has no need of it. dataset_name: of the hub.
        metadata: further fields of the card's YAML, such as `license`, `language`, `datasets`; `tags` are
        added to those there are.
        """
        if dataset_name is not None:
            metadata["datasets"] = dataset_name
        if self.parallel.is_main:
            self._output_dir.mkdir(parents=True, exist_ok=True)
            text = model_card(self._card(), is_adapter=self.is_peft_model, **metadata)
            (self._output_dir / exports.CARD).write_text(text, encoding="utf-8")

    def _card(self) -> Card:
        name, settings = self.settings()
        logged = list(reversed(self.state.log_history))
        return Card(
            base=exports.base_of(self.model.policy),
            settings_name=name,
            settings=settings,
            data=self._data_sets(),
            rewards={reward.name: reward.weight for reward in self.collector.scorer.rewards},
            update=self.state.global_step,
            updates=self.plan.num_total_batches,
            further_steps=self.further_steps,
            results=repeatable(next((logs for logs in logged if "objective/kl" in logs), {})),
            evaluation=repeatable(
                next((logs for logs in logged if any(key.startswith("eval") for key in logs)), {})
            ),
        )

    def _data_sets(self) -> tuple[DataSet, ...]:
        known = {"train_dataset": self.prompts}
        known |= {f"eval_dataset{suffix}": prompts for suffix, prompts in self.eval_prompts.items()}
        return tuple(
            DataSet(self.data_name(name), len(prompts), digest(prompts)) for name, prompts in known.items()
        )

    def data_name(self, name: str) -> str:
        """What a card calls a data set; a program may know where it comes from."""
        return name

    def settings(self) -> tuple[str, dict[str, JsonValue]]:
        """What a card calls that which the run was told, and what that is; a program has its spec."""
        given = {
            **self.ppo.model_dump(mode="json", exclude_defaults=True),
            "value_adapter": self.args.value_adapter,
            "precision": "bf16" if self.args.bf16 else "fp32",
            "optim": str(getattr(self.args.optim, "value", self.args.optim)),
            "processes": self.plan.world_size,
        }
        return "Arguments", given

    def save_checkpoint(self, directory: Path) -> None:
        """Write everything that `load_checkpoint` needs to go on exactly. Every process calls this."""
        self._write_checkpoint(directory, self._fill_checkpoint)

    def _write_checkpoint(self, directory: Path, fill: Callable[[Path], None]) -> None:
        checkpoint.write(directory, self.state.global_step, self.parallel, fill, self.latest)
        self._whole.add(directory)

    def _fill_checkpoint(self, directory: Path) -> None:
        self.parallel.save_state(directory, self.model_wrapped, self.optimizer)
        if self.parallel.is_main:
            self.state.stateful_callbacks = self._callback_states()
            self.state.save_to_json(str(directory / checkpoint.TRAINER_STATE))
            state = {
                "run": self._run_identity(),
                "schedule": self.lr_scheduler.state_dict(),
                "kl_coef": self.kl_coef,
                "score_moments": asdict(self.score_moments),
                "halvings": self.room.halvings,
                "skipped": self.learner.skipped,
                "latest": self.latest,
            }
            checkpoint.write_run_state(directory, {**state, **self.extra_state()})

    def _callback_states(self) -> Any:
        parts = [*self.callback_handler.callbacks, self.control]
        return TrainerState(
            stateful_callbacks=[part for part in parts if isinstance(part, ExportableState)]  # type: ignore[misc]
        ).stateful_callbacks

    def extra_state(self) -> dict[str, Any]:
        """JSON that a program adds to a checkpoint's run state."""
        return {}

    def extra_identity(self) -> dict[str, JsonValue]:
        """What must be the same for a run to go on, beside hyperparameters; a program has its spec."""
        adapter = self.args.model_adapter_name or DEFAULT_ADAPTER
        return {
            "model": exports.base_of(self.model.policy).name,
            "critic": self.model.critic,
            **beside_hyperparameters(self.args),
            **adapter_settings(self.model.policy, adapter),
        }

    def load_checkpoint(self, directory: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointMismatch: it is of a run with other settings.
        """
        saved = checkpoint.read_run_state(directory)
        checkpoint.require_same(saved["run"], self._run_identity())
        self.parallel.load_state(directory, self.model_wrapped, self.optimizer)
        self.lr_scheduler.load_state_dict(saved["schedule"])
        self.kl_coef = saved["kl_coef"]
        self.score_moments = RunningMoments(**saved["score_moments"])
        self.room.at_least(saved["halvings"])
        self.learner.skipped = saved["skipped"]
        self.latest = saved["latest"]
        self.state = PPOTrainerState.load_from_json(str(directory / checkpoint.TRAINER_STATE))
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()
        self._load_callback_state()

    def _run_identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on as it began."""
        return {
            **self.ppo.model_dump(exclude=FREE),
            "world_size": self.plan.world_size,
            "num_total_batches": self.plan.num_total_batches,
            "prompts": f"{len(self.prompts)} rows, sha256 {digest(self.prompts)}",
            "reward_weights": {reward.name: reward.weight for reward in self.collector.scorer.rewards},
            "value_adapter": self.args.value_adapter,
            **self.extra_identity(),
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Named as Trainer names it, and with the policy in it, so that others load it from there."""
        root, update = self._output_dir, self.state.global_step
        if self.judge():
            self.state.best_model_checkpoint = str(root / f"{PREFIX_CHECKPOINT_DIR}-{update}")

        def fill(directory: Path) -> None:
            self._fill_checkpoint(directory)
            self.save_model(str(directory), _internal_call=True)

        def directory_of(update: int) -> Path:
            return root / f"{PREFIX_CHECKPOINT_DIR}-{update}"

        self._write_checkpoint(directory_of(update), fill)
        if self.args.push_to_hub and self.args.hub_strategy == HubStrategy.EVERY_SAVE:
            self.push_to_hub(commit_message=f"Training in progress, step {update}")
        if self.parallel.is_main:
            for old in self._outdated(complete_updates(root, PREFIX_CHECKPOINT_DIR), directory_of):
                shutil.rmtree(directory_of(old))

    def _outdated(self, updates: Sequence[int], directory_of: Callable[[int], Path]) -> set[int]:
        """Of updates with a checkpoint, those that need not stay: all but the last ones and the best one.

        Only whole ones of this run count, up to the one just made. Others are nobody's to delete: damaged
        ones, those of another run in the same directory, those of a future that the run has gone back from.
        """
        run, now = self._run_identity(), self.state.global_step
        own = [update for update in updates if update <= now and self._is_whole_of(directory_of(update), run)]
        metric = self.ppo.metric_for_best_model
        values = {update: checkpoint.metric_at(directory_of(update), metric) for update in own}
        return set(own) - kept(values, self.ppo.save_total_limit, greater_is_better=self.ppo.best_is_greatest)

    def _is_whole_of(self, directory: Path, run: Mapping[str, Any]) -> bool:
        if not checkpoint.is_of(directory, run):
            return False
        if directory not in self._whole and checkpoint.fault(directory) is None:
            self._whole.add(directory)
        return directory in self._whole

    @cached_property
    def _whole(self) -> set[Path]:
        """Checkpoints that this process has made, or has read through to the last byte: once is enough."""
        return set()

    def judge(self) -> bool:
        """Whether the checkpoint that is made now is the best so far; Trainer's state then knows it."""
        value = self.latest.get(self.ppo.metric_for_best_model or "")
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        best = self.state.best_metric
        if best is not None and not (value > best if self.ppo.best_is_greatest else value < best):
            return False
        self.state.best_metric, self.state.best_global_step = float(value), self.state.global_step
        return True

    def _checkpoint_to_resume(self, resume_from_checkpoint: str | Path | bool | None) -> Path | None:
        if resume_from_checkpoint is True:
            return checkpoint.newest_whole(self._output_dir, self.accelerator.print, PREFIX_CHECKPOINT_DIR)
        if not resume_from_checkpoint:
            return None
        checkpoint.require_whole(Path(resume_from_checkpoint))
        return Path(resume_from_checkpoint)


def repeatable(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that a repeated run repeats: how long it took is left out."""
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, int | float) and not name.startswith(("time/", "eps"))
    }
