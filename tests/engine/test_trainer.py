"""The trainer as a script uses it: it learns, counts right, keeps roles apart, and saves the policy alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ppo_engine.actor_critic import causal_lm
from ppo_engine.batch import collate
from ppo_engine.checkpoint import CheckpointMismatch
from ppo_engine.draws import Purpose
from ppo_engine.issues import SpecError
from ppo_engine.learn import NotFinite
from ppo_engine.rewards import NamedReward, RewardBatch, RewardError
from tests.engine import tiny
from tests.engine.training import PROMPTS, likes_seven, logged, trainer


@pytest.mark.parametrize("lora", [True, False])
def test_it_learns_and_stays_itself(tmp_path: Path, lora: bool) -> None:
    changes = {"total_episodes": 16 * 25, "learning_rate": 1e-2, "kl_coef": 0.0, "stop_token_id": None}
    trained = trainer(tmp_path, lora=lora, changes=changes)
    trained.train()

    scores = logged(trained, "objective/scores")
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.3, scores
    assert logged(trained, "optimizer_steps") == [4.0] * 25
    assert logged(trained, "objective/kl")[0] == pytest.approx(0, abs=1e-5)
    assert logged(trained, "objective/kl")[-1] > 0
    assert logged(trained, "episode")[-1] == 16 * 25


def test_a_pass_takes_every_prompt_once(tmp_path: Path) -> None:
    seen: list[str] = []

    def look(batch: RewardBatch) -> list[float]:
        seen.extend(batch.prompts)
        return [0.0] * len(batch)

    trainer(
        tmp_path,
        reward_model=look,
        train_dataset=PROMPTS[:48],
        changes={"total_episodes": None, "num_train_epochs": 1},
    ).train()
    assert sorted(seen) == sorted(row["prompt"] for row in PROMPTS[:48])


def test_before_the_first_step_the_ratio_is_one(tmp_path: Path) -> None:
    trained = trainer(tmp_path, changes={"num_ppo_epochs": 1, "num_mini_batches": 1, "total_episodes": 16})
    trained.train()

    assert logged(trained, "val/ratio") == [pytest.approx(1.0, abs=1e-6)]
    assert logged(trained, "policy/approxkl_avg") == [pytest.approx(0.0, abs=1e-10)]
    assert logged(trained, "policy/clipfrac_avg") == [0.0]


def test_scored_log_probabilities_are_those_of_sampling(tmp_path: Path) -> None:
    """Cached, left-padded, shrinking generation and the right-padded training forward agree."""
    made = trainer(tmp_path, changes={"temperature": 0.7})
    prompts = made.prompts[:6]
    rollout = made._sample(prompts, 1, Purpose.ROLLOUT, 0.7)
    logprobs_BR, _ = made.learner.score(made.model_wrapped, rollout, with_value=True)

    for row, prompt in enumerate(prompts):
        ids = [*prompt.ids, *rollout.response_ids[row]]
        with torch.no_grad():
            logits = causal_lm(made.model.policy)(torch.tensor([ids])).logits[0].float() / 0.7
        expected = [
            logits[position - 1].log_softmax(-1)[ids[position]]
            for position in range(len(prompt.ids), len(ids))
        ]
        length = len(rollout.response_ids[row])
        assert torch.allclose(logprobs_BR[row, :length], torch.stack(expected), atol=1e-5)
        assert bool((logprobs_BR[row, length:] == 0).all())


def test_micro_batches_do_not_change_the_run(tmp_path: Path) -> None:
    one = trainer(
        tmp_path / "a", changes={"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    )
    many = trainer(
        tmp_path / "b", changes={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}
    )
    one.train()
    many.train()

    for name in ("objective/scores", "loss/policy_avg", "loss/value_avg", "policy/grad_norm"):
        assert logged(one, name) == pytest.approx(logged(many, name), rel=1e-4, abs=1e-6), name


def test_gradients_are_clipped(tmp_path: Path) -> None:
    """With a tiny norm allowed, Adam's first moment is tiny; the norm that is reported is the true one."""
    made = trainer(tmp_path, changes={"max_grad_norm": 1e-6, "total_episodes": 16})
    made.train()

    moments = [state["exp_avg"].abs().max() for state in made.optimizer.state.values()]
    assert max(moments) < 1e-6
    assert logged(made, "policy/grad_norm")[0] > 1e-3


