"""The second half of PPO: token by token, score a rollout; then take optimizer steps on the experience.

Every process holds the whole experience and works out, alike, who takes which rows: so a gradient does not
depend on how rows are cut or on how many processes there are, and all run the same number of forwards.
This module knows no models' roles, no text, no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ppo_engine.actor_critic import TokenOutputs
from ppo_engine.batch import Experience, Rollout, collate, cut, shuffle, unflatten_tokens
from ppo_engine.losses import policy_loss, value_loss
from ppo_engine.parallel import Parallel
from ppo_engine.spec import Hyperparameters

_MAX_SKIPPED = 3  # steps in a row with a loss or norm that is not finite, before the run is given up


class NotFinite(ArithmeticError):
    """The loss or the gradients were NaN or infinite, step after step; nothing of them was applied."""


_STATS = ("policy_loss", "value_loss", "approxkl", "clipfrac", "value_clipfrac", "entropy", "ratio")


@dataclass
class StepStats:
    """Sums over response tokens of one optimizer step, in the order of `_STATS`."""

    sums: Tensor
    tokens: int
    grad_norm: float | None = None


@dataclass
class UpdateStats:
    """What all optimizer steps of an update saw."""

    steps: list[StepStats] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Means over steps of each step's mean over tokens, under TRL's names and a few more."""
        means = torch.stack([step.sums / step.tokens for step in self.steps]).double().cpu()
        average = dict(zip(_STATS, means.mean(0).tolist(), strict=True))
        ratios = means[:, _STATS.index("ratio")]
        norms = [step.grad_norm for step in self.steps if step.grad_norm is not None]
        return {
            "loss/policy_avg": average["policy_loss"],
            "loss/value_avg": average["value_loss"],
            "policy/approxkl_avg": average["approxkl"],
            "policy/clipfrac_avg": average["clipfrac"],
            "policy/entropy_avg": average["entropy"],
            "policy/grad_norm": sum(norms) / len(norms) if norms else float("nan"),
            "val/clipfrac_avg": average["value_clipfrac"],
            "val/ratio": average["ratio"],
            "val/ratio_var": ratios.var(correction=1).item() if len(ratios) > 1 else 0.0,
            "optimizer_steps": float(len(norms)),
            "optimizer_steps_skipped": float(len(self.steps) - len(norms)),
        }


def share_rows(
    rows: Sequence[int], lengths: Sequence[int], world_size: int, max_tokens: int
) -> list[list[list[int]]]:
    """For each process, its micro-batches: as many for all, an empty one where rows run out.

    lengths: of every row, in tokens. Rows are dealt by length, so that processes get like work.
    """
    longest_first = sorted(rows, key=lambda row: (-lengths[row], row))
    shares = []
    for rank in range(world_size):
        mine = longest_first[rank::world_size]
        shares.append([[mine[i] for i in part] for part in cut([lengths[row] for row in mine], max_tokens)])
    count = max(map(len, shares))
    return [share + [[]] * (count - len(share)) for share in shares]


