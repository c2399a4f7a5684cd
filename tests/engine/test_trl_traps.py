"""Traps of TRL's last trainer by number, beside those of test_traps.py; then some without a number.

`TRAPS` says for each which test proves it; docs/migrating-from-trl.md repeats it for readers.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed

from ppo_engine import trainer as trainer_module
from ppo_engine.batch import Experience, Rollout
from ppo_engine.experience import experience_of
from ppo_engine.issues import SpecError
from tests.engine import tiny
from tests.engine.training import PROMPTS, config, logged, trainer, value_model

TRAPS = {
    1: ("test_trainer", "test_a_resumed_run_is_the_uninterrupted_one"),
    2: ("test_traps", "test_2_adam_takes_epochs_times_mini_batches_steps_per_update"),
    3: ("test_traps", "test_3_statistics_are_means_over_what_was_computed"),
    4: ("test_trl_traps", "test_4_the_end_of_the_data_forces_no_step"),
    5: ("test_trainer", "test_gradients_are_clipped"),
    6: ("test_trainer", "test_micro_batches_do_not_change_the_run"),
    7: ("test_processes", "test_all_weights_dense_rewards_and_whitening_are_as_in_one_process"),
    8: ("test_traps", "test_8_the_token_of_id_0_stops"),
    9: ("test_trainer", "test_the_stop_penalty_is_for_the_stop_token"),
    10: ("test_traps", "test_10_which_token_pads_changes_no_number"),
    11: ("test_processes", "test_every_stage_trains_and_exports_as_one_process_does"),
    12: ("test_trainer", "test_the_reference_context_gives_back_everything"),
    13: ("test_traps", "test_13_entropy_and_value_loss_are_means_over_response_tokens"),
    14: ("test_traps", "test_14_logits_in_chunks_give_the_same_values_and_gradients"),
    15: ("test_trl_traps", "test_15_no_forward_is_wider_than_its_longest_row"),
    16: ("test_trainer", "test_before_the_first_step_the_ratio_is_one"),
    17: ("test_processes", "test_while_the_policy_is_whole_to_sample_the_critic_stays_in_shards"),
    18: ("test_rewards", "test_model_with_a_tokenizer_of_its_own"),
    19: ("test_trl_traps", "test_19_the_global_random_state_orders_nothing"),
    20: ("test_trl_traps", "test_20_no_value_model_is_a_head_and_evaluation_runs_by_its_steps"),
    21: ("test_trl_traps", "test_21_prompts_are_text_chats_or_ids_alike"),
}


def test_every_trap_has_its_test() -> None:
    assert list(TRAPS) == list(range(1, 22))
    for module, name in TRAPS.values():
        assert callable(getattr(importlib.import_module(f"tests.engine.{module}"), name)), name


@pytest.fixture
def experiences(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Rollout, Experience]]:
    """What each update learns from."""
    seen: list[tuple[Rollout, Experience]] = []

    def recorded(rollout: Rollout, *given: Any) -> Any:
        experience, kl_BR = experience_of(rollout, *given)
        seen.append((rollout, experience))
        return experience, kl_BR

    monkeypatch.setattr(trainer_module, "experience_of", recorded)
    return seen


def test_4_the_end_of_the_data_forces_no_step(tmp_path: Path) -> None:
    """The data end within the second update; TRL's loader then makes every micro-batch a step."""
    made = trainer(tmp_path, train_dataset=PROMPTS[:24])
    made.train()

    assert logged(made, "optimizer_steps") == [4.0, 4.0, 4.0]
    assert {int(state["step"]) for state in made.optimizer.state.values()} == {12}


def test_15_no_forward_is_wider_than_its_longest_row(
    tmp_path: Path, experiences: list[tuple[Rollout, Experience]]
) -> None:
    """One prompt is long; TRL would pad every row of the batch to it, in every epoch."""
    rows = [{"prompt": " ".join(["nine"] * 20)}, *PROMPTS[:15]]
    made = trainer(tmp_path, train_dataset=rows, changes={"total_episodes": 16})
    forwards: list[tuple[int, int]] = []
    made.model.register_forward_pre_hook(
        lambda module, given: forwards.append((int(given[1].sum(-1).max()), given[0].shape[1]))
    )
    made.train()

    assert all(width == longest for longest, width in forwards)
    ((rollout, _),) = experiences
    longest_row = max(rollout.total_lengths)
    assert min(width for _, width in forwards) < longest_row


