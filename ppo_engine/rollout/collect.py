"""A whole batch of prompts → a scored rollout, each process taking its rows.

Every process ends with the whole batch, in the same order. This module knows processes and the tokenizer;
it does not know how a model is made ready for sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppo_engine.batch import Rollout
from ppo_engine.draws import Purpose
from ppo_engine.parallel import Parallel
from ppo_engine.prompts import Prompt
from ppo_engine.rewards import RewardBatch, RewardError, Scorer, Scores
from ppo_engine.rollout.generate import Response, generate
from ppo_engine.rollout.sampling import row_uniforms
from ppo_engine.spec import Hyperparameters


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
        """One response per prompt. in_step: every process must take part in every forward of the model.

        Raises:
            FloatingPointError: the logits were not numbers, on any process.
        """
        mine = self._mine(len(prompts))
        # As many rows as any other process, so as many forwards: the first row stands in, and is left out.
        rows = mine + [0] * (self._per_process(len(prompts)) - len(mine))
        with self.parallel.together(FloatingPointError):
            responses = generate(
                model,
                [prompts[row].ids for row in rows],
                row_uniforms(self.ppo.seed, update, rows, self.ppo.response_length, purpose),
                temperature=temperature,
                stop_token_id=self.stop_token_id,
                batch_rows=self.ppo.local_rollout_forward_batch_size,
                device=self.parallel.device,
                any_running=self.parallel.any if in_step else None,
            )
        parts = self.parallel.gather(responses[: len(mine)])
        return self._rollout(prompts, [response for part in parts for response in part])

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
        mine = self._mine(len(rollout))
        batch = RewardBatch(
            prompts=[rollout.prompts[row] for row in mine],
            responses=[rollout.responses[row] for row in mine],
            response_ids=[rollout.response_ids[row] for row in mine],
            columns=[rollout.columns[row] for row in mine],
            prompt_ids=[rollout.prompt_ids[row] for row in mine],
        )
        with self.parallel.together(RewardError):
            scores = self.scorer(batch)
        return _joined(self.parallel.gather(scores), rollout)

    def _per_process(self, rows: int) -> int:
        return -(-rows // self.parallel.world_size)

    def _mine(self, rows: int) -> list[int]:
        """This process's rows; the last processes may have fewer than others, or none."""
        start = self.parallel.rank * self._per_process(rows)
        return list(range(start, min(start + self._per_process(rows), rows)))


def _joined(parts: Sequence[Scores], rollout: Rollout) -> Scores:
    """The scores of all rows, in order. A part whose rows no reward scored per token has zeros for them."""
    dense: list[list[float]] | None = None
    if any(part.dense for part in parts):
        rows = [row for part in parts for row in part.dense or [[]] * len(part.scores)]
        dense = [row or [0.0] * len(ids) for row, ids in zip(rows, rollout.response_ids, strict=True)]
    by_name = {name: [score for part in parts for score in part.by_name[name]] for name in parts[0].by_name}
    return Scores([score for part in parts for score in part.scores], dense, by_name)
