"""A whole batch of prompts → a scored rollout, each process taking its rows.

Every process ends with the whole batch, in the same order. This module knows processes and the tokenizer;
it does not know how a model is made ready for sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from ppo_engine.batch import Rollout
from ppo_engine.draws import Purpose
from ppo_engine.parallel import Parallel
from ppo_engine.prompts import Prompt
from ppo_engine.rewards import RewardBatch, Scorer, Scores
from ppo_engine.rollout.generate import Response, generate
from ppo_engine.rollout.sampling import row_uniforms
from ppo_engine.spec import Hyperparameters

_T = TypeVar("_T")


class Collector:
    """Samples and scores. tokenizer: the policy's. scorer: all rewards of the run."""

    def __init__(
        self,
        parallel: Parallel,
        tokenizer: Any,
        ppo: Hyperparameters,
        stop_token_id: int | None,
        scorer: Scorer,
    ) -> None:
        self.parallel, self.tokenizer, self.ppo = parallel, tokenizer, ppo
        self.stop_token_id, self.scorer = stop_token_id, scorer

    def sample(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        update: int,
        purpose: Purpose,
        *,
        temperature: float,
        in_step: bool,
    ) -> Rollout:
        """One response per prompt. in_step: every process must take part in every forward of the model."""
        mine = self._mine(range(len(prompts)))
        responses = generate(
            model,
            [prompts[row].ids for row in mine],
            row_uniforms(self.ppo.seed, update, mine, self.ppo.response_length, purpose),
            temperature=temperature,
            stop_token_id=self.stop_token_id,
            batch_rows=self.ppo.local_rollout_forward_batch_size,
            device=self.parallel.device,
            any_running=self.parallel.any if in_step else None,
        )
        return self._rollout(prompts, self._gathered(responses, len(prompts)))

    def _rollout(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Rollout:
        return Rollout(
            rows=list(range(len(prompts))),
            prompts=[prompt.text for prompt in prompts],
            prompt_ids=[prompt.ids for prompt in prompts],
            responses=[self._text(response) for response in responses],
            response_ids=[response.ids for response in responses],
            finished=[response.finished for response in responses],
            columns=[prompt.columns for prompt in prompts],
        )

    def _text(self, response: Response) -> str:
        ids = response.ids[:-1] if response.finished else response.ids
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def score(self, rollout: Rollout) -> Scores:
        """All rewards of all rows.

        Raises:
            RewardError: a reward failed, on any process.
        """
        mine = self._mine(range(len(rollout)))
        batch = RewardBatch(
            prompts=[rollout.prompts[row] for row in mine],
            responses=[rollout.responses[row] for row in mine],
            response_ids=[rollout.response_ids[row] for row in mine],
            columns=[rollout.columns[row] for row in mine],
            prompt_ids=[rollout.prompt_ids[row] for row in mine],
        )
        scores = self.scorer(batch)
        parts = self.parallel.gather(scores)
        rows = len(rollout)
        dense = [part.dense for part in parts]
        return Scores(
            scores=_joined([part.scores for part in parts], rows),
            dense=None if None in dense else _joined([part for part in dense if part is not None], rows),
            by_name={name: _joined([part.by_name[name] for part in parts], rows) for name in scores.by_name},
        )

    def _mine(self, rows: Sequence[int]) -> list[int]:
        """This process's rows, as many as any other's: the last ones take the first row again."""
        per_rank = -(-len(rows) // self.parallel.world_size)
        start = self.parallel.rank * per_rank
        return [rows[row] if row < len(rows) else rows[0] for row in range(start, start + per_rank)]

    def _gathered(self, mine: list[_T], rows: int) -> list[_T]:
        return _joined(self.parallel.gather(mine), rows)


def _joined(parts: Sequence[Sequence[_T]], rows: int) -> list[_T]:
    return [entry for part in parts for entry in part][:rows]