def test_dropout_is_off_everywhere(tmp_path: Path) -> None:
    made = trainer(tmp_path, lora=False)
    assert made.model.policy.config.attention_dropout == 0.3  # as it was, for the export

    batch = collate([[0, 6, 7]], [[8, 9]], [0], 0)
    made.model.train()
    outputs = [
        made.model(
            batch.input_ids_BT,
            batch.attention_mask_BT,
            batch.prompt_lengths_B,
            batch.response_lengths_B,
            temperature=1.0,
        )
        for _ in range(2)
    ]
    assert torch.equal(outputs[0].logprobs_N, outputs[1].logprobs_N)


def test_recomputing_activations_changes_nothing(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a", changes={"total_episodes": 16})
    saving = trainer(tmp_path / "b", changes={"total_episodes": 16, "gradient_checkpointing": True})
    plain.train()
    saving.train()

    assert any(getattr(m, "gradient_checkpointing", False) and m.training for m in saving.model.modules())
    assert logged(plain, "policy/grad_norm") == pytest.approx(logged(saving, "policy/grad_norm"), rel=1e-5)


# Roles -------------------------------------------------------------------------------------------------


def state_of(policy: PeftModel) -> tuple[Any, ...]:
    return (
        list(policy.active_adapters),
        [parameter.requires_grad for parameter in policy.parameters()],
        [module.training for module in policy.modules()],
    )


def test_the_reference_context_gives_back_everything(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.train()
    policy, ids = made.model.policy, torch.tensor([[0, 6, 7]])
    before = state_of(policy)
    moved = policy(ids).logits
    base = tiny.policy().eval()(ids).logits

    with made.null_ref_context():
        inside = policy(ids).logits
    assert torch.allclose(inside, base, atol=1e-5)
    assert not torch.allclose(moved, base, atol=1e-3)

    def fail_inside() -> None:
        with made.null_ref_context():
            policy.train()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_inside()
    assert state_of(policy) == before
    assert torch.equal(policy(ids).logits, moved)


def two_adapters() -> PeftModel:
    """A policy with an adapter "sft" that does something, and a new one, "ppo"."""
    lora = LoraConfig(r=4, target_modules="all-linear")
    policy = get_peft_model(tiny.policy(), lora, adapter_name="sft")
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    policy.add_adapter("ppo", lora)
    return policy


def test_a_named_reference_adapter_stays_and_the_model_adapter_moves(tmp_path: Path) -> None:
    policy = two_adapters()
    start = {name: weight.clone() for name, weight in policy.state_dict().items()}
    ids = torch.tensor([[0, 6, 7]])
    policy.set_adapter("sft")
    policy.eval()
    sft = policy(ids).logits.detach()
    made = trainer(
        tmp_path,
        model=policy,
        peft_config=None,
        changes={"model_adapter_name": "ppo", "ref_adapter_name": "sft"},
    )
    made.train()

    with made.null_ref_context():
        assert torch.allclose(policy(ids).logits, sft, atol=1e-5)
    changed = {name for name, weight in policy.state_dict().items() if not torch.equal(weight, start[name])}
    assert changed
    assert all(".ppo." in name for name in changed)
    assert policy.active_adapters == ["ppo"]
    assert logged(made, "objective/kl")[0] != 0  # the new adapter does not start as "sft"


def test_full_fine_tuning_moves_policy_and_value_and_not_the_reference(tmp_path: Path) -> None:
    made = trainer(tmp_path, lora=False)
    reference = copy.deepcopy(made.reference)
    start = copy.deepcopy(made.model.state_dict())
    made.train()

    assert made.reference is not None
    assert reference is not None
    for name, weight in reference.state_dict().items():
        assert torch.equal(weight, made.reference.state_dict()[name])
    moved = {name for name, weight in made.model.state_dict().items() if not torch.equal(weight, start[name])}
    assert any(name.startswith("policy.") for name in moved)
    assert any(name.startswith("value_model.") for name in moved)


def test_with_lora_only_adapter_and_value_head_are_trained(tmp_path: Path) -> None:
    made = trainer(tmp_path)

    trained = {name for name, parameter in made.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or name.startswith("value_head.") for name in trained)
    assert "value_head.weight" in trained
    count = sum(len(group["params"]) for group in made.optimizer.param_groups)
    assert count == len(trained)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"train_dataset": None}, ValueError, "train_dataset"),
        ({"train_dataset": []}, SpecError, "total_episodes|No rows"),
        ({"peft_config": {"r": 4}}, TypeError, "PeftConfig"),
        ({"reward_model": []}, ValueError, "reward"),
        ({"reward_model": 3}, TypeError, "callable"),
        ({"value_model": tiny.policy()}, SpecError, "value_model: A LlamaForCausalLM given .* one number"),
        (
            {"value_model": tiny.reward_model(labels=2)},
            SpecError,
            "value_model: .* score head has 2 outputs; a value is one number",
        ),
        (
            {"reward_model": tiny.reward_model(labels=2)},
            SpecError,
            "reward_model: A model with 2 labels given; a reward is one number",
        ),
        (
            {
                "reward_model": [likes_seven, tiny.reward_model(pad_token_id=None)],
                "processing_class": tiny.tokenizer(pad=None),
            },
            SpecError,
            "reward_model.1: A model without a padding token given",
        ),
        (
            {"changes": {"metric_for_best_model": "reward/eight"}},
            SpecError,
            'metric_for_best_model: "reward/eight" given; .*"reward/likes_seven"',
        ),
        (
            {"changes": {"advantage_estimator": "rloo"}},
            SpecError,
            'num_return_sequences: 1 given with advantage_estimator "rloo"',
        ),
        ({"changes": {"ref_adapter_name": "sft"}}, ValueError, "ref_adapter_name.*sft"),
        ({"changes": {"stop_token": "eos"}}, SpecError, "stop_token_id"),
        ({"changes": {"response_length": 40}}, SpecError, "response_length.*32 positions"),
        ({"changes": {"response_length": 31}}, SpecError, "train_dataset.*Row 1"),
        ({"changes": {"eval_strategy": "steps", "eval_steps": 1}}, SpecError, "eval_dataset.*eval_strategy"),
        ({"changes": {"eval_on_start": True}}, SpecError, "eval_dataset.*eval_on_start"),
        ({"processing_class": tiny.tokenizer(pad=None, eos=None)}, SpecError, "model.*neither a pad token"),
        (
            {"peft_config": LoraConfig(target_modules=["q_proj", "c_attn"])},
            SpecError,
            'peft_config.target_modules.0: "c_attn" given; llama has the linear modules .*"q_proj"',
        ),
        (
            {"value_model": tiny.reward_model(vocab_size=8)},
            SpecError,
            "value_model: A model with 8 ids given",
        ),
    ],
)
def test_a_wrong_argument_says_so(
    tmp_path: Path, given: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = given.get("model", tiny.policy())
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(error, match=words):
        trainer(tmp_path, model=model, **{"changes": {"total_episodes": None}, **given})
    if error is SpecError and "Row 1" not in words:
        assert [(name, type(module)) for name, module in model.named_modules()] == before, "not touched yet"


def test_the_policy_cannot_be_its_own_reference(tmp_path: Path) -> None:
    model = tiny.policy()

    with pytest.raises(ValueError, match="same object"):
        trainer(tmp_path, lora=False, model=model, ref_model=model)


# Rewards -----------------------------------------------------------------------------------------------


def dense(batch: RewardBatch) -> list[list[float]]:
    return [[float(token == 12) for token in ids] for ids in batch.response_ids]


def by_column(batch: RewardBatch) -> list[float]:
    return [
        float(columns["first"] in response.split())
        for columns, response in zip(batch.columns, batch.responses, strict=True)
    ]


def test_several_weighted_rewards_and_columns(tmp_path: Path) -> None:
    rewards = [NamedReward("first", by_column, 2.0), NamedReward("dense", dense, -1.0), likes_seven]
    made = trainer(tmp_path, reward_model=rewards)
    made.train()

    for entry in made.state.log_history:
        total = 2 * entry["reward/first"] - entry["reward/dense"] + entry["reward/likes_seven"]
        assert entry["objective/scores"] == pytest.approx(total)


def test_a_reward_model_that_shares_the_tokenizer(tmp_path: Path) -> None:
    made = trainer(tmp_path, reward_model=tiny.reward_model())
    made.train()

    scores = logged(made, "objective/scores")
    assert all(score == score and score != 0 for score in scores)


def test_a_failing_reward_stops_the_run_with_its_name(tmp_path: Path) -> None:
    def broken(batch: RewardBatch) -> list[float]:
        raise OSError("the disk is on fire")

    with pytest.raises(RewardError, match=r"broken.*the disk is on fire"):
        trainer(tmp_path, reward_model=broken).train()


def test_steps_that_are_not_finite_are_not_taken(tmp_path: Path) -> None:
    made = trainer(tmp_path, lora=False, changes={"learning_rate": 1e-3})
    start = copy.deepcopy(made.model.state_dict())
    for parameter in made.model.value_model.score.parameters():
        parameter.register_hook(lambda gradient: gradient * float("nan"))

    with pytest.raises(NotFinite, match="3 optimizer steps"):
        made.train()
    assert all(torch.equal(weight, start[name]) for name, weight in made.model.state_dict().items())


def test_the_stop_penalty_is_for_the_stop_token(tmp_path: Path) -> None:
    free = trainer(tmp_path / "a", changes={"total_episodes": 16})
    fined = trainer(tmp_path / "b", changes={"total_episodes": 16, "missing_eos_penalty": 5.0})
    free.train()
    fined.train()

    share = logged(free, "response/finished")[0]
    assert 0 < share < 1
    for name in ("objective/scores", "objective/rlhf_reward"):  # with the penalty, as in TRL
        assert logged(fined, name)[0] == pytest.approx(logged(free, name)[0] - 5 * (1 - share), abs=1e-6)
    assert logged(free, "reward/likes_seven") == logged(fined, "reward/likes_seven")  # the reward itself
    assert logged(free, "loss/value_avg")[0] < logged(fined, "loss/value_avg")[0]


# Saving and resuming -----------------------------------------------------------------------------------


def test_an_adapter_is_saved_alone_and_loads_with_peft(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.train()
    made.save_model(str(tmp_path / "out"))

    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert weights
    assert all("lora_" in name for name in weights)
    assert not list(tmp_path.glob("out/*.pt")) + list(tmp_path.glob("out/*.bin"))
    ids = torch.tensor([[0, 6, 7]])
    loaded = PeftModel.from_pretrained(tiny.policy(), str(tmp_path / "out"))
    assert torch.allclose(loaded(ids).logits, made.model.policy(ids).logits, atol=1e-6)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == made.stop_token_id


def test_an_adapter_of_another_name_is_saved_at_the_root(tmp_path: Path) -> None:
    made = trainer(tmp_path, changes={"model_adapter_name": "ppo"})
    made.save_model(str(tmp_path / "out"))

    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "ppo").exists()
    PeftModel.from_pretrained(tiny.policy(), str(tmp_path / "out"))


def test_a_full_model_is_saved_alone_and_loads(tmp_path: Path) -> None:
    made = trainer(tmp_path, lora=False)
    made.train()
    made.save_model(str(tmp_path / "out"))

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[0, 6, 7]])
    assert torch.allclose(loaded(ids).logits, made.model.policy(ids).logits, atol=1e-6)
    assert not any(
        "score" in name or "value" in name for name in load_file(tmp_path / "out" / "model.safetensors")
    )
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["use_cache"] is True
    assert saved["attention_dropout"] == 0.3


