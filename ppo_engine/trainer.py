"""`PPOTrainer`: the PPO loop, as a `transformers.Trainer` with the constructor of TRL 1.12's trainer.

An update is: sample responses, score them, work out advantages, take the optimizer steps. What each of
these does stands in a file of its own; here is their order, and what Trainer does well: optimizer,
schedule, callbacks, reporting, saving.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from pydantic import JsonValue
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import (
    IntervalStrategy,
    TrainOutput,
    set_seed,
    speed_metrics,
)

from ppo_engine.actor_critic import ActorCritic, causal_lm
from ppo_engine.advantages import RunningMoments, adapted_kl_coef
from ppo_engine.advantages import masked_mean as masked_mean  # where TRL's scripts look for them
from ppo_engine.advantages import masked_var as masked_var
from ppo_engine.advantages import masked_whiten as masked_whiten
from ppo_engine.allocator import keep_freed_memory
from ppo_engine.arguments import (
    check_critic,
    evaluation_sets,
    refuse_critic_rates,
    require_all_parameters,
    require_best_metric,
    require_evaluations,
    require_own_reference,
    require_stop_token,
    require_train_prompts,
    stop_token_id,
)
from ppo_engine.batch import Rollout, padded
from ppo_engine.config import PPOConfig, check_args, prompt_lengths
from ppo_engine.draws import Purpose
from ppo_engine.experience import TokenScores, experience_of
from ppo_engine.facts import ModelFacts
from ppo_engine.issues import Loc
from ppo_engine.learn import Learner
from ppo_engine.lora import fuse
from ppo_engine.memory import Room
from ppo_engine.metrics import (
    Clock,
    columns_of,
    evaluation_metrics,
    first_of_each_kind,
    mean_kl,
    samples_of,
    time_metrics,
    update_metrics,
)
from ppo_engine.optimization import critic_first, drop_empty_groups, split_groups
from ppo_engine.parallel import Parallel
from ppo_engine.prompts import Limit, Prompt, PromptSet, read_dataset, rows_of_update
from ppo_engine.reporting import Callbacks
from ppo_engine.rewards import ByAdapter, Reward, Scorer, Scores
from ppo_engine.rewards.script import scorer_of
from ppo_engine.roles import (
    add_value_adapter,
    build_policy,
    check_output_layer,
    check_value_model,
    disable_dropout,
    facts_of,
    frozen_copy,
    generation_mode,
    recompute_activations,
    reference_adapter,
    require_reward_adapter,
    set_modes,
)
from ppo_engine.rollout.agreement import samples_as_it_trains
from ppo_engine.rollout.collect import Collector
from ppo_engine.rollout.turns import Environment
from ppo_engine.saving import PPOTrainerState, SavingTrainer, repeatable
from ppo_engine.spec import DEFAULT_ADAPTER

_SAMPLES_SHOWN = 5


class PPOTrainer(SavingTrainer):
    """Proximal Policy Optimization for language models.

    args: a `PPOConfig`.
    processing_class: the policy's tokenizer.
    model: the policy: a causal language model, or a peft model around one.
    ref_model: the reference; None: a frozen copy of the policy, or with adapters the policy without them.
    reward_model: a sequence-classification model with one label that shares the policy's tokenizer, or a
        function from a `RewardBatch` to one number per row or per response token, or a list of these, whose
        sum is the score; None: `args.reward_adapter_name` names the only reward.
    train_dataset: rows with `input_ids`, `prompt` (text), or `messages` (chat); further columns reach the
        reward functions.
    value_model: a sequence-classification model with one label; None: a head on the policy's trunk, or no
        critic where `args.advantage_estimator` needs none.
    data_collator: changes each row before its `input_ids` are read, as a collator of one row.
    eval_dataset: prompts to evaluate on and to show completions of, or several such data sets by name.
        Without, the completions shown are those that were trained on.
    optimizers: optimizer and schedule, instead of those that `args` describe.
    peft_config: wrap the policy with a new adapter.
    environment: answers the policy wherever it comes to its stop token; None: there a response ends.

    Raises:
        SpecError: arguments that break a rule, before anything is loaded or moved.
        ValueError, TypeError: roles that do not fit together.
    """

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: nn.Module,
        ref_model: nn.Module | None,
        reward_model: nn.Module | Reward | Sequence[nn.Module | Reward] | Scorer | None,
        train_dataset: Any,
        value_model: nn.Module | None = None,
        data_collator: Callable[..., Any] | None = None,
        eval_dataset: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        environment: Environment | None = None,
    ) -> None:
        # 1. What cannot be is said before anything is made of the arguments.
        facts = self._check(args, processing_class, model, ref_model, train_dataset, peft_config)
        has_adapters = isinstance(model, PeftModel) or peft_config is not None
        check_critic(args, self.ppo, value_model, has_adapters=has_adapters)
        check_value_model(value_model, facts)
        require_stop_token(environment, self.stop_token_id)
        if optimizers[0] is not None:
            refuse_critic_rates(self.ppo)
        evaluated = require_evaluations(args, eval_dataset)
        by_adapter = args.reward_adapter_name is not None
        scorer = scorer_of(reward_model, processing_class, args.device, by_adapter=by_adapter)
        require_best_metric(args, self.ppo, [reward.name for reward in scorer.rewards], evaluated)
        # 2. The roles.
        set_seed(args.seed)
        actor_critic = self._assemble(args, model, ref_model, value_model, peft_config)
        if optimizers[0] is not None:
            require_all_parameters(optimizers[0], actor_critic)
        # 3. Trainer's own part, which changes what the config says of caches: that would be exported.
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
        actor_critic.config.use_cache = use_cache
        self.callback_handler = Callbacks(self.callback_handler, self.warn)
        # 4. Where a run stands, and with whom it runs.
        self.state = PPOTrainerState(**vars(self.state))
        self.kl_coef = self.ppo.kl_coef
        self.latest: dict[str, JsonValue] = {}  # metrics of the update just done, and of its evaluation
        self.score_moments = RunningMoments()
        self.parallel = Parallel(self.accelerator, self.ppo.max_grad_norm)
        if self.parallel.device.type == "cpu":
            keep_freed_memory()
        self.room = Room(self.parallel, partial(self.warn, "out_of_memory"))
        # 5. The prompts.
        read_train = self._read_prompts(train_dataset, "train_dataset", data_collator)
        read_eval = self._read_eval_prompts(evaluated, data_collator)
        self.prompt_sets = {"train_dataset": read_train}
        self.prompt_sets |= {f"eval_dataset{suffix}": read for suffix, read in read_eval.items()}
        self.prompts = read_train.prompts
        self.eval_prompts = {suffix: read.prompts for suffix, read in read_eval.items()}
        # 6. What samples, and what learns.
        self._prepare()
        self.collector = Collector(
            self.parallel, processing_class, self.ppo, self.stop_token_id, scorer, self.room, environment
        )

    def _check(
        self,
        args: PPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        model: nn.Module,
        ref_model: nn.Module | None,
        train_dataset: Any,
        peft_config: PeftConfig | None,
    ) -> ModelFacts:
        """The derived numbers, and what is known of the policy. Raises SpecError where a rule is broken."""
        require_train_prompts(train_dataset)
        require_own_reference(model, ref_model)
        facts = facts_of(model, tokenizer)
        targets = None if isinstance(model, PeftModel) else getattr(peft_config, "target_modules", None)
        self.ppo, self.plan = check_args(args, len(train_dataset), facts, targets)
        self.stop_token_id = stop_token_id(args, tokenizer)
        return facts

    def _assemble(
        self,
        args: PPOConfig,
        model: nn.Module,
        ref_model: nn.Module | None,
        value_model: nn.Module | None,
        peft_config: PeftConfig | None,
    ) -> ActorCritic:
        """Policy and critic as one module; the reference beside it, where it is a model of its own."""
        policy = build_policy(model, peft_config, args.model_adapter_name, args.ref_adapter_name)
        trained_adapter = args.model_adapter_name or DEFAULT_ADAPTER
        value_adapter = add_value_adapter(policy, trained_adapter) if args.value_adapter else None
        self.is_peft_model = isinstance(policy, PeftModel)
        if args.reward_adapter_name is not None:
            require_reward_adapter(policy, args.reward_adapter_name, trained_adapter)
        if ref_model is None and not self.is_peft_model:
            ref_model = frozen_copy(policy)
        self.ref_model = ref_model
        for role in (policy, ref_model, value_model):
            if role is not None:
                disable_dropout(role)
        fuse(policy)
        check_output_layer(policy)
        for trained in (policy, value_model):
            if trained is not None and args.gradient_checkpointing:
                recompute_activations(trained, args.activation_checkpointing_kwargs)
        if self.stop_token_id is not None:
            causal_lm(policy).generation_config.eos_token_id = self.stop_token_id
        return ActorCritic(
            policy,
            value_model,
            value_head=self.ppo.has_critic,
            value_adapter=value_adapter,
            reward_adapter=args.reward_adapter_name,
        )

    def _read_prompts(self, rows: Any, name: str, data_collator: Callable[..., Any] | None) -> PromptSet:
        config = self.model.config.get_text_config()
        context_length = getattr(config, "max_position_embeddings", None)
        room = None if context_length is None else context_length - self.ppo.response_length
        return read_dataset(
            rows,
            self.processing_class,
            Limit(room, prompt_lengths(self.args), self.limit_names),
            data_collator,
            vocab_size=config.vocab_size,
            loc=self.prompts_loc(name),
        )

    def _read_eval_prompts(
        self, data_sets: Mapping[str, Any], data_collator: Callable[..., Any] | None
    ) -> dict[str, PromptSet]:
        """By what follows "eval" in the names of their metrics."""
        return {
            suffix: self._read_prompts(rows, "eval_dataset", data_collator)
            for suffix, rows in data_sets.items()
        }

    limit_names = ("overlong_prompts", "max_prompt_length")
    """What messages call the arguments of how long prompts may be; a program has other names for them."""

    def prompts_loc(self, name: str) -> Loc:
        """What messages call a data set; a program has other names for it."""
        return (name,)

    def _prepare(self) -> None:
        """Hand the trained module to the processes; nothing is added to it afterwards."""
        reference = None if self.ref_model is None else ActorCritic(self.ref_model, None, value_head=False)
        self._pack([self.model] if reference is None else [self.model, reference])
        in_fp32 = self.accelerator.mixed_precision == "no" and not self.args.tf32
        # Of all processes, or some would make a forward that others wait for.
        self.samples_as_it_trains = not self.parallel.any(not (in_fp32 and samples_as_it_trains(self.model)))
        self._make_optimizer()
        self.model_wrapped, self.optimizer = self.parallel.prepare(self.model, self.optimizer)
        if self.is_deepspeed_enabled:
            self.deepspeed = self.model_wrapped
        set_modes(self.model)
        self.reference: nn.Module | None = None
        if reference is not None:
            reference.requires_grad_(False).eval()
            self.reference = self.parallel.prepare_frozen(reference, self.model_wrapped)
        self.learner = Learner(
            self.parallel,
            self.model_wrapped,
            self.optimizer,
            self.ppo,
            self.room,
            is_packed=self.model.is_packed,
        )

    def _pack(self, scoring: Sequence[ActorCritic]) -> None:
        """Have all that score read rows without their padding, or, where one cannot on any process, none."""
        if self.parallel.any(not all(module.pack() for module in scoring)):
            for module in scoring:
                module.unpack()

    def _make_optimizer(self) -> None:
        """The optimizer and its schedule, the critic apart in both where it has a rate of its own."""
        self.create_optimizer()
        if self.lr_scheduler is None:
            drop_empty_groups(self.optimizer)
        if self.ppo.has_own_critic_rate:
            rate = self.ppo.critic_learning_rate or self.ppo.learning_rate
            split_groups(self.optimizer, self.model.critic_parameters(), rate)
        self.create_scheduler(self.plan.num_total_batches)
        if self.ppo.critic_warmup:
            self.lr_scheduler = critic_first(self.lr_scheduler, self.ppo.critic_warmup)

    # What a script finds under TRL's names ---------------------------------------------------------------

    @property
    def policy_model(self) -> nn.Module:
        """The policy, with its adapters where it has some; the same as `model.policy`."""
        return self.model.policy

    @property
    def value_model(self) -> nn.Module | None:
        """The critic, where it is a model of its own; the same as `model.value_model`."""
        return self.model.value_model

    def get_train_dataloader(self) -> Any:
        """There is none: the prompts of an update follow from the seed and the update's number.

        Raises:
            NotImplementedError: always, so that no loader is handed out, or overridden, to no effect.
        """
        raise NotImplementedError(
            "PPOTrainer has no data loaders; the prompts of an update follow from args.seed and the update's "
            "number: read trainer.prompts and trainer.eval_prompts, or change the data sets it is given."
        )

    get_eval_dataloader = get_test_dataloader = get_train_dataloader  # type: ignore[assignment]

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
            SpecError: that directory is no whole checkpoint.
            CheckpointMismatch: the checkpoint is of a run with other settings.
            NotFinite: loss or gradients were not finite in three optimizer steps in a row.
            RewardError: a reward failed.
        """
        self._begin(resume_from_checkpoint)
        start_time, losses = time.time(), []
        if self.state.global_step == 0:
            self._warn_of_overlong(self.prompt_sets)
            if self.args.eval_on_start:
                self.evaluate()
        while self.state.global_step < self.plan.num_total_batches and not self.control.should_training_stop:
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            metrics = self._update(self.state.global_step + 1)
            losses.append(metrics["loss/policy_avg"] + self.ppo.vf_coef * metrics.get("loss/value_avg", 0.0))
            self.state.global_step += 1
            self.state.episode += self.plan.batch_size
            self.state.epoch = self.state.episode / self._episodes_of_a_pass
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
        self._resume(resume_from_checkpoint)
        # After loading: when to log, evaluate, and save is as it is asked for now.
        self.state.max_steps = self.plan.num_total_batches
        self.state.num_train_epochs = math.ceil(self.plan.total_episodes / self._episodes_of_a_pass)
        self.state.compute_steps(self.args, self.plan.num_total_batches)  # type: ignore[no-untyped-call]
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)

    def _resume(self, resume_from_checkpoint: str | Path | bool | None) -> None:
        """Go on from a checkpoint, where there is one; before any callback is asked."""
        directory = self._checkpoint_to_resume(resume_from_checkpoint)
        if directory is not None:
            self.load_checkpoint(directory)

    def _update(self, update: int) -> dict[str, float]:
        """One rollout and all its optimizer steps; the first update is 1."""
        clock = Clock()
        # 1. Which prompts, in which order: a function of the seed and the update alone.
        asked = self.plan.batch_size // self.ppo.num_return_sequences
        rows = rows_of_update(update - 1, asked, len(self.prompts), self.ppo.seed)
        # 2. Sample responses to each; those to one prompt stand side by side.
        prompts = [self.prompts[row] for row in rows for _ in range(self.ppo.num_return_sequences)]
        rollout = self._sample(prompts, update, Purpose.ROLLOUT, self.ppo.temperature)
        clock.lap("rollout")
        # 3. Ask the rewards.
        scores = self._score(rollout)
        clock.lap("reward")
        # 4. Log-probabilities under policy and reference, and values.
        logprobs_BR, values_BR = self._policy_scores(rollout)
        tokens = TokenScores(logprobs_BR, self._reference_logprobs(rollout), values_BR)
        # 5. Rewards per token, advantages, returns.
        kl_coef = self.kl_coef
        experience, kl_BR = experience_of(
            rollout, scores, tokens, self.ppo, kl_coef, self._moments_including(scores)
        )
        self._adapt_kl_coef(mean_kl(kl_BR))
        clock.lap("scoring")
        # 6. The optimizer steps.
        rates = self._learning_rates()
        if update == self.ppo.critic_warmup + 1 > 1:
            self.learner.begin_policy()
        stats = self.learner.update(experience, update, kl_coef)
        self.lr_scheduler.step()
        clock.lap("update")
        if self._is_sample_due(update) and not self.eval_prompts:
            self._show_samples(samples_of(rollout, scores, "train", _SAMPLES_SHOWN), update)
        return {
            **update_metrics(
                rollout, scores, experience, kl_BR, self.ppo, kl_coef, self.collector.tokenizer.eos_token_id
            ),
            **stats.metrics(with_critic=self.ppo.has_critic),
            **rates,
            "episode": float(update * self.plan.batch_size),
            **time_metrics(rollout, clock),
        }

    def _policy_scores(self, rollout: Rollout) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and values [B, R], as sampling computed them; where it did not, by a forward."""
        if rollout.logprobs is None:
            return self.learner.score(self.model_wrapped, rollout, with_value=self.ppo.has_critic)
        logprobs_BR, values_BR = padded(rollout.logprobs, self.parallel.device), None
        if rollout.values is not None:
            values_BR = padded(rollout.values, self.parallel.device)
        elif self.ppo.has_critic:
            values_BR = self.learner.values(rollout)
        return logprobs_BR, values_BR

    def _moments_including(self, scores: Scores) -> RunningMoments | None:
        """Of all scores so far, where they are normalised."""
        if not self.ppo.normalize_scores:
            return None
        self.score_moments = self.score_moments.including(torch.tensor(scores.totals, dtype=torch.float64))
        return self.score_moments

    def _adapt_kl_coef(self, kl: float) -> None:
        if self.ppo.adaptive_kl_target is not None and self.state.global_step >= self.ppo.critic_warmup:
            self.kl_coef = adapted_kl_coef(
                self.kl_coef,
                kl,
                self.ppo.adaptive_kl_target,
                self.ppo.adaptive_horizon,
                self.plan.batch_size,
            )

    def _learning_rates(self) -> dict[str, float]:
        """Of the policy, and of a critic that has its own."""
        rates = [float(rate) for rate in self.lr_scheduler.get_last_lr()]
        own = {"lr/critic": rates[-1]} if self.ppo.has_own_critic_rate else {}
        return {"lr": rates[0], **own}

    def _sample(self, prompts: list[Prompt], update: int, purpose: Purpose, temperature: float) -> Rollout:
        """A response per prompt. Sharded weights are gathered first, or every process keeps step."""
        policy = self.model.policy
        is_rollout = purpose is Purpose.ROLLOUT
        rows = (
            self.ppo.local_rollout_forward_batch_size if is_rollout else self.args.per_device_eval_batch_size
        )
        is_sharded = self.parallel.zero_stage == 3
        gathers = is_sharded and self.args.ds3_gather_for_generation
        value_head = self.model.value_head if self.model.critic == "head" else None
        parts = [policy] if value_head is None else [policy, value_head]
        whole = self.parallel.standing_alone(self.model_wrapped, *parts) if gathers else nullcontext()
        with generation_mode(policy), whole, self.accelerator.autocast():
            return self.collector.sample(
                causal_lm(policy),
                prompts,
                update,
                purpose,
                temperature=temperature,
                batch_rows=rows,
                in_step=is_sharded and not gathers,
                scored=is_rollout and self.samples_as_it_trains,
                value_head=value_head,
            )

    def _score(self, rollout: Rollout) -> Scores:
        """All rewards of all rows, that of an adapter on the policy's base among them."""
        scores = self.collector.score(rollout)
        for named in self.collector.scorer.rewards:
            if isinstance(named.reward, ByAdapter):
                scores = scores.including(named, self.learner.reward_scores(rollout))
        return scores

    # Reporting -----------------------------------------------------------------------------------------

    def _log_evaluate_save(self, metrics: dict[str, float]) -> None:
        """Do what the callbacks have asked for at the end of an update; the last one is always logged."""
        self.latest = repeatable(metrics)
        is_last = self.state.global_step == self.plan.num_total_batches
        if self.control.should_log or (is_last and self.args.logging_strategy != IntervalStrategy.NO):
            self.log(metrics)
        if self.control.should_evaluate:
            self.latest |= repeatable(self.evaluate())
        elif self._is_sample_due(self.state.global_step) and self.eval_prompts:
            self.generate_completions(sampling=True)  # which an evaluation shows as well
        if self.control.should_save:
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score a sampled and the most likely response to every evaluation prompt.

        The means are logged; of both a few are shown, and in the tables of trackers.

        eval_dataset: instead of the constructor's. Of several data sets, the metrics of each are named
        `<metric_key_prefix>/<name>/…`; those of the most likely responses have `greedy/` before their own.

        Raises:
            ValueError: there is no data set.
        """
        own = self._read_eval_prompts(evaluation_sets(eval_dataset), None)
        self._warn_of_overlong({f"eval_dataset{suffix}": read for suffix, read in own.items()})
        given = {suffix: read.prompts for suffix, read in own.items()} or self.eval_prompts
        if not given:
            raise ValueError("evaluate() has no prompts; give eval_dataset to it, or to the constructor.")
        metrics: dict[str, float] = {}
        samples: list[dict[str, Any]] = []
        for suffix, prompts in given.items():
            for kind, temperature in (("", self.ppo.temperature), ("/greedy", 0.0)):
                # The numbers of update 0: every evaluation of a run draws alike, so that its curve is smooth.
                rollout = self._sample(prompts, 0, Purpose.EVALUATION, temperature)
                scores = self._score(rollout)
                prefix = metric_key_prefix + suffix + kind
                metrics |= evaluation_metrics(rollout, scores, self.ppo, prefix)
                samples += samples_of(rollout, scores, prefix, _SAMPLES_SHOWN)
        self.log(dict(metrics))
        self._show_samples(samples, self.state.global_step)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def generate_completions(self, sampling: bool = False) -> None:
        """Score the most likely responses to the evaluation prompts; `sampling`: to the first batch of them.

        A few are shown; the tables of trackers have them all.
        """
        samples: list[dict[str, Any]] = []
        most = max(self.args.per_device_eval_batch_size, _SAMPLES_SHOWN) if sampling else None
        for suffix, prompts in self.eval_prompts.items():
            rollout = self._sample(prompts[:most], 0, Purpose.SAMPLES, 0.0)
            samples += samples_of(rollout, self._score(rollout), f"eval{suffix}/greedy", len(rollout))
        if samples:
            self._show_samples(samples, self.state.global_step)

    def _is_sample_due(self, update: int) -> bool:
        """True that many times in a run, from its first update on, in even steps."""
        times = self.ppo.num_sample_generations
        return (update - 1) * times % self.plan.num_total_batches < times

    def _show_samples(self, samples: list[dict[str, Any]], update: int) -> None:
        """All to trackers, the first few of each kind to people."""
        if not self.parallel.is_main:
            return
        self.log_samples(first_of_each_kind(samples, _SAMPLES_SHOWN), update)
        self.callback_handler.show(columns_of(samples, update), update, self.args, self.state, self.control)

    def _warn_of_overlong(self, sets: Mapping[str, PromptSet]) -> None:
        for name, read in sets.items():
            if read.dropped or read.truncated:
                data_set, counts = str(self.prompts_loc(name)[-1]), read.counts()
                told = ", ".join(f"{what} {number}" for what, number in counts.items())
                message = f"Of the prompts of {data_set}, some were too long: {told}."
                self.warn("overlong_prompts", message, {"data_set": data_set, **counts})

    def warn(self, code: str, message: str, numbers: Mapping[str, Any]) -> None:
        """Tell of something that a run gets over; a program that reports elsewhere overrides this."""
        self.accelerator.print(f"{code}: {message}")

    def log_samples(self, samples: list[dict[str, Any]], update: int) -> None:
        """Print the completions that an update shows, on the main process.

        A program that reports elsewhere overrides this.
        """
        for sample in samples:
            told = f"{sample['kind']} [{sample['score']:.3f}]"
            self.accelerator.print(f"{told} {sample['prompt']!r} -> {sample['response']!r}")

    @property
    def _episodes_of_a_pass(self) -> int:
        """By the rows given, as all derived numbers are, however many of them are kept."""
        return self.prompt_sets["train_dataset"].rows * self.ppo.num_return_sequences
