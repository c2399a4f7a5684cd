"""A whole batch of prompts → a scored rollout, each process taking its rows.

Every process ends with the whole batch, in the same order. This module knows processes and the tokenizer;
it does not know how a model is made ready for sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ppo_engine.batch import Rollout
from ppo_engine.draws import Purpose
from ppo_engine.hyperparameters import Hyperparameters
from ppo_engine.memory import Cut, OutOfMemory, Room
from ppo_engine.parallel import Parallel
from ppo_engine.prompts import Prompt
from ppo_engine.rewards import ModelReward, RewardBatch, RewardError, Scorer, Scores
from ppo_engine.rollout.generate import Response, generate
from ppo_engine.rollout.sampling import row_uniforms
from ppo_engine.rollout.turns import Environment, Row, answers


class Collector:
    """Samples and scores.

    tokenizer: the policy's. scorer: all rewards of the run. room: of its forwards. environment: what answers
    where a response comes to its stop token; None: there it ends.
    """

    def __init__(
        self,
        parallel: Parallel,
        tokenizer: Any,
        ppo: Hyperparameters,
        stop_token_id: int | None,
        scorer: Scorer,
        room: Room,
        environment: Environment | None = None,
    ) -> None:
        self.environment = environment
        self.parallel, self.tokenizer, self.ppo = parallel, tokenizer, ppo
        self.stop_token_id, self.scorer, self.room = stop_token_id, scorer, room
        for named in scorer.rewards:
            if isinstance(named.reward, ModelReward):
                named.reward.room = room
                parallel.make_alike(named.reward.model)

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
        scored: bool = False,
        value_head: nn.Module | None = None,
    ) -> Rollout:
        """One response per prompt, so many rows at a time, or fewer where memory ends.

        in_step: every process must take part in every forward of the model. scored: the rollout is to have
        log-probabilities, and, where there is a `value_head` on the model's trunk, values.

        Raises:
            FloatingPointError: the logits were not numbers, on any process.
            OutOfMemory: as `Room.do`.
        """
        mine = self._mine(len(prompts))

        def turn(
            ids: Sequence[Sequence[int]],
            uniforms_BR: NDArray[np.float64],
            limits: Sequence[int] | None = None,
        ) -> list[Response]:
            return self._turn(model, ids, uniforms_BR, limits, temperature, batch_rows, in_step, value_head)

        def uniforms(rows: Sequence[int]) -> NDArray[np.float64]:
            return row_uniforms(self.ppo.seed, update, rows, self.ppo.response_length, purpose)

        if (environment := self.environment) is not None:

            def ask(batch: RewardBatch) -> list[list[int] | None]:
                vocab_size = model.config.get_text_config().vocab_size
                return answers(environment, batch, self.tokenizer, vocab_size)

            own = self._in_turns(ask, turn, [prompts[row] for row in mine], uniforms(mine), prompts[0])
            made = [row for part in self.parallel.gather(own) for row in part]
            return self._rollout(prompts, made, written=[row.written for row in made])
        # As many rows as any other process, so as many forwards: the first row stands in, and is left out.
        rows = mine + [0] * (self._per_process(len(prompts)) - len(mine))
        responses = turn([prompts[row].ids for row in rows], uniforms(rows))
        parts = self.parallel.gather(responses[: len(mine)])
        responses = [response for part in parts for response in part]
        rollout = self._rollout(prompts, responses)
        if not scored:
            return rollout
        return replace(
            rollout,
            logprobs=[response.logprobs for response in responses],
            values=_all_or_none([response.values for response in responses]),
        )

    def _turn(
        self,
        model: Any,
        prompt_ids: Sequence[Sequence[int]],
        uniforms_BR: NDArray[np.float64],
        limits: Sequence[int] | None,
        temperature: float,
        batch_rows: int,
        in_step: bool,
        value_head: nn.Module | None,
    ) -> list[Response]:
        """This process's rows, each to its stop token, to its limit, or to the last of its numbers."""
        longest = max(map(len, prompt_ids)) + uniforms_BR.shape[1]

        def attempt(batch_rows: int) -> list[Response] | FloatingPointError:
            try:
                return generate(
                    model,
                    prompt_ids,
                    uniforms_BR,
                    temperature=temperature,
                    stop_token_id=self.stop_token_id,
                    batch_rows=batch_rows,
                    device=self.parallel.device,
                    any_running=self.parallel.any if in_step else None,
                    value_head=value_head,
                    limits=limits,
                )
            except FloatingPointError as error:
                return error  # raised below: first all tell each other whether memory was enough

        def cut(batch_rows: int) -> Cut:
            return Cut(batch_rows, batch_rows * longest)

        responses = self.room.do("rollout", min(batch_rows, len(prompt_ids)), attempt, cut, lambda: None)
        with self.parallel.together(FloatingPointError):
            if isinstance(responses, FloatingPointError):
                raise responses
        assert isinstance(responses, list)
        return responses

    def _in_turns(
        self,
        ask: Callable[[RewardBatch], list[list[int] | None]],
        turn: Callable[[Sequence[Sequence[int]], NDArray[np.float64], Sequence[int]], list[Response]],
        prompts: Sequence[Prompt],
        uniforms_BR: NDArray[np.float64],
        stand_in: Prompt,
    ) -> list[Row]:
        """This process's rows, each until the environment ends it, or its tokens do.

        A row's numbers belong to its tokens, so what it draws does not depend on how many turns others take.
        stand_in: what is sampled from, and left out, where another process has more rows that go on.
        """
        room = self.ppo.response_length
        rows = [Row(prompt.ids) for prompt in prompts]
        while True:
            going_on = [index for index, row in enumerate(rows) if not row.is_over]
            limits = [room - len(rows[index].ids) for index in going_on]
            count, longest = self._greatest(len(going_on), *limits)
            if count == 0:
                return rows
            ids = [rows[index].prompt_ids + rows[index].ids for index in going_on]
            numbers = np.zeros((count, longest))
            for place, index in enumerate(going_on):
                left = uniforms_BR[index, len(rows[index].ids) :][:longest]
                numbers[place, : len(left)] = left
            spare = count - len(ids)
            responses = turn(ids + [stand_in.ids] * spare, numbers, limits + [1] * spare)
            for index, response in zip(going_on, responses[: len(going_on)], strict=True):
                rows[index].write(response, room)
            asking = [index for index in going_on if not rows[index].is_over]
            batch = self._so_far([prompts[index] for index in asking], [rows[index] for index in asking])
            # It is the user's code: whatever it raises on one process, the others may not wait for that one.
            with self.parallel.together(Exception):
                given = ask(batch) if asking else []
            for index, answer in zip(asking, given, strict=True):
                rows[index].read(answer, room)

    def _greatest(self, count: int, *lengths: int) -> tuple[int, int]:
        """Of all processes, the greatest count, and the greatest length."""
        told = self.parallel.gather((count, max(lengths, default=0)))
        return max(count for count, _ in told), max(length for _, length in told)

    def _so_far(self, prompts: Sequence[Prompt], rows: Sequence[Row]) -> RewardBatch:
        return RewardBatch(
            prompts=[prompt.text for prompt in prompts],
            responses=[self._text(row) for row in rows],
            response_ids=[row.ids for row in rows],
            columns=[prompt.columns for prompt in prompts],
            prompt_ids=[prompt.ids for prompt in prompts],
        )

    def _rollout(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response | Row],
        written: list[list[bool]] | None = None,
    ) -> Rollout:
        return Rollout(
            rows=list(range(len(prompts))),
            prompts=[prompt.text for prompt in prompts],
            prompt_ids=[prompt.ids for prompt in prompts],
            responses=[self._text(response) for response in responses],
            response_ids=[response.ids for response in responses],
            finished=[self._is_finished(response) for response in responses],
            columns=[prompt.columns for prompt in prompts],
            written=written,
        )

    def _is_finished(self, response: Response | Row) -> bool:
        if self.stop_token_id is not None:
            return response.finished
        return self.tokenizer.eos_token_id in response.ids  # as in TRL, which lets such responses go on

    def _text(self, response: Response | Row) -> str:
        ids = response.ids[:-1] if response.finished else response.ids
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def score(self, rollout: Rollout) -> Scores:
        """All rewards of all rows.

        Raises:
            RewardError: a reward failed, on any process.
            OutOfMemory: memory ended in one, on any process, where a single row was computed.
        """
        mine = self._mine(len(rollout))
        batch = RewardBatch(
            prompts=[rollout.prompts[row] for row in mine],
            responses=[rollout.responses[row] for row in mine],
            response_ids=[rollout.response_ids[row] for row in mine],
            columns=[rollout.columns[row] for row in mine],
            prompt_ids=[rollout.prompt_ids[row] for row in mine],
        )
        try:
            with self.parallel.together(RewardError, OutOfMemory):
                scores = self.scorer(batch)
        finally:  # what was found out is told, even where the rewards then failed: on all processes
            self.room.agree("reward")
        return _joined(self.parallel.gather(scores), rollout)

    def _per_process(self, rows: int) -> int:
        return -(-rows // self.parallel.world_size)

    def _mine(self, rows: int) -> list[int]:
        """This process's rows; the last processes may have fewer than others, or none."""
        start = self.parallel.rank * self._per_process(rows)
        return list(range(start, min(start + self._per_process(rows), rows)))


def _all_or_none(values: Sequence[list[float] | None]) -> list[list[float]] | None:
    given = [row for row in values if row is not None]
    return given if len(given) == len(values) else None


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
