"""The second half of PPO: token by token, score a rollout; then take optimizer steps on the experience.

Every process holds the whole experience and works out, alike, who takes which rows: so a gradient does not
depend on how rows are cut or on how many processes there are, and all run the same number of forwards.
This module knows no models' roles, no text, no files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ppo_engine.actor_critic import TokenOutputs
from ppo_engine.advantages import kl
from ppo_engine.batch import Experience, Rollout, collate, cut, cut_packed, shuffle, unflatten_tokens
from ppo_engine.hyperparameters import Hyperparameters
from ppo_engine.logprobs import Entropies
from ppo_engine.losses import policy_loss, value_loss
from ppo_engine.memory import Cut, Room
from ppo_engine.optimization import policy_groups
from ppo_engine.parallel import Parallel

_MAX_SKIPPED = 3  # steps in a row with a loss or norm that is not finite, before the run is given up


class NotFinite(ArithmeticError):
    """The loss or the gradients were NaN or infinite, step after step; nothing of them was applied.

    steps_taken: of the same update, those before them that were.
    """

    def __init__(self, message: str, steps_taken: int) -> None:
        super().__init__(message)
        self.steps_taken = steps_taken


_STATS = ("policy_loss", "approxkl", "clipfrac", "entropy", "ratio", "kl", "value_loss", "value_clipfrac")


@dataclass
class StepStats:
    """Weighted sums over the tokens of one optimizer step, in the order of `_STATS`.

    weight: of all tokens together, by which they are divided.
    """

    sums: Tensor
    weight: float
    grad_norm: float | None = None

    def mean(self, name: str) -> float:
        return float(self.sums[_STATS.index(name)]) / self.weight


@dataclass
class UpdateStats:
    """What all optimizer steps of an update saw.

    stopped_early: of those planned, some were left out; None: they may not be.
    """

    steps: list[StepStats] = field(default_factory=list)
    stopped_early: bool | None = None

    @property
    def taken(self) -> int:
        """Steps that were: those that were not finite are in the list too."""
        return sum(step.grad_norm is not None for step in self.steps)

    def metrics(self, *, with_critic: bool) -> dict[str, float]:
        """Means over steps of each step's weighted mean over tokens, under TRL's names and a few more.

        Of no steps they are NaN.
        """
        nothing = [torch.full((len(_STATS),), float("nan"))]
        means = torch.stack([step.sums / step.weight for step in self.steps] or nothing).double().cpu()
        average = dict(zip(_STATS, means.mean(0).tolist(), strict=True))
        ratios = means[:, _STATS.index("ratio")]
        norms = [step.grad_norm for step in self.steps if step.grad_norm is not None]
        critic = {"loss/value_avg": average["value_loss"], "val/clipfrac_avg": average["value_clipfrac"]}
        stopped = {} if self.stopped_early is None else {"policy/stopped_early": float(self.stopped_early)}
        return {
            "loss/policy_avg": average["policy_loss"],
            **(critic if with_critic else {}),
            "policy/approxkl_avg": average["approxkl"],
            "policy/clipfrac_avg": average["clipfrac"],
            "policy/entropy_avg": average["entropy"],
            "policy/grad_norm": sum(norms) / len(norms) if norms else float("nan"),
            "val/ratio": average["ratio"],
            "val/ratio_var": ratios.var(correction=1).item() if len(ratios) > 1 else 0.0,
            **stopped,
            "optimizer_steps": float(self.taken),
            "optimizer_steps_skipped": float(len(self.steps) - self.taken),
        }


def share_rows(
    rows: Sequence[int], lengths: Sequence[int], world_size: int, max_tokens: int, *, is_packed: bool = False
) -> list[list[list[int]]]:
    """For each process, its micro-batches: as many for all, an empty one where rows run out.

    lengths: of every row, in tokens. is_packed: rows are read without padding. Rows are dealt by length, so
    that processes get like work.
    """
    into_parts = cut_packed if is_packed else cut
    longest_first = sorted(rows, key=lambda row: (-lengths[row], row))
    shares = []
    for rank in range(world_size):
        mine = longest_first[rank::world_size]
        parts = into_parts([lengths[row] for row in mine], max_tokens)
        shares.append([[mine[index] for index in part] for part in parts])
    count = max(map(len, shares))
    return [share + [[]] * (count - len(share)) for share in shares]


class _PerToken:
    """Numbers [B, R] of a rollout's response tokens, zero beyond each row's length.

    Each process fills in its own rows.
    """

    def __init__(self, rollout: Rollout, parallel: Parallel) -> None:
        self._parallel = parallel
        self._lengths_B = torch.tensor([len(ids) for ids in rollout.response_ids], device=parallel.device)
        self._values_BR = torch.zeros(len(rollout), int(self._lengths_B.max()), device=parallel.device)

    def put(self, rows: Sequence[int], values_N: Tensor) -> None:
        """What a forward over these rows has returned; over none, it was to keep step."""
        if rows:
            width = self._values_BR.shape[1]
            self._values_BR[rows] = unflatten_tokens(values_N, self._lengths_B[rows], width)

    def whole(self) -> Tensor:
        """Each row was scored by one process; the others hold zeros."""
        return self._parallel.sum(self._values_BR)


class Learner:
    """The prepared module with its optimizer, and what PPO does with them.

    is_packed: the module, and any other that scores, reads rows without their padding.
    """

    def __init__(
        self,
        parallel: Parallel,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        ppo: Hyperparameters,
        room: Room,
        *,
        is_packed: bool,
    ) -> None:
        self.parallel, self.module, self.optimizer, self.ppo = parallel, module, optimizer, ppo
        self.room, self.is_packed = room, is_packed
        self.skipped = 0  # steps in a row so far; a checkpoint has it

    def token_outputs(
        self,
        module: nn.Module,
        prompt_ids: Sequence[Sequence[int]],
        response_ids: Sequence[Sequence[int]],
        rows: Sequence[int],
        *,
        with_value: bool,
        critic_only: bool = False,
        entropies: Entropies = "none",
    ) -> TokenOutputs:
        """One forward over some rows of a batch; no rows: over a made-up one, to keep step with others."""
        batch = collate(prompt_ids, response_ids, rows, 0, self.parallel.device)
        outputs: TokenOutputs = module(
            *batch.tensors,
            temperature=self.ppo.temperature,
            with_value=with_value,
            critic_only=critic_only,
            entropies=entropies,
        )
        return outputs

    @torch.no_grad()
    def score(
        self,
        module: nn.Module,
        rollout: Rollout,
        *,
        with_value: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and values [B, R] of all rows' response tokens, zero beyond a row's length."""
        logprobs, values = _PerToken(rollout, self.parallel), _PerToken(rollout, self.parallel)

        def score_rows(rows: Sequence[int]) -> None:
            outputs = self.token_outputs(
                module, rollout.prompt_ids, rollout.response_ids, rows, with_value=with_value
            )
            logprobs.put(rows, outputs.logprobs_N)
            if outputs.values_N is not None:
                values.put(rows, outputs.values_N)

        self._score_all(rollout, score_rows)
        return logprobs.whole(), values.whole() if with_value else None

    @torch.no_grad()
    def values(self, rollout: Rollout) -> Tensor:
        """Values [B, R] by a critic with a forward of its own, zero beyond a row's length."""
        values = _PerToken(rollout, self.parallel)
        self._score_all(rollout, lambda rows: values.put(rows, self._forward(rollout, rows, of_value=True)))
        return values.whole()

    @torch.no_grad()
    def reward_scores(self, rollout: Rollout) -> list[float]:
        """The score of the policy's reward adapter for each row, [B].

        All processes run the same number of forwards.
        """
        scores_B = torch.zeros(len(rollout), device=self.parallel.device)

        def score_rows(rows: Sequence[int]) -> None:
            scores = self._forward(rollout, rows, of_reward=True)
            if rows:
                scores_B[rows] = scores

        self._score_all(rollout, score_rows)
        summed: list[float] = self.parallel.sum(scores_B).tolist()
        return summed

    def _forward(self, rollout: Rollout, rows: Sequence[int], **asked: bool) -> Tensor:
        batch = collate(rollout.prompt_ids, rollout.response_ids, rows, 0, self.parallel.device)
        outputs: Tensor = self.module(*batch.tensors, **asked)
        return outputs

    def _score_all(self, rollout: Rollout, score_rows: Callable[[Sequence[int]], None]) -> None:
        """Call it with this process's micro-batches of a rollout."""
        lengths = rollout.total_lengths
        rows = range(len(lengths))

        def attempt(budget: int) -> None:
            for micro_batch in self._shares(rows, lengths, budget)[self.parallel.rank]:
                score_rows(micro_batch)

        budget = self._budget(self.ppo.local_rollout_forward_batch_size, lengths)
        self.room.do("scoring", budget, attempt, self._cut(rows, lengths), lambda: None)

    def update(self, experience: Experience, update: int, kl_coef: float) -> UpdateStats:
        """All optimizer steps of one update: epochs x mini-batches, rows shuffled anew in each epoch.

        kl_coef: as it is now. The first updates of a run train the critic alone, where that is asked for. A
        mini-batch in which the policy wrote nothing takes no step.

        Raises:
            NotFinite: loss or gradients were not finite in three steps in a row.
        """
        stats = UpdateStats(stopped_early=None if self.ppo.early_stop_kl is None else False)
        size = len(experience) // self.ppo.num_mini_batches
        last = self.ppo.num_ppo_epochs * self.ppo.num_mini_batches
        critic_only = update <= self.ppo.critic_warmup
        for epoch in range(self.ppo.num_ppo_epochs):
            order = shuffle(self.ppo.seed, update, epoch, len(experience))
            for start in range(0, size * self.ppo.num_mini_batches, size):
                rows = order[start : start + size]
                if not experience.weights_BR[rows].any():
                    continue
                step = self._step(experience, rows, kl_coef, critic_only)
                stats.steps.append(step)
                self._count_skipped(stats, update)
                if self._has_moved_too_far(step) and len(stats.steps) < last:
                    stats.stopped_early = True
                    return stats
        return stats

    def begin_policy(self) -> None:
        """Let the policy's first step be as a fresh optimizer's, after updates with gradients of 0."""
        self.parallel.forget(self.module, self.optimizer, policy_groups(self.optimizer))

    def _has_moved_too_far(self, step: StepStats) -> bool:
        return self.ppo.early_stop_kl is not None and step.mean("approxkl") > self.ppo.early_stop_kl

    def _step(
        self, experience: Experience, rows: Sequence[int], kl_coef: float, critic_only: bool
    ) -> StepStats:
        """One optimizer step: the loss is one weighted mean over all response tokens of the mini-batch."""
        lengths = experience.total_lengths
        budget = self._budget(self.ppo.per_device_train_batch_size, lengths)
        weight = float(experience.weights_BR[list(rows)].double().sum())

        def attempt(budget: int) -> Tensor:
            micro_batches = self._shares(rows, lengths, budget)[self.parallel.rank]
            sums = torch.zeros(len(_STATS) + 1, device=self.parallel.device)
            for index, micro_batch in enumerate(micro_batches):
                last = index == len(micro_batches) - 1
                loss, micro_sums = self._losses(experience, micro_batch, kl_coef, critic_only)
                self.parallel.backward(self.module, loss / weight, last=last)
                sums += torch.cat([micro_sums, loss.detach()[None]])
            return sums

        def undo() -> None:
            self.parallel.drop_gradients(self.optimizer)

        sums = self.parallel.sum(self.room.do("update", budget, attempt, self._cut(rows, lengths), undo))
        stats = StepStats(sums[:-1], weight)
        stats.grad_norm = self.parallel.step(self.module, self.optimizer, float(sums[-1]))
        return stats

    def _shares(self, rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[list[int]]]:
        return share_rows(rows, lengths, self.parallel.world_size, budget, is_packed=self.is_packed)

    def _cut(self, rows: Sequence[int], lengths: Sequence[int]) -> Callable[[int], Cut]:
        """What a budget of tokens comes to, over all processes."""

        def cut_by(budget: int) -> Cut:
            parts = [part for share in self._shares(rows, lengths, budget) for part in share]
            return Cut.of(parts, lengths, is_packed=self.is_packed)

        return cut_by

    def _budget(self, rows: int, lengths: Sequence[int]) -> int:
        """Tokens of a micro-batch: what memory allows, as rows of the greatest length, and speed asks for."""
        allowed, efficient = rows * max(lengths), self.parallel.efficient_tokens
        return allowed if efficient is None else min(allowed, efficient)

    def _losses(
        self, experience: Experience, rows: Sequence[int], kl_coef: float, critic_only: bool
    ) -> tuple[Tensor, Tensor]:
        """A micro-batch's weighted loss summed over its tokens, and statistics.

        No rows: all zero, with a graph.
        """
        ppo, with_value = self.ppo, experience.values_BR is not None
        outputs = self.token_outputs(
            self.module,
            experience.prompt_ids,
            experience.response_ids,
            rows,
            with_value=with_value,
            critic_only=critic_only,
            entropies="gradient" if ppo.entropy_coef else "value",
        )
        if not rows:
            nothing = outputs.logprobs_N.sum() + (0.0 if outputs.values_N is None else outputs.values_N.sum())
            return 0.0 * nothing, torch.zeros(len(_STATS), device=self.parallel.device)
        assert outputs.entropies_N is not None
        tokens = experience.tokens(rows)
        keep = tokens.mask_N
        logprobs_N, entropies_N = outputs.logprobs_N[keep], outputs.entropies_N[keep]
        policy = policy_loss(
            logprobs_N,
            tokens.logprobs_N,
            tokens.advantages_N,
            ppo.cliprange,
            ppo.cliprange if ppo.cliprange_high is None else ppo.cliprange_high,
            ppo.dual_clip,
        )
        kl_N = kl(logprobs_N, tokens.ref_logprobs_N, ppo.kl_estimator)
        loss_N = policy.loss - ppo.entropy_coef * entropies_N if ppo.entropy_coef else policy.loss
        if ppo.kl_placement == "loss" and kl_coef:
            loss_N = loss_N + kl_coef * kl_N
        if critic_only:
            loss_N = 0.0 * logprobs_N  # gradients of 0: processes wait for one of every weight
        seen = [policy.loss, policy.approxkl, policy.clipped, entropies_N, policy.ratio, kl_N]
        if outputs.values_N is not None:
            assert tokens.values_N is not None
            assert tokens.returns_N is not None
            value = value_loss(outputs.values_N[keep], tokens.values_N, tokens.returns_N, ppo.cliprange_value)
            loss_N = loss_N + ppo.vf_coef * value.loss
            seen += [value.loss, value.clipped]
        sums = [(part.detach().float() * tokens.weights_N).sum() for part in seen]
        sums += [torch.zeros_like(sums[0])] * (len(_STATS) - len(sums))
        return (loss_N * tokens.weights_N).sum(), torch.stack(sums)

    def _count_skipped(self, stats: UpdateStats, update: int) -> None:
        self.skipped = 0 if stats.steps[-1].grad_norm is not None else self.skipped + 1
        if self.skipped >= _MAX_SKIPPED:
            raise NotFinite(
                f"loss or gradients were not finite in {self.skipped} optimizer steps in a row, the last in "
                f"update {update} (steps taken in it: {stats.taken}); none of them was applied: lower "
                "learning_rate, or look at the rewards.",
                stats.taken,
            )
