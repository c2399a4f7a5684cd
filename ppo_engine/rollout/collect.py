"""A whole batch of prompts → a scored rollout, each process taking its rows.

Every process ends with the whole batch, in the same order. This module knows processes and the tokenizer;
it does not know how a model is made ready for sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppo_engine.batch import Rollout
from ppo_engine.draws import Purpose
from ppo_engine.hyperparameters import Hyperparameters
from ppo_engine.memory import Cut, Room
from ppo_engine.parallel import Parallel
from ppo_engine.prompts import Prompt
from ppo_engine.rewards import RewardBatch, RewardError, Scorer, Scores
from ppo_engine.rollout.generate import Response, generate
from ppo_engine.rollout.sampling import row_uniforms


class Collector:
    """Samples and scores. tokenizer: the policy's. scorer: all rewards of the run. room: of its forwards."""

    def __init__(
        self,
        parallel: Parallel,
        tokenizer: Any,
        ppo: Hyperparameters,
        stop_token_id: int | None,
        scorer: Scorer,
        room: Room,
    ) -> None:
        self.parallel, self.tokenizer, self.ppo = parallel, tokenizer, ppo
        self.stop_token_id, self.scorer, self.room = stop_token_id, scorer, room

    def sample(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        update: int,
        purpose: Purpose,
        *,
        temperature: float,
        batch_rows: int,
        in_step: bool,
    ) -> Rollout:
        """One response per prompt, so many rows at a time, or fewer where memory ends.

        in_step: every process must take part in every forward of the model.

        Raises:
            FloatingPointError: the logits were not numbers, on any process.
            OutOfMemory: as `Room.do`.
        """
        mine = self._mine(len(prompts))
        # As many rows as any other process, so as many forwards: the first row stands in, and is left out.
        rows = mine + [0] * (self._per_process(len(prompts)) - len(mine))
        longest = max(len(prompt.ids) for prompt in prompts) + self.ppo.response_length

        def attempt(batch_rows: int) -> list[Response] | FloatingPointError:
            try:
                return generate(
                    model,
                    [prompts[row].ids for row in rows],
                    row_uniforms(self.ppo.seed, update, rows, self.ppo.response_length, purpose),
                    temperature=temperature,
                    stop_token_id=self.stop_token_id,
                    batch_rows=batch_rows,
                    device=self.parallel.device,
                    any_running=self.parallel.any if in_step else None,
                )
            except FloatingPointError as error:
                return error  # raised below: first all tell each other whether memory was enough

        def cut(batch_rows: int) -> Cut:
            return Cut(batch_rows, batch_rows * longest)

        responses = self.room.do("rollout", min(batch_rows, len(rows)), attempt, cut, lambda: None)
        with self.parallel.together(FloatingPointError):
            if isinstance(responses, FloatingPointError):
                raise responses
        assert isinstance(responses, list)
        parts = self.parallel.gather(responses[: len(mine)])
        return self._rollout(prompts, [response for part in parts for response in part])

    def _rollout(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Rollout:
        return Rollout(
            rows=list(range(len(prompts))),
            prompts=[prompt.text for prompt in prompts],
            prompt_ids=[prompt.ids for prompt in prompts],
            responses=[self._text(response) for response in responses],
            response_ids=[response.ids for response in responses],
            finished=[self._is_finished(response) for response in responses],
            columns=[prompt.columns for prompt in prompts],
        )

    def _is_finished(self, response: Response) -> bool:
        if self.stop_token_id is not None:
            return response.finished
        return self.tokenizer.eos_token_id in response.ids  # as in TRL, which lets such responses go on

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
    """The scores of all rows, in order. A part whose rows no reward scored per token has zeros for them.

    So has a token that the policy did not write, whatever a reward said of it.
    """
    dense: list[list[float]] | None = None
    if any(part.dense for part in parts):
        rows = [row for part in parts for row in part.dense or [[]] * len(part.scores)]
        dense = [row or [0.0] * len(ids) for row, ids in zip(rows, rollout.response_ids, strict=True)]
        if rollout.written is not None:
            dense = [
                [score if is_own else 0.0 for score, is_own in zip(*pair, strict=True)]
                for pair in zip(dense, rollout.written, strict=True)
            ]
    by_name = {name: [score for part in parts for score in part.by_name[name]] for name in parts[0].by_name}
    return Scores(
        [score for part in parts for score in part.scores],
        dense,
        by_name,
        retried={name: sum(part.retried[name] for part in parts) for name in parts[0].retried},
        failed={name: sum(part.failed[name] for part in parts) for name in parts[0].failed},
    )
