"""`PPOTrainer`: the PPO loop, as a `transformers.Trainer` with the constructor of TRL 1.12's trainer.

An update is: sample responses, score them, work out advantages, take the optimizer steps. What each of
these does stands in a file of its own; here is their order, and what Trainer does well: optimizer,
schedule, callbacks, reporting, saving.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput, set_seed

from ppo_engine import checkpoint
from ppo_engine.actor_critic import ActorCritic, causal_lm
from ppo_engine.batch import Rollout
from ppo_engine.config import PPOConfig, check_args
from ppo_engine.draws import Purpose
from ppo_engine.experience import TokenScores, experience_of
from ppo_engine.learn import Learner
from ppo_engine.metrics import (
    Clock,
    response_metrics,
    reward_means,
    samples_of,
    time_metrics,
    update_metrics,
)
from ppo_engine.parallel import Parallel
from ppo_engine.prompts import Prompt, read_dataset, rows_of_update
from ppo_engine.rewards import Reward, Scorer, Scores
from ppo_engine.rewards.script import scorer_of
from ppo_engine.roles import (
    DEFAULT_ADAPTER,
    build_policy,
    check_output_layer,
    check_value_model,
    disable_dropout,
    facts_of,
    frozen_copy,
    generation_mode,
    recompute_activations,
    reference_adapter,
    require_adapter,
    set_modes,
)
from ppo_engine.rollout.collect import Collector
from ppo_engine.run_dir import complete_updates
from ppo_engine.spec import Loc

_SAMPLES_SHOWN = 5


@dataclass
class PPOTrainerState(TrainerState):
    """Trainer's state, and the responses sampled so far."""

    episode: int = 0


