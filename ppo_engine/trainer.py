"""`PPOTrainer`: the PPO loop, as a `transformers.Trainer` with the constructor of TRL 1.12's trainer.

An update is: sample responses, score them, work out advantages, take the optimizer steps. What each of
these does stands in a file of its own; here is their order, and what Trainer does well: optimizer,
schedule, callbacks, reporting, saving.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from pydantic import JsonValue
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    HubStrategy,
    TrainOutput,
    set_seed,
    speed_metrics,
)

from ppo_engine import checkpoint
from ppo_engine.actor_critic import ActorCritic, causal_lm
from ppo_engine.batch import Rollout
from ppo_engine.config import PPOConfig, check_args
from ppo_engine.draws import Purpose
from ppo_engine.experience import TokenScores, experience_of
from ppo_engine.learn import Learner
from ppo_engine.metrics import (
    Clock,
    evaluation_metrics,
    samples_of,
    time_metrics,
    update_metrics,
)
from ppo_engine.parallel import Parallel
from ppo_engine.prompts import Prompt, digest, read_dataset, rows_of_update
from ppo_engine.rewards import Reward, Scorer, Scores
from ppo_engine.rewards.script import scorer_of
from ppo_engine.roles import (
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
from ppo_engine.spec import DEFAULT_ADAPTER, Issue, Loc, SpecError

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
    eval_dataset: prompts to evaluate on and to show completions of, or several such data sets by name.
        Without, the completions shown are those that were trained on.
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
        facts = facts_of(model, processing_class)
        targets = None if isinstance(model, PeftModel) else getattr(peft_config, "target_modules", None)
        self.ppo, self.plan = check_args(args, len(train_dataset), facts, targets)
        _require_eval_prompts(args, eval_dataset)
        self.stop_token_id = _stop_token_id(args, processing_class)
        set_seed(args.seed)
        policy = build_policy(model, peft_config, args.model_adapter_name)
        self.is_peft_model = isinstance(policy, PeftModel)
        if args.ref_adapter_name is not None:
            require_adapter(policy, args.ref_adapter_name, "ref_adapter_name")
        check_value_model(value_model, facts)
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
        if optimizers[0] is not None:
            _require_all_parameters(optimizers[0], actor_critic)
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
        self.eval_prompts = self._read_eval_prompts(eval_dataset, data_collator)
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

    def _read_eval_prompts(
        self, given: Any, data_collator: Callable[..., Any] | None
    ) -> dict[str, list[Prompt]]:
        """By what follows "eval" in the names of their metrics: nothing, or the name of each of several."""
        if given is None:
            return {}
        several = (
            {f"/{name}": rows for name, rows in given.items()} if isinstance(given, Mapping) else {"": given}
        )
        return {
            suffix: self._read_prompts(rows, "eval_dataset", data_collator)
            for suffix, rows in several.items()
        }

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
            self.reference = self.parallel.prepare_frozen(reference, self.model_wrapped)
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
            with self.accelerator.autocast():  # what is prepared computes under it by itself
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
        start_time, losses = time.time(), []
        if self.args.eval_on_start and self.state.global_step == 0:
            self.evaluate()
        while self.state.global_step < self.plan.num_total_batches and not self.control.should_training_stop:
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            metrics = self._update(self.state.global_step + 1)
            losses.append(metrics["loss/policy_avg"] + self.ppo.vf_coef * metrics["loss/value_avg"])
            self.state.global_step += 1
            self.state.episode += self.plan.batch_size
            self.state.epoch = self.state.episode / len(self.prompts)
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
            self._log_evaluate_save(metrics)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return self._train_output(losses, start_time)

    def _train_output(self, losses: Sequence[float], start_time: float) -> TrainOutput:
        """Of the updates of this call: the mean loss, and how fast they were."""
        loss = sum(losses) / len(losses) if losses else math.nan
        episodes = len(losses) * self.plan.batch_size
        speed = speed_metrics("train", start_time, episodes, len(losses))  # type: ignore[no-untyped-call]
        return TrainOutput(self.state.global_step, loss, {**speed, "train_loss": loss})

    def _begin(self, resume_from_checkpoint: str | Path | bool | None) -> None:
        self.is_in_train = True
        directory = self._checkpoint_to_resume(resume_from_checkpoint)
        if directory is not None:
            self.load_checkpoint(directory)
        # After loading: when to log, evaluate, and save is as it is asked for now.
        self.state.max_steps = self.plan.num_total_batches
        self.state.num_train_epochs = math.ceil(self.plan.total_episodes / len(self.prompts))
        self.state.compute_steps(self.args, self.plan.num_total_batches)  # type: ignore[no-untyped-call]
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
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
            if self.eval_prompts:
                self.generate_completions(sampling=True)
            else:
                self._show_samples(rollout, scores)
        return {
            **update_metrics(rollout, scores, experience, kl_BR, self.ppo),
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
        whole = self.parallel.standing_alone(self.model_wrapped, policy) if gathers else nullcontext()
        with generation_mode(policy), whole, self.accelerator.autocast():
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
        """Sample a response to every evaluation prompt, score them, and log the means.

        eval_dataset: instead of the constructor's. Of several data sets, the metrics of each are named
        `<metric_key_prefix>/<name>/…`.

        Raises:
            ValueError: there is no data set.
        """
        given = self._read_eval_prompts(eval_dataset, None) or self.eval_prompts
        if not given:
            raise ValueError("evaluate() has no prompts; give eval_dataset to it, or to the constructor.")
        metrics: dict[str, float] = {}
        for suffix, prompts in given.items():
            # The numbers of update 0: every evaluation of a run draws alike, so that its curve is smooth.
            rollout = self._sample(prompts, 0, Purpose.EVALUATION, self.ppo.temperature)
            scores = self.collector.score(rollout)
            metrics |= evaluation_metrics(rollout, scores, self.ppo, metric_key_prefix + suffix)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def generate_completions(self, sampling: bool = False) -> None:
        """Show the most likely responses to the evaluation prompts; `sampling`: to a few of them only."""
        prompts = [prompt for prompts in self.eval_prompts.values() for prompt in prompts]
        if not prompts:
            return
        if sampling:
            prompts = prompts[:_SAMPLES_SHOWN]
        rollout = self._sample(prompts, 0, Purpose.SAMPLES, 0.0)
        self._show_samples(rollout, self.collector.score(rollout))

    def _is_sample_due(self, update: int) -> bool:
        """True that many times in a run, from its first update on, in even steps."""
        times = self.ppo.num_sample_generations
        return (update - 1) * times % self.plan.num_total_batches < times

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
            self.push_to_hub(commit_message="Model save")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, of the policy: that is what is pushed."""
        actor_critic = self.model
        self.model = actor_critic.policy  # type: ignore[assignment]
        try:
            super().create_model_card(*args, **kwargs)
        finally:
            self.model = actor_critic

    def save_checkpoint(self, directory: Path, metrics: dict[str, Any] | None = None) -> None:
        """Write everything that `load_checkpoint` needs to go on exactly. Every process calls this."""
        checkpoint.write(
            directory, self.state.global_step, self.parallel, self._fill_checkpoint, metrics or {}
        )

    def _fill_checkpoint(self, directory: Path) -> None:
        self.parallel.save_state(directory, self.model_wrapped, self.optimizer)
        if self.parallel.is_main:
            self.state.stateful_callbacks = self._callback_states()
            self.state.save_to_json(str(directory / checkpoint.TRAINER_STATE))
            state = {"run": self._run_identity(), "schedule": self.lr_scheduler.state_dict()}
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
        """JSON that a program adds to what must be the same for a run to go on."""
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
        self._load_callback_state()

    def _run_identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on as it began."""
        return {
            **self.ppo.model_dump(exclude={"save_steps", "eval_steps", "num_sample_generations"}),
            "world_size": self.plan.world_size,
            "num_total_batches": self.plan.num_total_batches,
            "prompts": f"{len(self.prompts)} rows, sha256 {digest(self.prompts)}",
            "reward_weights": {reward.name: reward.weight for reward in self.collector.scorer.rewards},
            **self.extra_identity(),
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Named as Trainer names it, and with the policy in it, so that others load it from there."""
        root, update = self._output_dir, self.state.global_step

        def fill(directory: Path) -> None:
            self._fill_checkpoint(directory)
            self.save_model(str(directory), _internal_call=True)

        checkpoint.write(root / f"{PREFIX_CHECKPOINT_DIR}-{update}", update, self.parallel, fill, {})
        if self.args.push_to_hub and self.args.hub_strategy == HubStrategy.EVERY_SAVE:
            self.push_to_hub(commit_message=f"Training in progress, step {update}")
        if self.parallel.is_main and self.args.save_total_limit:
            for old in complete_updates(root, PREFIX_CHECKPOINT_DIR)[: -self.args.save_total_limit]:
                shutil.rmtree(root / f"{PREFIX_CHECKPOINT_DIR}-{old}")

    def _checkpoint_to_resume(self, resume_from_checkpoint: str | Path | bool | None) -> Path | None:
        if resume_from_checkpoint is True:
            return checkpoint.newest_whole(self._output_dir, self.accelerator.print, PREFIX_CHECKPOINT_DIR)
        return Path(resume_from_checkpoint) if resume_from_checkpoint else None


