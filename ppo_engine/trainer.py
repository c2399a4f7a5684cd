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
from ppo_engine.arguments import (
    check_value_adapter,
    refuse_critic_rates,
    require_all_parameters,
    require_eval_prompts,
    require_own_metrics,
    stop_token_id,
)
from ppo_engine.batch import Rollout
from ppo_engine.config import PPOConfig, check_args, prompt_lengths
from ppo_engine.draws import Purpose
from ppo_engine.experience import TokenScores, experience_of
from ppo_engine.issues import Issue, Loc, SpecError, shown
from ppo_engine.learn import Learner
from ppo_engine.lora import fuse
from ppo_engine.memory import Room
from ppo_engine.metrics import (
    Clock,
    evaluation_metrics,
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
    require_adapter,
    require_reward_adapter,
    set_modes,
)
from ppo_engine.rollout.collect import Collector
from ppo_engine.saving import PPOTrainerState, SavingTrainer, repeatable
from ppo_engine.spec import DEFAULT_ADAPTER, check_best_metric

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
    ) -> None:
        if train_dataset is None:
            msg = "None given; a run needs prompts to train on: give a data set."
            raise SpecError([Issue(loc=("train_dataset",), msg=msg)])
        if ref_model is model:
            msg = (
                "The same object as model given; the reference would move with the policy: give a copy, or "
                "None to have one made (with adapters: the base serves as the reference)."
            )
            raise SpecError([Issue(loc=("ref_model",), msg=msg)])
        facts = facts_of(model, processing_class)
        targets = None if isinstance(model, PeftModel) else getattr(peft_config, "target_modules", None)
        self.ppo, self.plan = check_args(args, len(train_dataset), facts, targets)
        require_eval_prompts(args, eval_dataset)
        self.stop_token_id = stop_token_id(args, processing_class)
        has_adapters = isinstance(model, PeftModel) or peft_config is not None
        check_value_adapter(args, self.ppo, value_model, has_adapters)
        set_seed(args.seed)
        policy = build_policy(model, peft_config, args.model_adapter_name)
        trained_adapter = args.model_adapter_name or DEFAULT_ADAPTER
        value_adapter = add_value_adapter(policy, trained_adapter) if args.value_adapter else None
        self.is_peft_model = isinstance(policy, PeftModel)
        if args.ref_adapter_name is not None:
            require_adapter(policy, args.ref_adapter_name, "ref_adapter_name")
        if args.reward_adapter_name is not None:
            require_reward_adapter(policy, args.reward_adapter_name, trained_adapter)
        check_value_model(value_model, facts)
        if value_model is not None and not self.ppo.has_critic:
            msg = (
                f"A {type(value_model).__name__} given with advantage_estimator "
                f"{shown(self.ppo.advantage_estimator)}, which has no critic: leave it out."
            )
            raise SpecError([Issue(loc=("value_model",), msg=msg)])
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
        actor_critic = ActorCritic(
            policy,
            value_model,
            value_head=self.ppo.has_critic,
            value_adapter=value_adapter,
            reward_adapter=args.reward_adapter_name,
        )
        if optimizers[0] is not None:
            require_all_parameters(optimizers[0], actor_critic)
            refuse_critic_rates(self.ppo)
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
        self.callback_handler = Callbacks(self.callback_handler, self.warn)
        self.state = PPOTrainerState(**vars(self.state))
        self.kl_coef = self.ppo.kl_coef
        self.latest: dict[str, JsonValue] = {}  # metrics of the update just done, and of its evaluation
        self.score_moments = RunningMoments()
        self.parallel = Parallel(self.accelerator, self.ppo.max_grad_norm)
        self.room = Room(self.parallel, partial(self.warn, "out_of_memory"))
        self.prompt_sets = {
            "train_dataset": self._read_prompts(train_dataset, "train_dataset", data_collator)
        }
        held_out = self._read_eval_prompts(eval_dataset, data_collator)
        self.prompt_sets |= {f"eval_dataset{suffix}": read for suffix, read in held_out.items()}
        self.prompts = self.prompt_sets["train_dataset"].prompts
        self.eval_prompts = {suffix: read.prompts for suffix, read in held_out.items()}
        self._prepare()
        scorer = scorer_of(
            reward_model,
            processing_class,
            self.parallel.device,
            by_adapter=args.reward_adapter_name is not None,
        )
        names = [reward.name for reward in scorer.rewards]
        evaluations = [] if args.eval_strategy == "no" else [f"eval{suffix}" for suffix in self.eval_prompts]
        if issues := list(check_best_metric(self.ppo, names, evaluations)):
            raise SpecError(issues)
        self.collector = Collector(
            self.parallel, processing_class, self.ppo, self.stop_token_id, scorer, self.room
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
        self, given: Any, data_collator: Callable[..., Any] | None
    ) -> dict[str, PromptSet]:
        """By what follows "eval" in the names of their metrics: nothing, or the name of each of several."""
        if given is None:
            return {}
        if isinstance(given, Mapping):
            require_own_metrics(given)
            several = {f"/{name}": rows for name, rows in given.items()}
        else:
            several = {"": given}
        return {
            suffix: self._read_prompts(rows, "eval_dataset", data_collator)
            for suffix, rows in several.items()
        }

    limit_names = ("overlong_prompts", "max_prompt_length")
    """What messages call the arguments of how long prompts may be; a program has other names for them."""

    def prompts_loc(self, name: str) -> Loc:
        """What messages call a data set; a program has other names for it."""
        return (name,)

    def _prepare(self) -> None:
        """Hand the trained module to the processes; nothing is added to it afterwards."""
        self.create_optimizer()
        if self.lr_scheduler is None:
            drop_empty_groups(self.optimizer)
        if self.ppo.has_own_critic_rate:
            rate = self.ppo.critic_learning_rate or self.ppo.learning_rate
            split_groups(self.optimizer, self.model.critic_parameters(), rate)
        self.create_scheduler(self.plan.num_total_batches)
        if self.ppo.critic_warmup:
            self.lr_scheduler = critic_first(self.lr_scheduler, self.ppo.critic_warmup)
        self.model_wrapped, self.optimizer = self.parallel.prepare(self.model, self.optimizer)
        if self.is_deepspeed_enabled:
            self.deepspeed = self.model_wrapped
        set_modes(self.model)
        self.reference: nn.Module | None = None
        if self.ref_model is not None:
            reference = ActorCritic(self.ref_model, None, value_head=False).requires_grad_(False).eval()
            self.reference = self.parallel.prepare_frozen(reference, self.model_wrapped)
        self.learner = Learner(self.parallel, self.model_wrapped, self.optimizer, self.ppo, self.room)

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
            CheckpointMismatch: the checkpoint is of a run with other settings.
            NotFinite: loss or gradients were not finite too many times in a row.
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
        # 4. Log-probabilities under policy and reference, and values, as the training forward gives them.
        logprobs_BR, values_BR = self.learner.score(
            self.model_wrapped, rollout, with_value=self.ppo.has_critic
        )
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
        whole = self.parallel.standing_alone(self.model_wrapped, policy) if gathers else nullcontext()
        with generation_mode(policy), whole, self.accelerator.autocast():
            return self.collector.sample(
                causal_lm(policy),
                prompts,
                update,
                purpose,
                temperature=temperature,
                batch_rows=rows,
                in_step=is_sharded and not gathers,
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

        The means are logged, and a few of both shown.

        eval_dataset: instead of the constructor's. Of several data sets, the metrics of each are named
        `<metric_key_prefix>/<name>/…`; those of the most likely responses have `greedy/` before their own.

        Raises:
            ValueError: there is no data set.
        """
        own = self._read_eval_prompts(eval_dataset, None)
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
        """Show the most likely responses to the evaluation prompts; `sampling`: to a few of them only."""
        samples: list[dict[str, Any]] = []
        for suffix, prompts in self.eval_prompts.items():
            rollout = self._sample(prompts[:_SAMPLES_SHOWN] if sampling else prompts, 0, Purpose.SAMPLES, 0.0)
            samples += samples_of(rollout, self._score(rollout), f"eval{suffix}/greedy", _SAMPLES_SHOWN)
        if samples:
            self._show_samples(samples, self.state.global_step)

    def _is_sample_due(self, update: int) -> bool:
        """True that many times in a run, from its first update on, in even steps."""
        times = self.ppo.num_sample_generations
        return (update - 1) * times % self.plan.num_total_batches < times

    def _show_samples(self, samples: list[dict[str, Any]], update: int) -> None:
        if self.parallel.is_main:
            self.log_samples(samples, update)

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
        """Print all completions that an update shows, on the main process.

        A program that reports elsewhere overrides this.
        """
        for sample in samples:
            told = f"{sample['kind']} [{sample['score']:.3f}]"
            self.accelerator.print(f"{told} {sample['prompt']!r} -> {sample['response']!r}")

    @property
    def _episodes_of_a_pass(self) -> int:
        """By the rows given, as all derived numbers are, however many of them are kept."""
        return self.prompt_sets["train_dataset"].rows * self.ppo.num_return_sequences
