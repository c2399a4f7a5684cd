"""Responses in turns: an environment answers at the stop token, and the policy goes on after its words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ppo_engine.draws import Purpose
from ppo_engine.issues import SpecError
from ppo_engine.parallel import _portable
from ppo_engine.rewards import RewardBatch
from ppo_engine.rollout.generate import Response, generate
from ppo_engine.rollout.sampling import row_uniforms
from ppo_engine.rollout.turns import Row
from ppo_engine.trainer import PPOTrainer
from tests.engine import tiny
from tests.engine.training import PROMPTS, STOP, logged, trainer

ANSWER = [tiny.WORDS.index("nine"), tiny.WORDS.index("eight")]
LONG = {"response_length": 24, "temperature": 0.5}


class Once:
    """Answers each row once, by text or by ids; remembers what it was asked."""

    def __init__(self, answer: str | Sequence[int] = "nine eight") -> None:
        self.answer, self.asked = answer, list[tuple[str, list[int]]]()

    def __call__(self, batch: RewardBatch) -> list[str | Sequence[int] | None]:
        self.asked += zip(batch.prompts, [list(ids) for ids in batch.response_ids], strict=True)
        return [self.answer if ids.count(STOP) == 1 else None for ids in batch.response_ids]


def sampled(made: PPOTrainer, rows: int = 12) -> Any:
    return made._sample(made.prompts[:rows], 1, Purpose.ROLLOUT, made.ppo.temperature)


@pytest.mark.parametrize("answer", ["nine eight", ANSWER])
def test_an_answer_is_read_and_the_policy_goes_on_after_it(tmp_path: Path, answer: Any) -> None:
    environment = Once(answer)
    rollout = sampled(trainer(tmp_path, changes=LONG, environment=environment))
    answered = [row for row, ids in enumerate(rollout.response_ids) if STOP in ids[:-1]]

    assert len(answered) > 3
    assert all(ids[-1] == STOP for _, ids in environment.asked)
    for row in answered:
        ids, written = rollout.response_ids[row], rollout.written[row]
        after = ids.index(STOP) + 1
        assert ids[after : after + 2] == ANSWER[: len(ids) - after]
        assert [place for place, own in enumerate(written) if not own] == list(
            range(after, min(after + 2, len(ids)))
        )
        assert rollout.finished[row] == (ids[-1] == STOP)
        assert "nine eight" in rollout.responses[row] or len(ids) == 24
    for row in set(range(12)) - set(answered):
        assert all(rollout.written[row])
    assert max(map(len, rollout.response_ids)) <= 24


def test_what_a_row_draws_does_not_depend_on_the_others(tmp_path: Path) -> None:
    """Alone in its batch, and beside rows that take more turns or fewer."""
    made = trainer(tmp_path, changes=LONG, environment=Once())
    together, alone = sampled(made), sampled(made, rows=1)
    assert alone.response_ids[0] == together.response_ids[0]


def test_the_first_turn_is_the_response_without_an_environment(tmp_path: Path) -> None:
    plain = sampled(trainer(tmp_path / "plain", changes=LONG))
    in_turns = sampled(trainer(tmp_path / "turns", changes=LONG, environment=Once()))
    for response, longer in zip(plain.response_ids, in_turns.response_ids, strict=True):
        assert longer[: len(response)] == response


def test_the_policy_is_trained_on_its_own_words_alone(tmp_path: Path) -> None:
    """A reward for each word of the answer moves nothing: it is nobody's doing."""

    def likes_the_answer(batch: RewardBatch) -> list[list[float]]:
        return [[float(token in ANSWER) for token in ids] for ids in batch.response_ids]

    made = trainer(
        tmp_path,
        changes={**LONG, "total_episodes": 16},
        environment=Once(),
        reward_model=likes_the_answer,
        train_dataset=PROMPTS[:32],
    )
    rollout = sampled(made)
    scores = made.collector.score(rollout)
    assert scores.dense is not None
    for row, written in enumerate(rollout.written):
        told = [score for score, own in zip(scores.dense[row], written, strict=True) if not own]
        assert told == [0.0] * len(told)
    made.train()
    assert logged(made, "optimizer_steps") == [4.0]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (lambda batch: [], r"returned 0 answers to \d+ rows; return one for each"),
        (lambda batch: [[10**6]] * len(batch), "ids from 0 to"),
        (lambda batch: [["nine"]] * len(batch), "an answer is text, None, or ids"),
    ],
)
def test_an_answer_that_is_none_is_refused(tmp_path: Path, answers: Any, message: str) -> None:
    made = trainer(tmp_path, changes=LONG, environment=answers)
    with pytest.raises(ValueError, match=message):
        sampled(made)


def test_an_environment_needs_a_stop_token(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="environment: Given without a stop token"):
        trainer(tmp_path, changes={"stop_token_id": None}, environment=Once())


def test_no_row_is_sampled_past_its_own_room() -> None:
    """A row near the end of the context, beside so many that have just begun that it stays in the batch."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=16, n_positions=32, n_embd=16, n_layer=1, n_head=2, eos_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    prompts, limits = [[3] * 30, *([5, 6 + row] for row in range(4))], [2, 24, 24, 24, 24]
    uniforms = row_uniforms(0, 1, range(5), 24, Purpose.ROLLOUT)

    def sampled(rows: list[int], limits: list[int]) -> list[list[int]]:
        responses = generate(
            model,
            [prompts[row] for row in rows],
            uniforms[rows],
            temperature=1.0,
            stop_token_id=None,
            batch_rows=5,
            device=torch.device("cpu"),
            limits=limits,
        )
        return [response.ids for response in responses]

    together = sampled([0, 1, 2, 3, 4], limits)
    assert [len(ids) for ids in together] == limits
    assert together == [sampled([row], [limits[row]])[0] for row in range(5)]


class Awkward(Exception):
    """As the errors of some clients: it cannot be made again from what it was pickled with."""

    def __init__(self, *, message: str) -> None:
        super().__init__(message)


def test_an_error_that_cannot_be_sent_to_other_processes_is_told_in_words() -> None:
    told = _portable(Awkward(message="the calculator is broken"))
    assert repr(told) == "RuntimeError('Awkward: the calculator is broken')"
    assert repr(_portable(KeyError("plain"))) == "KeyError('plain')"


def test_a_response_ends_where_its_room_does() -> None:
    row = Row([1])
    row.write(Response([5, 6, STOP], True, []), room=6)
    assert not row.is_over
    row.read([7, 8, 9, 10], room=6)
    assert (row.ids, row.is_over, row.finished) == ([5, 6, STOP, 7, 8, 9], True, False)
    assert row.written == [True] * 3 + [False] * 3

    full = Row([1])
    full.write(Response([5, STOP], True, []), room=2)
    assert (full.is_over, full.finished) == (True, True)

    cut = Row([1], ids=[4, STOP, 7], written=[True, True, False])
    cut.write(Response([5, STOP], True, []), room=4)
    assert (cut.ids, cut.is_over, cut.finished) == ([4, STOP, 7, 5], True, False)