def _require_eval_prompts(args: PPOConfig, eval_dataset: Any) -> None:
    """Raises SpecError where an evaluation is asked for, and nothing given to evaluate on."""
    if eval_dataset is None and (args.eval_on_start or args.eval_strategy != "no"):
        asked = "eval_on_start" if args.eval_on_start else "eval_strategy"
        msg = f"Nothing given, and {asked} asks for an evaluation; give prompts to evaluate on."
        raise SpecError([Issue(loc=("eval_dataset",), msg=msg)])


def _require_all_parameters(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Raises ValueError where a script's optimizer lacks parameters, which would never be trained."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    lacking = [
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and id(parameter) not in held
    ]
    if lacking:
        raise ValueError(
            f"The optimizer in optimizers lacks {len(lacking)} parameters that are to be trained, such as "
            f"{', '.join(lacking[:4])}: give it those of the policy and of a value_model that you make, or "
            "leave optimizers out (a value head is made by the trainer, and so is an adapter of peft_config)."
        )


def _stop_token_id(args: PPOConfig, tokenizer: Any) -> int | None:
    """The id responses end after; None: they have full length."""
    if args.stop_token is None:
        return args.stop_token_id
    eos_token_id: int | None = tokenizer.eos_token_id
    assert eos_token_id is not None, "the rules ask for it"
    return eos_token_id