def test_19_the_global_random_state_orders_nothing(tmp_path: Path) -> None:
    """A callback disturbs it; the run is what it was."""

    class Disturbing(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            np.random.seed(9)
            torch.manual_seed(9)

    runs = []
    for index, callbacks in enumerate(([], [Disturbing()])):
        set_seed(index)
        made = trainer(tmp_path / str(index), model=tiny.policy(), callbacks=callbacks)
        made.train()
        runs.append(logged(made, "loss/policy_avg") + logged(made, "objective/scores"))

    assert runs[0] == runs[1]


def test_20_no_value_model_is_a_head_and_evaluation_runs_by_its_steps(tmp_path: Path) -> None:
    """Every second update, and after the last."""
    changes = {"eval_strategy": "steps", "eval_steps": 2}
    made = trainer(tmp_path, lora=False, value_model=None, eval_dataset=PROMPTS[:3], changes=changes)
    made.train()

    assert made.value_model is None
    assert made.model.value_head is not None
    assert [entry["step"] for entry in made.state.log_history if "eval/scores" in entry] == [2, 3]


def test_21_prompts_are_text_chats_or_ids_alike(tmp_path: Path) -> None:
    """Three ways to say "user one two assistant"."""
    processing_class = tiny.tokenizer(chat=True)
    ids = processing_class("user one two assistant")["input_ids"]
    ways: list[dict[str, Any]] = [
        {"prompt": "user one two assistant"},
        {"messages": [{"role": "user", "content": "one two"}]},
        {"input_ids": ids},
    ]
    prompts = [
        trainer(tmp_path / str(index), processing_class=processing_class, train_dataset=[way] * 4).prompts[0]
        for index, way in enumerate(ways)
    ]

    assert [prompt.ids for prompt in prompts] == [ids] * 3


# Without a number --------------------------------------------------------------------------------------


def test_the_score_is_the_reward_of_the_last_token(
    tmp_path: Path, experiences: list[tuple[Rollout, Experience]]
) -> None:
    """Also of a response that ended early: TRL adds it one position behind, to a token that is not there."""
    trainer(tmp_path, reward_model=lambda batch: [3.0] * len(batch), changes={"kl_coef": 0.0}).train()

    rollout, experience = experiences[0]
    assert len(set(map(len, rollout.response_ids))) > 2
    for rewards, ids in zip(experience.rewards_BR.tolist(), rollout.response_ids, strict=True):
        assert rewards[: len(ids)] == [0.0] * (len(ids) - 1) + [3.0]
        assert not any(rewards[len(ids) :])


def test_a_callback_can_stop_the_run(tmp_path: Path) -> None:
    class Stopping(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 2

    assert trainer(tmp_path, callbacks=[Stopping()]).train().global_step == 2


def test_fewer_prompts_than_a_batch_come_again_within_it(
    tmp_path: Path, experiences: list[tuple[Rollout, Experience]]
) -> None:
    """TRL drops what is no whole batch, and waits without end for one."""
    made = trainer(tmp_path, train_dataset=PROMPTS[:5], eval_dataset=PROMPTS[:1])
    made.train()

    first = [tuple(ids) for ids in experiences[0][0].prompt_ids]
    assert len(first) == 16
    assert sorted(first.count(ids) for ids in set(first)) == [3, 3, 3, 3, 4]
    assert set(made.evaluate()) >= {"eval/scores"}


def test_a_run_shorter_than_a_batch_is_refused_with_its_numbers(tmp_path: Path) -> None:
    words = r"total_episodes: Not given, and num_train_epochs 3.0 x 5 prompts = 15, with a batch of 16 rows"
    with pytest.raises(SpecError, match=words):
        trainer(tmp_path, train_dataset=PROMPTS[:5], changes={"total_episodes": None})


@pytest.mark.parametrize("asked", [True, False])
def test_bf16_is_what_forwards_compute_in(tmp_path: Path, asked: bool) -> None:
    """TRL's own accelerator is told nothing of it, so that its forwards stay in fp32."""
    made = trainer(tmp_path, changes={"bf16": asked, "total_episodes": 16})
    seen: set[torch.dtype] = set()
    layer = made.model.policy.base_model.model.model.layers[0].mlp
    layer.register_forward_hook(lambda module, given, output: seen.add(output.dtype))
    made.train()

    assert seen == {torch.bfloat16 if asked else torch.float32}


def test_a_machine_without_bf16_needs_no_word_of_it(tmp_path: Path) -> None:
    assert config(tmp_path, bf16=None).bf16 is False


# The penalty, without a stop token ---------------------------------------------------------------------


def test_without_a_stop_token_the_penalty_is_for_responses_without_eos(
    tmp_path: Path, experiences: list[tuple[Rollout, Experience]]
) -> None:
    """As both commands of TRL's example script have it: responses go on behind their eos."""
    changes = {"stop_token_id": None, "missing_eos_penalty": 2.0, "kl_coef": 0.0, "total_episodes": 16}
    made = trainer(tmp_path, reward_model=lambda batch: [1.0] * len(batch), changes=changes)
    made.train()

    ((rollout, experience),) = experiences
    eos = made.processing_class.eos_token_id
    with_eos = [eos in ids for ids in rollout.response_ids]
    assert {len(ids) for ids in rollout.response_ids} == {8}
    assert 0 < sum(with_eos) < 16
    assert experience.rewards_BR[:, -1].tolist() == [1.0 if has_it else -1.0 for has_it in with_eos]
    assert logged(made, "objective/scores") == [pytest.approx(1 - 2 * (1 - sum(with_eos) / 16))]
    count = sum(ids.count(eos) for ids in rollout.response_ids)
    assert logged(made, "val/num_eos_tokens") == [count]
    assert count >= sum(with_eos)


def test_a_penalty_for_what_cannot_be_looked_for_is_refused(tmp_path: Path) -> None:
    changes = {"stop_token_id": None, "missing_eos_penalty": 2.0}
    with pytest.raises(SpecError, match=r"missing_eos_penalty: 2.0 given without a stop token, and the tok"):
        trainer(tmp_path, processing_class=tiny.tokenizer(eos=None), changes=changes)


# Before a model is loaded ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"advantage_estimator": "rloo"},
            'num_return_sequences: 1 given with advantage_estimator "rloo", .*: give 2 or more',
        ),
        ({"num_mini_batches": 3}, "num_mini_batches: 3 given, with .* = 16 rows .*: give a divisor"),
        ({"total_episodes": 8}, "total_episodes: 8 given, with a batch of 16 rows .*: raise it"),
        ({"kl_placement": "loss"}, 'kl_estimator: "k1" given with kl_placement "loss"; .*: give "k2"'),
        ({"cliprange": 0.0}, "cliprange: 0.0 given.*"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_themselves(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        config(tmp_path, **changes)


def test_a_critic_without_a_use_is_refused_by_field(tmp_path: Path) -> None:
    changes = {"advantage_estimator": "reinforce++"}
    with pytest.raises(SpecError, match=r"value_model: A LlamaForSequenceClassification given with .*leave"):
        trainer(tmp_path, value_model=value_model(), changes=changes)


def test_there_are_no_loaders_to_change_to_no_effect(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset=PROMPTS[:2])
    for ask in (made.get_train_dataloader, made.get_eval_dataloader, made.get_test_dataloader):
        with pytest.raises(NotImplementedError, match=r"read trainer\.prompts"):
            ask()
    assert made.policy_model is made.model.policy


def test_prompts_of_an_evaluation_are_sampled_so_many_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, eval_dataset=PROMPTS[:7], changes={"per_device_eval_batch_size": 3})
    asked: list[int] = []
    sample = made.collector.sample
    monkeypatch.setattr(
        made.collector,
        "sample",
        lambda *given, **options: asked.append(options["batch_rows"]) or sample(*given, **options),
    )
    made.evaluate()
    assert set(asked) == {3}
    asked.clear()
    made.train()
    assert asked == [64, 64, 64]
