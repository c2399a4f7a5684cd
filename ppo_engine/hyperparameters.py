"""PPO's hyperparameters, under the names of TRL's `PPOConfig`, and every rule between them.

They are the heart of a spec, and what a script's arguments are held to. This module knows no models, no data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ppo_engine.findings import NAME
from ppo_engine.issues import Issue, shown


class Part(BaseModel):
    """Base of everything in a spec: frozen, no unknown fields, no silent conversions, no NaN."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


# Numbers: of ranges that no run needs to leave, and in which 32 bits neither overflow nor vanish -----------

Positive = Annotated[float, Field(gt=0, le=1e9)]
NonNegative = Annotated[float, Field(ge=0, le=1e9)]
Signed = Annotated[float, Field(ge=-1e9, le=1e9)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Whole = Annotated[int, Field(ge=0, lt=2**31)]


DEFAULT_KL_HORIZON = 10_000.0


class Hyperparameters(Part):
    """PPO under the names of TRL's `PPOConfig`, with its defaults. Steps are updates."""

    total_episodes: Count | None = None
    """Responses sampled in the whole run; by default `num_train_epochs` passes over the prompts, with
    `num_return_sequences` to each."""
    num_train_epochs: Annotated[float, Field(gt=0, le=1e6)] = 3.0
    """Passes over the prompts, where `total_episodes` is not given; counted by the rows given, whether or not
    all of them are kept."""
    per_device_train_batch_size: Count = 8
    """Rows of a micro-batch, per process: what bounds memory."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per process that make up a batch."""
    num_mini_batches: Count = 1
    """Optimizer steps per PPO epoch: the batch is cut into as many mini-batches."""
    num_ppo_epochs: Count = 4
    """Passes over each batch of responses."""
    local_rollout_forward_batch_size: Count = 64
    """Rows sampled and scored at a time, per process."""
    response_length: Count = 53
    """Most tokens of a response."""
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 0.7
    """Of sampling, and of every log-probability."""
    stop_token: Literal["eos"] | None = None
    """`eos`: responses end after the tokenizer's end-of-sequence token."""
    stop_token_id: Whole | None = None
    """Or the id of the token they end after."""
    missing_eos_penalty: Positive | None = None
    """Taken off the score of a response that did not reach its stop token."""
    normalize_scores: bool = False
    """Take the running mean off each score, and divide by the running standard deviation."""
    score_scale: Positive = 1.0
    """Scores are multiplied by it, after normalisation."""
    score_clip: Positive | None = None
    """No score, of a response or of a token, is then further from 0 than this; null: as it is."""
    kl_coef: NonNegative = 0.05
    """Weight of the divergence from the reference; where it adapts, at the start."""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    """Schulman 2020: k1 = -log r; k2 = (log r)^2 / 2; k3 = (r - 1) - log r; abs = |log r|; with r =
    reference / policy."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """Where the divergence is paid: taken off each token's reward, or added to the differentiated loss."""
    adaptive_kl_target: Positive | None = None
    """The divergence of a response, summed over its tokens, that `kl_coef` is steered to; null: it stays."""
    adaptive_kl_horizon: Positive | None = None
    """Responses over which it is steered there; 10,000 (Ziegler et al. 2019) where it is not given."""
    early_stop_kl: Positive | None = None
    """An update takes no further optimizer step after one that saw `policy/approxkl` above this; null: it
    takes them all."""
    advantage_estimator: Literal["gae", "rloo", "grpo", "reinforce++"] = "gae"
    """gae: with a critic, per token. Without any critic: rloo (a response's score less the mean of the others
    to its prompt), grpo (the distance from its prompt's mean in standard deviations), reinforce++ (the return
    of each token, whitened over the batch)."""
    num_return_sequences: Count = 1
    """Responses to each prompt of a batch; rloo and grpo compare them."""
    whiten_rewards: bool = False
    """Scale rewards to unit variance over the whole batch, mean kept."""
    whiten_advantages: bool | None = None
    """Scale advantages to mean 0 and unit variance over the whole batch; where it is not given, with gae and
    reinforce++."""
    cliprange: Positive = 0.2
    """Of the probability ratio, downwards and, where cliprange_high is not given, upwards."""
    cliprange_high: Positive | None = None
    """Of the probability ratio, upwards."""
    dual_clip: Annotated[float, Field(gt=1, le=1e9)] | None = None
    """Where the advantage is negative, the loss of a token is at most this many times its size; null: it has
    no bound."""
    loss_aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Of an optimizer step: the mean over all its tokens, or over its responses of each one's mean."""
    entropy_coef: NonNegative = 0.0
    """Weight of the policy's entropy, which the loss rewards."""
    cliprange_value: Positive = 0.2
    """Of the value's move from its old prediction."""
    vf_coef: NonNegative = 0.1
    """Weight of the value loss."""
    critic_warmup: Whole = 0
    """Updates at the start in which only the critic learns."""
    critic_learning_rate: Positive | None = None
    """Of the critic, at its highest; null: learning_rate."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """Lambda of generalised advantage estimation."""
    learning_rate: Positive = 3e-6
    """Of AdamW, at its highest."""
    lr_scheduler_type: Literal["linear", "constant", "cosine", "constant_with_warmup"] = "linear"
    """How the learning rate moves over the updates of the run."""
    warmup_steps: Whole = 0
    """Updates over which the learning rate rises from 0."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: Annotated[float, Field(ge=1e-30, le=1)] = 1e-8
    """Keeps AdamW's division from 0."""
    weight_decay: NonNegative = 0.0
    """AdamW's pull of weights towards 0."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are scaled down to this norm; 0: never. A step whose norm or loss is not finite is not taken;
    after three of them in a row the run ends."""
    seed: Whole = 42
    """Of every draw: order of prompts, sampling, shuffles, new weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    save_steps: Count = 50
    """Updates between checkpoints; the last update always makes one."""
    save_total_limit: Count | None = 2
    """So many of the last whole checkpoints of the run are kept, and the best one; null: all of them."""
    metric_for_best_model: str | None = Field(default=None, min_length=1)
    """The metric that tells which checkpoint is the best; null: none is kept for that."""
    greater_is_better: bool | None = None
    """Whether the best has the greatest value of that metric, or the smallest; where it is not given, the
    greatest, unless the metric's name ends with `loss` or `kl`."""
    eval_steps: Count | None = None
    """Updates between evaluations on `prompts.eval`; there is one after the last update too."""
    num_sample_generations: Whole = 10
    """How often in the run sample completions are reported."""
    model_adapter_name: str | None = Field(default=None, pattern=NAME)
    """The adapter that is trained; by default a new one."""
    ref_adapter_name: str | None = Field(default=None, pattern=NAME)
    """The adapter that is the reference, instead of the base without any."""
    reward_adapter_name: str | None = Field(default=None, pattern=NAME)
    """The adapter, with a score head, whose score is the reward of type `adapter`."""

    @property
    def has_critic(self) -> bool:
        """Whether advantages need values."""
        return self.advantage_estimator == "gae"

    @property
    def has_own_critic_rate(self) -> bool:
        """Whether the critic's learning rate may differ from the policy's."""
        return self.critic_warmup > 0 or self.critic_learning_rate is not None

    @property
    def whitens_advantages(self) -> bool:
        """As given, or as the estimator's authors have it."""
        if self.whiten_advantages is None:
            return self.advantage_estimator in ("gae", "reinforce++")
        return self.whiten_advantages

    @property
    def best_is_greatest(self) -> bool:
        """Whether the best checkpoint has the greatest value of `metric_for_best_model`."""
        given = self.greater_is_better
        return is_greater_better(self.metric_for_best_model or "") if given is None else given

    @property
    def adaptive_horizon(self) -> float:
        """Responses over which `kl_coef` is steered to its target."""
        return self.adaptive_kl_horizon or DEFAULT_KL_HORIZON


def is_greater_better(metric: str) -> bool:
    """Of a metric's name; losses and divergences had better be small."""
    return not metric.endswith(("loss", "kl"))


_OF_THE_CRITIC = ("vf_coef", "cliprange_value", "lam", "critic_warmup", "critic_learning_rate")
_OF_THE_TOKENS = ("gamma", "whiten_rewards")  # an advantage per response has no use for them


def check_hyperparameters(ppo: Hyperparameters) -> Iterator[Issue]:
    """The rules between hyperparameters; locs are relative to them, as in `PPOConfig`."""
    yield from _check_stop(ppo)
    yield from _check_kl(ppo)
    yield from _check_estimator(ppo)
    if ppo.greater_is_better is not None and ppo.metric_for_best_model is None:
        yield _without("greater_is_better", ppo, "metric_for_best_model: name the metric")


def _check_stop(ppo: Hyperparameters) -> Iterator[Issue]:
    if ppo.stop_token is not None and ppo.stop_token_id is not None:
        yield Issue(
            loc=("stop_token_id",),
            msg=f"{ppo.stop_token_id} given together with stop_token {shown(ppo.stop_token)}; "
            "they exclude each other: give one.",
        )


def _check_kl(ppo: Hyperparameters) -> Iterator[Issue]:
    if ppo.kl_placement == "loss" and ppo.kl_estimator == "k1":
        yield Issue(
            loc=("kl_estimator",),
            msg='"k1" given with kl_placement "loss"; its expected gradient is 0, so nothing would hold the '
            'policy: give "k2", whose gradient is that of KL(policy || reference), or "k3".',
        )
    if ppo.adaptive_kl_horizon is not None and ppo.adaptive_kl_target is None:
        yield _without("adaptive_kl_horizon", ppo, "adaptive_kl_target: give the target")
    if ppo.adaptive_kl_target is not None and ppo.kl_coef == 0:
        yield Issue(
            loc=("kl_coef",),
            msg="0 given with adaptive_kl_target; the coefficient is multiplied on its way to the target, so "
            "0 would stay 0: give one above 0.",
        )


def _check_estimator(ppo: Hyperparameters) -> Iterator[Issue]:
    estimator = shown(ppo.advantage_estimator)
    if ppo.advantage_estimator in ("rloo", "grpo") and ppo.num_return_sequences < 2:
        yield Issue(
            loc=("num_return_sequences",),
            msg=f"{ppo.num_return_sequences} given with advantage_estimator {estimator}, which compares the "
            "responses to one prompt: give 2 or more.",
        )
    ignored: tuple[str, ...] = () if ppo.has_critic else _OF_THE_CRITIC
    if ppo.advantage_estimator in ("rloo", "grpo"):
        ignored += _OF_THE_TOKENS
    for name in ignored:
        if (given := getattr(ppo, name)) != Hyperparameters.model_fields[name].default:
            yield Issue(
                loc=(name,),
                msg=f"{shown(given)} given with advantage_estimator {estimator}, which has no use for it: "
                "leave it out.",
            )


def _without(name: str, ppo: Hyperparameters, needed: str) -> Issue:
    return Issue(
        loc=(name,),
        msg=f"{shown(getattr(ppo, name))} given without {needed}, or leave {name} out.",
    )


def check_missing_stop(ppo: Hyperparameters) -> Iterator[Issue]:
    """A rule of a spec's: a script may find its stop token in the tokenizer, as TRL's did."""
    if ppo.missing_eos_penalty is not None and ppo.stop_token is None and ppo.stop_token_id is None:
        yield Issue(
            loc=("missing_eos_penalty",),
            msg=f"{ppo.missing_eos_penalty} given without a stop token, so every response would pay it; "
            "give stop_token or stop_token_id.",
        )
