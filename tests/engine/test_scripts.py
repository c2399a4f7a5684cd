"""What scripts expect of a Trainer: the hub, evaluation, optimizers, callbacks, resuming, the result."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, PeftModel
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ppo_engine import checkpoint
from ppo_engine.actor_critic import ActorCritic
from ppo_engine.checkpoint import CheckpointMismatch
from ppo_engine.rewards import NamedReward, RewardBatch
from tests.engine import tiny
from tests.engine.training import PROMPTS, likes_seven, logged, trainer, value_model

EVERY_UPDATE = {"save_strategy": "steps", "save_steps": 1}


# The hub -----------------------------------------------------------------------------------------------


class FakeHub:
    """The hub's client at the call that would leave the machine; what it takes of a folder is real."""

    def __init__(self) -> None:
        self.pushed: list[tuple[str, set[str]]] = []

    def create_repo(self, name: str, **_: Any) -> Any:
        return type("Url", (), {"repo_id": f"me/{name}"})

    def upload_folder(
        self, *, folder_path: str, commit_message: str, ignore_patterns: list[str], **_: Any
    ) -> None:
        folder = Path(folder_path)
        files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        kept = set(filter_repo_objects(files, ignore_patterns=ignore_patterns))
        self.pushed.append((commit_message, kept))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: fake)
    return fake


def crash_while_saving(made: Any, directory: Path) -> None:
    def fill(partial: Path) -> None:
        (partial / "training_state.pt").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(directory, 9, made.parallel, fill, {})
    assert not directory.exists()


TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"}
ADAPTER = TOKENIZER | {"adapter_model.safetensors", "adapter_config.json"}
MODEL = TOKENIZER | {"model.safetensors", "config.json"}


@pytest.mark.parametrize(("lora", "files"), [(True, ADAPTER), (False, MODEL)])
def test_the_policy_alone_is_pushed_with_every_checkpoint(
    tmp_path: Path, hub: FakeHub, lora: bool, files: set[str]
) -> None:
    made = trainer(tmp_path, lora=lora, changes={**EVERY_UPDATE, "push_to_hub": True})
    crash_while_saving(made, tmp_path / "checkpoint-9")
    made.train()
    made.save_model()

    assert [message for message, _ in hub.pushed] == [
        *(f"Training in progress, step {update}" for update in (1, 2, 3)),
        "Model save",
    ]
    assert [pushed for _, pushed in hub.pushed] == [files] * 4
    assert isinstance(made.model, ActorCritic)


def test_a_push_at_the_end_is_the_only_one(tmp_path: Path, hub: FakeHub) -> None:
    made = trainer(tmp_path, changes={**EVERY_UPDATE, "push_to_hub": True, "hub_strategy": "end"})
    made.train()
    assert hub.pushed == []
    made.save_model()
    assert len(hub.pushed) == 1


def test_a_checkpoint_holds_the_policy_where_transformers_looks_for_it(tmp_path: Path) -> None:
    made = trainer(tmp_path, changes=EVERY_UPDATE)
    made.train()
    ids = torch.tensor([[0, 6, 7]])

    loaded = PeftModel.from_pretrained(tiny.policy(), str(tmp_path / "checkpoint-3"))
    assert torch.allclose(loaded(ids).logits, made.model.policy(ids).logits, atol=1e-6)


# Evaluation --------------------------------------------------------------------------------------------


def test_several_data_sets_have_metrics_of_their_own(tmp_path: Path) -> None:
    sets = {"first": PROMPTS[:8], "last": PROMPTS[-8:]}
    made = trainer(tmp_path, eval_dataset=sets)
    metrics = made.evaluate()

    assert logged(made, "eval/first/scores") == [metrics["eval/first/scores"]]
    assert metrics["eval/first/reward/likes_seven"] == metrics["eval/first/scores"]
    assert metrics["eval/first/scores"] != metrics["eval/last/scores"]
    assert made.evaluate(PROMPTS[:8])["eval/scores"] == metrics["eval/first/scores"]


def test_an_evaluation_needs_prompts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluate\(\) has no prompts; give eval_dataset"):
        trainer(tmp_path).evaluate()


def test_scores_of_an_evaluation_are_with_the_penalty_too(tmp_path: Path) -> None:
    metrics = trainer(tmp_path, changes={"missing_eos_penalty": 5.0}).evaluate(PROMPTS[:16])

    assert 0 < metrics["eval/finished"] < 1
    expected = metrics["eval/reward/likes_seven"] - 5 * (1 - metrics["eval/finished"])
    assert metrics["eval/scores"] == pytest.approx(expected)