class Learner:
    """The prepared module with its optimizer, and what PPO does with them."""

    def __init__(
        self, parallel: Parallel, module: nn.Module, optimizer: torch.optim.Optimizer, ppo: Hyperparameters
    ) -> None:
        self.parallel, self.module, self.optimizer, self.ppo = parallel, module, optimizer, ppo
        self._skipped = 0

    def token_outputs(
        self,
        module: nn.Module,
        prompt_ids: Sequence[Sequence[int]],
        response_ids: Sequence[Sequence[int]],
        rows: Sequence[int],
        *,
        with_value: bool,
    ) -> TokenOutputs:
        """One forward over some rows of a batch; no rows: over a made-up one, to keep step with others."""
        batch = collate(prompt_ids, response_ids, rows, 0, self.parallel.device)
        outputs: TokenOutputs = module(
            batch.input_ids_BT,
            batch.attention_mask_BT,
            batch.prompt_lengths_B,
            batch.response_lengths_B,
            temperature=self.ppo.temperature,
            with_value=with_value,
        )
        return outputs

    @torch.no_grad()
    def score(
        self,
        module: nn.Module,
        rollout: Rollout,
        *,
        with_value: bool,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and values [B, R] of all rows' response tokens, zero beyond a row's length."""
        lengths = rollout.total_lengths
        budget = self.ppo.local_rollout_forward_batch_size * max(lengths)
        shares = share_rows(range(len(lengths)), lengths, self.parallel.world_size, budget)
        lengths_B = torch.tensor([len(ids) for ids in rollout.response_ids], device=self.parallel.device)
        logprobs_BR = torch.zeros(len(lengths), int(lengths_B.max()), device=self.parallel.device)
        values_BR = torch.zeros_like(logprobs_BR)
        for rows in shares[self.parallel.rank]:
            outputs = self.token_outputs(
                module, rollout.prompt_ids, rollout.response_ids, rows, with_value=with_value
            )
            if rows:
                width = logprobs_BR.shape[1]
                logprobs_BR[rows] = unflatten_tokens(outputs.logprobs_N, lengths_B[rows], width)
                if outputs.values_N is not None:
                    values_BR[rows] = unflatten_tokens(outputs.values_N, lengths_B[rows], width)
        # Each row was scored by one process; the others hold zeros.
        return self.parallel.sum(logprobs_BR), self.parallel.sum(values_BR)

    def update(self, experience: Experience, update: int) -> UpdateStats:
        """All optimizer steps of one update: epochs x mini-batches, rows shuffled anew in each epoch.

        Raises:
            NotFinite: loss or gradients were not finite too many times in a row.
        """
        stats = UpdateStats()
        size = len(experience) // self.ppo.num_mini_batches
        for epoch in range(self.ppo.num_ppo_epochs):
            order = shuffle(self.ppo.seed, update, epoch, len(experience))
            for start in range(0, size * self.ppo.num_mini_batches, size):
                stats.steps.append(self._step(experience, order[start : start + size]))
        return stats

    def _step(self, experience: Experience, rows: Sequence[int]) -> StepStats:
        """One optimizer step: the loss is the mean over all response tokens of the mini-batch."""
        lengths = experience.total_lengths
        budget = self.ppo.per_device_train_batch_size * max(lengths)
        tokens = int(experience.mask_BR[list(rows)].sum())
        micro_batches = share_rows(rows, lengths, self.parallel.world_size, budget)[self.parallel.rank]
        sums = torch.zeros(len(_STATS), device=self.parallel.device)
        for index, micro_batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with self.parallel.no_sync(self.module, last=last):
                loss, micro_sums = self._losses(experience, micro_batch)
                self.parallel.backward(self.module, loss / tokens, last=last)
            sums += micro_sums
        stats = StepStats(self.parallel.sum(sums), tokens)
        loss_sum = float(stats.sums[0] + self.ppo.vf_coef * stats.sums[1])
        stats.grad_norm = self.parallel.step(self.module, self.optimizer, loss_sum)
        self._count_skipped(stats.grad_norm)
        return stats

    def _losses(self, experience: Experience, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A micro-batch's loss summed over its tokens, and statistics. No rows: all zero, with a graph."""
        outputs = self.token_outputs(
            self.module, experience.prompt_ids, experience.response_ids, rows, with_value=True
        )
        assert outputs.values_N is not None
        if not rows:
            zeros = torch.zeros(len(_STATS), device=self.parallel.device)
            return 0.0 * (outputs.logprobs_N.sum() + outputs.values_N.sum()), zeros
        tokens, ppo = experience.tokens(rows), self.ppo
        keep = tokens.mask_N
        policy = policy_loss(
            outputs.logprobs_N[keep],
            tokens.logprobs_N[keep],
            tokens.advantages_N[keep],
            ppo.cliprange,
            ppo.cliprange,
        )
        value = value_loss(
            outputs.values_N[keep], tokens.values_N[keep], tokens.returns_N[keep], ppo.cliprange_value
        )
        seen = (
            policy.loss.detach(),
            value.loss.detach(),
            policy.approxkl,
            policy.clipped,
            value.clipped,
            outputs.entropies_N[keep],
            policy.ratio,
        )
        loss = (policy.loss + ppo.vf_coef * value.loss).sum()
        return loss, torch.stack([part.float().sum() for part in seen])

    def _count_skipped(self, grad_norm: float | None) -> None:
        self._skipped = 0 if grad_norm is not None else self._skipped + 1
        if self._skipped >= _MAX_SKIPPED:
            raise NotFinite(
                f"loss or gradients were not finite in {self._skipped} optimizer steps in a row; none was "
                "applied: lower learning_rate, or look at the rewards."
            )