@pytest.mark.parametrize("lora", [True, False])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, lora: bool) -> None:
    changes = {"save_strategy": "steps", "save_steps": 1, "total_episodes": 64}
    whole = trainer(tmp_path / "whole", lora=lora, changes=changes)
    whole.train()
    resumed = trainer(tmp_path / "resumed", lora=lora, changes=changes)
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")

    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    assert logged(whole, "objective/kl") == logged(resumed, "objective/kl")


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path / "a", changes=changes).train()
    other = trainer(tmp_path / "b", changes={**changes, "gamma": 0.9})

    with pytest.raises(CheckpointMismatch, match=r"gamma: 1\.0 then, 0\.9 now"):
        other.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-1")


def test_old_checkpoints_go_only_beyond_the_limit(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "total_episodes": 64}
    made = trainer(tmp_path, changes=changes)
    made.train()

    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]


def test_evaluation_runs_when_asked_and_draws_alike(tmp_path: Path) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 2, "total_episodes": 64, "learning_rate": 1e-9}
    made = trainer(tmp_path, eval_dataset=PROMPTS[:10], changes=changes)
    made.train()

    assert len(logged(made, "eval/scores")) == 2
    assert logged(made, "eval/scores")[0] == logged(made, "eval/scores")[1]


@pytest.mark.parametrize("name", ["batch_size", "mini_batch_size", "world_size", "num_total_batches"])
def test_a_derived_argument_may_only_say_what_is_derived(tmp_path: Path, name: str) -> None:
    right = {"batch_size": 16, "mini_batch_size": 8, "world_size": 1, "num_total_batches": 3}[name]

    trainer(tmp_path, changes={name: right})
    with pytest.raises(SpecError, match=rf"{name}: {right + 1} given; it is derived, and is {right}"):
        trainer(tmp_path, changes={name: right + 1})


def test_the_last_update_is_always_logged(tmp_path: Path) -> None:
    made = trainer(tmp_path, changes={"logging_steps": 2, "total_episodes": 48})
    made.train()
    assert [entry["step"] for entry in made.state.log_history] == [2, 3]

    silent = trainer(tmp_path, changes={"logging_strategy": "no", "total_episodes": 16})
    silent.train()
    assert silent.state.log_history == []