def test_an_evaluation_at_the_start_comes_before_the_first_update(tmp_path: Path) -> None:
    changes = {"eval_on_start": True, **EVERY_UPDATE}
    made = trainer(tmp_path, eval_dataset=PROMPTS[:8], changes=changes)
    made.train()
    resumed = trainer(tmp_path, eval_dataset=PROMPTS[:8], changes=changes)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-1")

    for run in (made, resumed):
        assert [entry["step"] for entry in run.state.log_history if "eval/scores" in entry] == [0]


# Sample completions ------------------------------------------------------------------------------------


def sampled(made: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[dict[str, Any]]]]:
    """The update and the samples of each time they are shown."""
    shown: list[tuple[int, list[dict[str, Any]]]] = []
    monkeypatch.setattr(made, "log_samples", lambda samples, update: shown.append((update, samples)))
    made.train()
    return shown


@pytest.mark.parametrize(
    ("times", "updates"),
    [
        (0, []),
        (1, [1]),
        (3, [1, 4, 6]),
        (4, [1, 3, 5, 7]),
        (7, list(range(1, 8))),
        (99, list(range(1, 8))),
    ],
)
def test_samples_are_shown_as_often_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, updates: list[int]
) -> None:
    changes = {"num_sample_generations": times, "total_episodes": 16 * 7, "num_ppo_epochs": 1}
    shown = sampled(trainer(tmp_path, changes=changes), monkeypatch)

    assert [update for update, _ in shown] == updates


def test_samples_are_of_the_evaluation_prompts_where_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"num_sample_generations": 1}
    ((_, of_training),) = sampled(trainer(tmp_path / "a", changes=changes), monkeypatch)
    sets = {"few": PROMPTS[:3], "more": PROMPTS[50:60]}
    ((_, held_out),) = sampled(trainer(tmp_path / "b", eval_dataset=sets, changes=changes), monkeypatch)

    assert [sample["prompt"] for sample in held_out] == [
        row["prompt"] for row in [*PROMPTS[:3], *PROMPTS[50:55]]
    ]
    assert [sample["kind"] for sample in held_out] == ["eval/few/greedy"] * 3 + ["eval/more/greedy"] * 5
    assert {sample["kind"] for sample in of_training} == {"train"}
    assert [sample["prompt"] for sample in of_training] != [sample["prompt"] for sample in held_out]


# Optimizers and callbacks ------------------------------------------------------------------------------


def test_an_optimizer_that_lacks_parameters_is_refused(tmp_path: Path) -> None:
    policy = tiny.policy()
    optimizer = torch.optim.AdamW(policy.parameters())

    with pytest.raises(
        ValueError, match=r"lacks 2 parameters .* value_head.weight, value_head.bias: give it"
    ):
        trainer(tmp_path, lora=False, model=policy, value_model=None, optimizers=(optimizer, None))


def test_an_optimizer_of_all_parameters_trains_them(tmp_path: Path) -> None:
    policy, critic = tiny.policy(), value_model()
    optimizer = torch.optim.SGD([*policy.parameters(), *critic.parameters()], lr=0.1)
    made = trainer(tmp_path, lora=False, model=policy, value_model=critic, optimizers=(optimizer, None))
    made.train()

    assert bool((critic.score.weight != 0).any())


class Counting(TrainerCallback, ExportableState):
    """A callback with a state, which looks at what it is handed."""

    def __init__(self, by: int = 1) -> None:
        self.by, self.count = by, 0
        self.seen: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **handed: Any) -> None:
        self.count += self.by
        self.seen = handed

    def state(self) -> dict[str, Any]:
        return {"args": {"by": self.by}, "attributes": {"count": self.count}}


def counting_of(made: Any) -> Counting:
    (found,) = (callback for callback in made.callback_handler.callbacks if isinstance(callback, Counting))
    return found


def test_callbacks_are_handed_model_optimizer_and_schedule(tmp_path: Path) -> None:
    made = trainer(tmp_path, callbacks=[Counting()])
    made.train()

    seen = counting_of(made).seen
    assert seen["optimizer"] is made.optimizer
    assert seen["lr_scheduler"] is made.lr_scheduler
    assert seen["model"] is made.model