class PPOTrainer(Trainer):
    """Proximal Policy Optimization for language models.

    args: a `PPOConfig`.
    processing_class: the policy's tokenizer.
    model: the policy: a causal language model, or a peft model around one.
    ref_model: the reference; None: a frozen copy of the policy, or with adapters the policy without them.
    reward_model: a sequence-classification model with one label that shares the policy's tokenizer, or a
        function from a `RewardBatch` to one number per row or per response token, or a list of these, whose
        sum is the score.
    train_dataset: rows with `input_ids`, `prompt` (text), or `messages` (chat); further columns reach the
        reward functions.
    value_model: a sequence-classification model with one label; None: a head on the policy's trunk.
    data_collator: changes each row before its `input_ids` are read, as a collator of one row.
    eval_dataset: prompts to evaluate on and to show completions of.
    optimizers: optimizer and schedule, instead of those that `args` describe.
    peft_config: wrap the policy with a new adapter.

    Raises:
        SpecError: arguments that break a rule, before anything is loaded or moved.
        ValueError, TypeError: roles that do not fit together.
    """

    args: PPOConfig
    model: ActorCritic
    model_wrapped: nn.Module
    deepspeed: Any
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    state: PPOTrainerState

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: nn.Module,
        ref_model: nn.Module | None,
        reward_model: nn.Module | Reward | Sequence[nn.Module | Reward] | Scorer,
        train_dataset: Any,
        value_model: nn.Module | None = None,
        data_collator: Callable[..., Any] | None = None,
        eval_dataset: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        if train_dataset is None:
            raise ValueError("train_dataset is None; give the prompts to train on.")
        if ref_model is model:
            raise ValueError(
                "model and ref_model are the same object, so the reference would move with the policy; "
                "give a copy, or None to have one made (with adapters: the base serves as the reference)."
            )
        self.ppo, self.plan = check_args(args, len(train_dataset), facts_of(model, processing_class))
        self.stop_token_id = _stop_token_id(args, processing_class)
        set_seed(args.seed)
        policy = build_policy(model, peft_config, args.model_adapter_name)
        self.is_peft_model = isinstance(policy, PeftModel)
        if args.ref_adapter_name is not None:
            require_adapter(policy, args.ref_adapter_name, "ref_adapter_name")
        check_value_model(value_model)
        if ref_model is None and not self.is_peft_model:
            ref_model = frozen_copy(policy)
        self.ref_model = ref_model
        for role in (policy, ref_model, value_model):
            if role is not None:
                disable_dropout(role)
        check_output_layer(policy)
        for trained in (policy, value_model):
            if trained is not None and args.gradient_checkpointing:
                recompute_activations(trained, args.activation_checkpointing_kwargs)
        if self.stop_token_id is not None:
            causal_lm(policy).generation_config.eos_token_id = self.stop_token_id
        actor_critic = ActorCritic(policy, value_model, value_head=True)
        use_cache = actor_critic.config.use_cache
        super().__init__(
            model=actor_critic,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        actor_critic.config.use_cache = (
            use_cache  # Trainer's constructor changes it, and it would be exported
        )
        self.state = PPOTrainerState(**vars(self.state))
        self.parallel = Parallel(self.accelerator, self.ppo.max_grad_norm)
        self.prompts = self._read_prompts(train_dataset, "train_dataset", data_collator)
        self.eval_prompts = (
            [] if eval_dataset is None else self._read_prompts(eval_dataset, "eval_dataset", data_collator)
        )
        self._prepare()
        scorer = scorer_of(reward_model, processing_class, self.parallel.device)
        self.collector = Collector(self.parallel, processing_class, self.ppo, self.stop_token_id, scorer)

    def _read_prompts(self, rows: Any, name: str, data_collator: Callable[..., Any] | None) -> list[Prompt]:
        config = self.model.config.get_text_config()
        context_length = getattr(config, "max_position_embeddings", None)
        limit = None if context_length is None else context_length - self.ppo.response_length
        return read_dataset(
            rows,
            self.processing_class,
            limit,
            data_collator,
            vocab_size=config.vocab_size,
            loc=self.prompts_loc(name),
        )

    def prompts_loc(self, name: str) -> Loc:
        """What messages call a data set; a program has other names for it."""
        return (name,)

    def _prepare(self) -> None:
        """Hand the trained module to the processes; nothing is added to it afterwards."""
        self.create_optimizer()
        self.create_scheduler(self.plan.num_total_batches)
        self.model_wrapped, self.optimizer = self.parallel.prepare(self.model, self.optimizer)
        if self.is_deepspeed_enabled:
            self.deepspeed = self.model_wrapped
        set_modes(self.model)
        self.reference: nn.Module | None = None
        if self.ref_model is not None:
            reference = ActorCritic(self.ref_model, None, value_head=False).requires_grad_(False).eval()
            self.reference = self.parallel.prepare_frozen(reference)
        self.learner = Learner(self.parallel, self.model_wrapped, self.optimizer, self.ppo)

    # The reference -------------------------------------------------------------------------------------

    @contextmanager
    def null_ref_context(self) -> Iterator[None]:
        """Inside, `self.model.policy` computes as the reference; afterwards all is as before.

        Without adapters nothing is switched: the reference is a model of its own.
        """
        if not self.is_peft_model:
            yield
            return
        with reference_adapter(self.model.policy, self.args.ref_adapter_name):
            yield

    def _reference_logprobs(self, rollout: Rollout) -> Tensor:
        if self.reference is not None:
            return self.learner.score(self.reference, rollout, with_value=False)[0]
        with self.null_ref_context():
            return self.learner.score(self.model_wrapped, rollout, with_value=False)[0]

    # The loop ------------------------------------------------------------------------------------------

    def train(  # type: ignore[override]  # PPO has no trials and no keys to ignore
        self, resume_from_checkpoint: str | Path | bool | None = None
    ) -> TrainOutput:
        """Run all updates that are left.

        resume_from_checkpoint: a checkpoint's directory; True: the newest whole one in `output_dir`.

        Raises:
            CheckpointMismatch: the checkpoint is of a run with other settings.
            NotFinite: loss or gradients were not finite too many times in a row.
            RewardError: a reward failed.
        """
        self._begin(resume_from_checkpoint)
        while self.state.global_step < self.plan.num_total_batches and not self.control.should_training_stop:
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            metrics = self._update(self.state.global_step + 1)
            self.state.global_step += 1
            self.state.episode += self.plan.batch_size
            self.state.epoch = self.state.episode / len(self.prompts)
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
            self._log_evaluate_save(metrics)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return TrainOutput(self.state.global_step, 0.0, {})

    def _begin(self, resume_from_checkpoint: str | Path | bool | None) -> None:
        self.is_in_train = True
        self.state.max_steps = self.plan.num_total_batches
        self.state.num_train_epochs = math.ceil(self.plan.total_episodes / len(self.prompts))
        self.state.compute_steps(self.args, self.plan.num_total_batches)  # type: ignore[no-untyped-call]
        directory = self._checkpoint_to_resume(resume_from_checkpoint)
        if directory is not None:
            self.load_checkpoint(directory)
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)

    def _update(self, update: int) -> dict[str, float]:
        """One rollout and all its optimizer steps; the first update is 1."""
        clock = Clock()
        # 1. Which prompts, in which order: a function of the seed and the update alone.
        rows = rows_of_update(update - 1, self.plan.batch_size, len(self.prompts), self.ppo.seed)
        # 2. Sample a response to each.
        prompts = [self.prompts[row] for row in rows]
        rollout = self._sample(prompts, update, Purpose.ROLLOUT, self.ppo.temperature)
        clock.lap("rollout")
        # 3. Ask the rewards.
        scores = self.collector.score(rollout)
        clock.lap("reward")
        # 4. Log-probabilities under policy and reference, and values, as the training forward gives them.
        logprobs_BR, values_BR = self.learner.score(self.model_wrapped, rollout, with_value=True)
        tokens = TokenScores(logprobs_BR, self._reference_logprobs(rollout), values_BR)
        # 5. Rewards per token, advantages, returns.
        experience, kl_BR = experience_of(rollout, scores, tokens, self.ppo)
        clock.lap("scoring")
        # 6. The optimizer steps.
        learning_rate = float(self.lr_scheduler.get_last_lr()[0])
        stats = self.learner.update(experience, update)
        self.lr_scheduler.step()
        clock.lap("update")
        if self._is_sample_due(update):
            self._show_samples(rollout, scores)
        return {
            **update_metrics(rollout, scores, experience, kl_BR, self.ppo.kl_coef),
            **stats.metrics(),
            "lr": learning_rate,
            "episode": float(update * self.plan.batch_size),
            **time_metrics(rollout, clock),
        }

    def _sample(self, prompts: list[Prompt], update: int, purpose: Purpose, temperature: float) -> Rollout:
        """A response per prompt. Sharded weights are gathered first, or every process keeps step."""
        policy = self.model.policy
        is_sharded = self.parallel.zero_stage == 3
        gathers = is_sharded and self.args.ds3_gather_for_generation
        with (
            generation_mode(policy),
            self.parallel.gathered(policy.parameters() if gathers else ()),
            self.accelerator.autocast(),
        ):
            return self.collector.sample(
                causal_lm(policy),
                prompts,
                update,
                purpose,
                temperature=temperature,
                in_step=is_sharded and not gathers,
            )

    # Reporting -----------------------------------------------------------------------------------------

    def _log_evaluate_save(self, metrics: dict[str, float]) -> None:
        """Do what the callbacks have asked for at the end of an update."""
        if self.control.should_log:
            self.log(metrics)
        if self.control.should_evaluate:
            self.evaluate()
        if self.control.should_save:
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample a response to every evaluation prompt, score them, and log the means."""
        prompts = (
            self.eval_prompts
            if eval_dataset is None
            else self._read_prompts(eval_dataset, "eval_dataset", None)
        )
        # The numbers of update 0: every evaluation of a run draws alike, so that its curve is smooth.
        rollout = self._sample(prompts, 0, Purpose.EVALUATION, self.ppo.temperature)
        scores = self.collector.score(rollout)
        metrics = {
            f"{metric_key_prefix}/scores": sum(scores.totals) / len(rollout),
            **reward_means(scores, f"{metric_key_prefix}/reward"),
            **response_metrics(rollout, metric_key_prefix),
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def generate_completions(self, sampling: bool = False) -> None:
        """Show the most likely responses to the evaluation prompts; `sampling`: to a few of them only."""
        if not self.eval_prompts:
            return
        prompts = self.eval_prompts[:_SAMPLES_SHOWN] if sampling else self.eval_prompts
        rollout = self._sample(prompts, 0, Purpose.SAMPLES, 0.0)
        self._show_samples(rollout, self.collector.score(rollout))

    def _is_sample_due(self, update: int) -> bool:
        times = self.ppo.num_sample_generations
        return times > 0 and (update - 1) % max(1, self.plan.num_total_batches // times) == 0

    def _show_samples(self, rollout: Rollout, scores: Scores) -> None:
        if self.parallel.is_main:
            self.log_samples(samples_of(rollout, scores, _SAMPLES_SHOWN))

    def log_samples(self, samples: list[dict[str, Any]]) -> None:
        """Print sample completions, on the main process; a program that reports elsewhere overrides this."""
        for sample in samples:
            self.accelerator.print(f"[{sample['score']:.3f}] {sample['prompt']!r} -> {sample['response']!r}")

    @property
    def _output_dir(self) -> Path:
        assert self.args.output_dir is not None, "TrainingArguments gives it a default"
        return Path(self.args.output_dir)

    # Saving --------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the policy alone, with its tokenizer: an adapter, or a model. Every process calls this."""
        directory = Path(output_dir or self._output_dir)
        checkpoint.save_policy(
            directory,
            self.parallel,
            self.model.policy,
            self.processing_class,
            self.args.model_adapter_name or DEFAULT_ADAPTER,
        )
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_checkpoint(self, directory: Path, metrics: dict[str, Any] | None = None) -> None:
        """Write everything that `load_checkpoint` needs to go on exactly. Every process calls this."""
        checkpoint.write(
            directory, self.state.global_step, self.parallel, self._fill_checkpoint, metrics or {}
        )

    def _fill_checkpoint(self, directory: Path) -> None:
        self.parallel.save_state(directory, self.model_wrapped, self.optimizer)
        if self.parallel.is_main:
            self.state.save_to_json(str(directory / checkpoint.TRAINER_STATE))
            state = {"run": self._run_identity(), "schedule": self.lr_scheduler.state_dict()}
            checkpoint.write_run_state(directory, {**state, **self.extra_state()})

    def extra_state(self) -> dict[str, Any]:
        """JSON that a program adds to a checkpoint's run state."""
        return {}

    def load_checkpoint(self, directory: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointMismatch: it is of a run with other settings.
        """
        saved = checkpoint.read_run_state(directory)
        checkpoint.require_same(saved["run"], self._run_identity())
        self.parallel.load_state(directory, self.model_wrapped, self.optimizer)
        self.lr_scheduler.load_state_dict(saved["schedule"])
        self.state = PPOTrainerState.load_from_json(str(directory / checkpoint.TRAINER_STATE))
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()

    def _run_identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on as it began."""
        return {
            **self.ppo.model_dump(exclude={"save_steps", "eval_steps", "num_sample_generations"}),
            "world_size": self.plan.world_size,
            "num_total_batches": self.plan.num_total_batches,
            "prompts": len(self.prompts),
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        root = self._output_dir
        self.save_checkpoint(root / f"update-{self.state.global_step}")
        if self.args.push_to_hub:
            self.save_model(str(self._output_dir))
        if self.parallel.is_main and self.args.save_total_limit:
            for update in complete_updates(root)[: -self.args.save_total_limit]:
                shutil.rmtree(root / f"update-{update}")

    def _checkpoint_to_resume(self, resume_from_checkpoint: str | Path | bool | None) -> Path | None:
        if resume_from_checkpoint is True:
            return checkpoint.newest_whole(self._output_dir, self.accelerator.print)
        return Path(resume_from_checkpoint) if resume_from_checkpoint else None


def _stop_token_id(args: PPOConfig, tokenizer: Any) -> int | None:
    """The id responses end after; None: they have full length."""
    if args.stop_token is None:
        return args.stop_token_id
    eos_token_id: int | None = tokenizer.eos_token_id
    assert eos_token_id is not None, "the rules ask for it"
    return eos_token_id