@pytest.mark.parametrize(("asked", "counts"), [(True, 30), (False, 10)])
def test_the_state_of_callbacks_goes_on_where_asked(tmp_path: Path, asked: bool, counts: int) -> None:
    changes = {**EVERY_UPDATE, "restore_callback_states_from_checkpoint": asked}
    trainer(tmp_path, callbacks=[Counting(10)], changes=changes).train()
    resumed = trainer(tmp_path, callbacks=[Counting(10)], changes=changes)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-2")

    assert counting_of(resumed).count == counts


# Resuming ----------------------------------------------------------------------------------------------


def test_when_to_save_is_as_asked_now(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 2, "total_episodes": 16 * 6}
    trainer(tmp_path / "a", changes=changes).train()
    resumed = trainer(tmp_path / "b", changes={**changes, "save_steps": 3, "num_sample_generations": 1})
    resumed.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")

    assert {path.name for path in (tmp_path / "b").iterdir()} == {"checkpoint-3", "checkpoint-6"}


def likes_eight(batch: RewardBatch) -> list[float]:
    return [0.0] * len(batch)


def adapter(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **changes})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train_dataset": PROMPTS[::-1]}, "prompts: '100 rows, sha256 .* then"),
        (
            {"reward_model": likes_eight},
            "reward_weights: {'likes_seven': 1.0} then, {'likes_eight': 1.0} now",
        ),
        ({"reward_model": NamedReward("likes_seven", likes_seven, 2.0)}, "'likes_seven': 2.0} now"),
    ],
)
def test_a_run_with_other_prompts_or_rewards_does_not_go_on(
    tmp_path: Path, given: dict[str, Any], words: str
) -> None:
    trainer(tmp_path / "a", changes=EVERY_UPDATE).train()

    with pytest.raises(CheckpointMismatch, match=words):
        trainer(tmp_path / "b", **given).train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-1")


@pytest.mark.parametrize(
    ("changes", "given", "words"),
    [
        ({"bf16": True}, {}, "bf16: False then, True now"),
        ({"optim": "sgd"}, {}, "optim: '.*' then, 'sgd' now"),
        ({"lr_scheduler_type": "polynomial"}, {}, "lr_scheduler_type: 'linear' then, 'polynomial' now"),
        ({}, {"peft_config": adapter(r=2)}, r"peft_config\.r: 4 then, 2 now"),
        ({}, {"peft_config": adapter(lora_alpha=16)}, r"peft_config\.lora_alpha: 8 then, 16 now"),
        ({}, {"lora": False}, r"peft_config\.r: 4 then, None now"),
    ],
)
def test_a_run_with_other_arguments_does_not_go_on(
    tmp_path: Path, changes: dict[str, Any], given: dict[str, Any], words: str
) -> None:
    """Arguments that a spec has elsewhere, or not at all."""
    trainer(tmp_path / "a", changes={**EVERY_UPDATE, "total_episodes": 16}).train()
    other = trainer(tmp_path / "b", changes={**EVERY_UPDATE, "total_episodes": 16, **changes}, **given)

    with pytest.raises(CheckpointMismatch, match=words):
        other.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-1")


# The result --------------------------------------------------------------------------------------------


def test_the_result_holds_the_mean_loss_and_the_speed(tmp_path: Path) -> None:
    made = trainer(tmp_path, changes=EVERY_UPDATE)
    output = made.train()
    losses = [
        policy + 0.1 * value
        for policy, value in zip(logged(made, "loss/policy_avg"), logged(made, "loss/value_avg"), strict=True)
    ]

    assert output.global_step == 3
    assert output.training_loss == output.metrics["train_loss"] == pytest.approx(sum(losses) / 3)
    assert output.metrics["train_runtime"] > 0
    over = trainer(tmp_path, changes=EVERY_UPDATE).train(resume_from_checkpoint=True)
    assert math.isnan(over.training_loss)  # nothing was left to do


def test_a_checkpoint_of_another_kind_of_critic_is_refused_by_name(tmp_path: Path) -> None:
    made = trainer(tmp_path / "head")
    made.save_checkpoint(tmp_path / "checkpoint-0")
    other = trainer(tmp_path / "model", value_model=value_model())

    with pytest.raises(CheckpointMismatch, match="critic: 'head' then, 'model' now"):
        other.load_checkpoint(tmp_path / "checkpoint-0")
