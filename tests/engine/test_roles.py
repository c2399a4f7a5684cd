"""Four roles on one base: what each computes, what of it is trained, and that switching leaves no trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from ppo_engine import load_reward_adapter
from ppo_engine.__main__ import main
from ppo_engine.actor_critic import ActorCritic, TokenOutputs
from ppo_engine.adapters import VALUE_ADAPTER, parameters_of
from ppo_engine.batch import collate
from ppo_engine.issues import SpecError
from ppo_engine.rewards import ByAdapter, NamedReward
from ppo_engine.roles import add_value_adapter, build_policy, recompute_activations, reference_adapter
from ppo_engine.trainer import PPOTrainer
from tests.engine import tiny
from tests.engine.ranks import spoil, told
from tests.engine.training import PROMPTS, config, likes_seven, logged, make_run, trainer, value_model

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
ROWS = ([[0, 6, 7], [0, 8]], [[9, 10, 2, 1], [11]])
"""Prompts and responses; a pad token and an end stand in the text."""


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_judge(tmp_path_factory.mktemp("judge"))


def judged(judge: Path, **changes: Any) -> PeftModel:
    return load_reward_adapter(tiny.policy(**changes), judge, "judge")


def trained_on_one_base(directory: Path, judge: Path, **given: Any) -> PPOTrainer:
    """Policy, value, reward, and reference, each by an adapter."""
    model = judged(judge)
    model.add_adapter("sft", LORA)
    randomize(model, "sft")
    names = {"reward_adapter_name": "judge", "ref_adapter_name": "sft", "value_adapter": True}
    changes = {**names, **given.pop("changes", {})}
    return trainer(directory, **{"model": model, "reward_model": None, "changes": changes, **given})


def randomize(model: nn.Module, adapter: str) -> None:
    """Each adapter differently."""
    torch.manual_seed(len(adapter))
    for weight in parameters_of(model, adapter).values():
        nn.init.normal_(weight, std=0.2)


def with_value_adapter(*, recomputing: bool = False) -> ActorCritic:
    policy = build_policy(tiny.policy(attention_dropout=0.0), LORA, None)
    name = add_value_adapter(policy, "default")
    if recomputing:
        recompute_activations(policy, None)
    module = ActorCritic(policy, None, value_head=True, value_adapter=name)
    assert module.value_head is not None
    for adapter in ("default", VALUE_ADAPTER):
        randomize(policy, adapter)
    nn.init.normal_(module.value_head.weight)
    return module.train() if recomputing else module.eval()


def rows() -> list[Tensor]:
    batch = collate(*ROWS, [0, 1], 0)
    return [
        batch.input_ids_BT,
        batch.attention_mask_BT,
        batch.prompt_lengths_B,
        batch.response_lengths_B,
    ]


def outputs(module: ActorCritic, **asked: Any) -> TokenOutputs:
    found = module(*rows(), temperature=1.0, **asked)
    assert isinstance(found, TokenOutputs)
    return found


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}


# The value's own adapter -------------------------------------------------------------------------------


def test_the_value_is_computed_with_its_own_adapter() -> None:
    module = with_value_adapter()
    values_N = outputs(module).values_N
    assert isinstance(module.policy, PeftModel)

    module.policy.set_adapter(VALUE_ADAPTER)
    shared = ActorCritic(module.policy, None, value_head=True)
    shared.value_head = module.value_head
    expected_N = outputs(shared).values_N

    assert values_N is not None
    assert expected_N is not None
    torch.testing.assert_close(values_N, expected_N)


@pytest.mark.parametrize("critic_only", [False, True])
def test_the_values_gradient_reaches_its_adapter_and_not_the_policys(critic_only: bool) -> None:
    module = with_value_adapter()
    values_N = outputs(module, critic_only=critic_only).values_N
    assert values_N is not None
    values_N.sum().backward()  # type: ignore[no-untyped-call]

    own = {id(weight) for weight in module.critic_parameters()}
    reached = {name for name, weight in module.named_parameters() if weight.grad is not None}
    assert reached == {name for name, weight in module.named_parameters() if id(weight) in own}
    assert sum(VALUE_ADAPTER in name for name in reached) == len(parameters_of(module, VALUE_ADAPTER))


def test_layers_are_recomputed_with_the_adapter_of_their_forward() -> None:
    plain, recomputing = with_value_adapter(), with_value_adapter(recomputing=True)
    for module in (plain, recomputing):
        found = outputs(module)
        assert found.values_N is not None
        (found.logprobs_N.sum() + 3 * found.values_N.square().sum()).backward()  # type: ignore[no-untyped-call]

    expected, own = gradients(plain), gradients(recomputing)
    assert expected.keys() == own.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(own[name], gradient, msg=name)


def test_the_value_adapter_has_the_policys_shape_on_the_trunk_alone() -> None:
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "lm_head"], use_rslora=True)
    policy = build_policy(get_peft_model(tiny.policy(), lora), None, None)
    add_value_adapter(policy, "default")

    names = set(parameters_of(policy, VALUE_ADAPTER))
    shaped = {name.replace(VALUE_ADAPTER, "default") for name in names}
    assert shaped == {name for name in parameters_of(policy, "default") if "lm_head" not in name}
    for name, weight in parameters_of(policy, VALUE_ADAPTER).items():
        assert weight.shape == policy.get_parameter(name.replace(VALUE_ADAPTER, "default")).shape
    assert policy.peft_config["default"].exclude_modules is None


def test_the_value_adapter_is_trained_and_resumed_but_not_exported(tmp_path: Path) -> None:
    changes = {"value_adapter": True, "save_strategy": "steps", "save_steps": 1, "critic_learning_rate": 1e-2}
    whole = trainer(tmp_path, changes=changes)
    start = {name: weight.clone() for name, weight in parameters_of(whole.model, VALUE_ADAPTER).items()}
    whole.train()
    resumed = trainer(tmp_path, changes=changes)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-1")

    for name, weight in parameters_of(whole.model, VALUE_ADAPTER).items():
        assert not torch.equal(weight, start[name])
        assert torch.equal(weight, resumed.model.get_parameter(name))
    saved = json.loads((tmp_path / "checkpoint-3" / "adapter_config.json").read_text())
    assert saved["r"] == 4
    for file in (tmp_path / "checkpoint-3").glob("adapter_*"):
        assert VALUE_ADAPTER.encode() not in file.read_bytes()


def refused(error: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "given", "told"),
    [
        ({}, {"value_model": value_model}, "value_model, which is another critic"),
        (
            {"advantage_estimator": "reinforce++"},
            {},
            'advantage_estimator "reinforce++", which has no critic',
        ),
        ({}, {"peft_config": lambda: None}, "full fine-tuning, which has no adapters"),
        ({}, {"peft_config": lambda: IA3Config(task_type="CAUSAL_LM")}, "without a LoRA on the policy"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            {},
            "needs use_reentrant false",
        ),
    ],
)
def test_a_value_adapter_without_a_place_is_refused(
    tmp_path: Path, changes: dict[str, Any], given: dict[str, Any], told: str
) -> None:
    made = {name: make() for name, make in given.items()}
    changes = {**changes, "value_adapter": True}
    assert told in refused(ValueError, lambda: trainer(tmp_path, changes=changes, **made))


def test_an_adapter_that_changes_prompts_is_refused(tmp_path: Path) -> None:
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    told = refused(ValueError, lambda: trainer(tmp_path, peft_config=prompts))
    assert "changes prompts, not layers; give a LoraConfig" in told


# The reward adapter ------------------------------------------------------------------------------------


def test_a_reward_adapter_scores_as_its_classifier_does(judge: Path) -> None:
    policy = build_policy(judged(judge), LORA, None)
    randomize(policy, "default")
    module = ActorCritic(policy.eval(), None, value_head=False, reward_adapter="judge")
    with torch.no_grad():
        scores_B = module(*rows(), of_reward=True)

    classifier = PeftModel.from_pretrained(tiny.classifier(), str(judge)).eval()
    for prompt, response, score in zip(*ROWS, scores_B, strict=True):
        expected = classifier(torch.tensor([prompt + response])).logits
        torch.testing.assert_close(score, expected[0, 0])


def test_the_reward_adapter_joins_the_other_rewards_and_stays(tmp_path: Path, judge: Path) -> None:
    model = judged(judge)
    before = {name: weight.clone() for name, weight in parameters_of(model, "judge").items()}
    changes = {
        "reward_adapter_name": "judge",
        "total_episodes": 16,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    made = trainer(tmp_path, model=model, reward_model=likes_seven, changes=changes, eval_dataset=PROMPTS[:3])
    made.train()
    made.save_model(str(tmp_path / "out"))

    metrics = {name: logged(made, f"{name}")[0] for name in ("reward/adapter", "reward/likes_seven")}
    assert logged(made, "objective/scores")[0] == pytest.approx(sum(metrics.values()), abs=1e-6)
    assert logged(made, "eval/reward/adapter")
    for name, weight in before.items():
        assert torch.equal(model.get_parameter(name), weight)
        assert not model.get_parameter(name).requires_grad
    assert len(before) == 9  # A and B of two modules in two layers, and the head
    assert not any("judge" in path.name or "score" in path.name for path in (tmp_path / "out").iterdir())


def test_a_script_names_and_weighs_a_reward_adapter(tmp_path: Path, judge: Path) -> None:
    changes = {"reward_adapter_name": "judge", "total_episodes": 16}
    reward = [NamedReward("taste", ByAdapter(), -0.5)]
    made = trainer(tmp_path, model=judged(judge), reward_model=reward, changes=changes)
    made.train()
    scored = logged(made, "reward/taste")[0]
    assert logged(made, "objective/scores")[0] == pytest.approx(-0.5 * scored)


def test_a_score_that_is_no_number_stops_the_run(tmp_path: Path, judge: Path) -> None:
    model = judged(judge)
    nn.init.constant_(model.reward_heads["judge"].weight, float("nan"))
    made = trainer(tmp_path, model=model, reward_model=None, changes={"reward_adapter_name": "judge"})
    assert 'Reward "adapter" gave nan for row 0' in refused(ValueError, made.train)


def test_a_reward_adapter_without_a_head_or_place_is_refused(tmp_path: Path, judge: Path) -> None:
    def made(name: str | None, trained: str | None = None, **given: Any) -> Callable[[], object]:
        changes = {"reward_adapter_name": name, "model_adapter_name": trained}
        return lambda: trainer(tmp_path, changes=changes, **given)

    headless = get_peft_model(tiny.policy(), LORA)
    headless.add_adapter("judge", LORA)
    told = refused(ValueError, made("judge", model=headless, peft_config=None))
    assert "ppo_engine.load_reward_adapter(model, directory, 'judge')" in told
    told = refused(ValueError, made("judge", "judge", model=judged(judge), peft_config=None))
    assert "also the adapter that is trained" in told
    assert "the policy has the adapters ['default']" in refused(ValueError, made("judge"))
    told = refused(TypeError, made(None, model=judged(judge), reward_model=None))
    assert "NoneType given as a reward" in told
    by_none = [likes_seven, NamedReward("taste", ByAdapter())]
    assert "name the adapter in reward_adapter_name" in refused(
        ValueError, made(None, model=judged(judge), reward_model=by_none)
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": 32}, "of 32 x 16; the model has one of 32 x 32: it was trained for another base"),
        ({"num_hidden_layers": 1}, "changes model.layers.1."),
    ],
)
def test_a_reward_adapter_of_another_base_is_refused(judge: Path, changes: dict[str, Any], told: str) -> None:
    assert told in refused(SpecError, lambda: judged(judge, **changes))


# Switching ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ref_adapter_name", [None, "sft"])
def test_what_fails_inside_the_reference_leaves_no_trace(
    tmp_path: Path, judge: Path, ref_adapter_name: str | None
) -> None:
    made = trained_on_one_base(tmp_path, judge, changes={"ref_adapter_name": ref_adapter_name})
    before = told(made)
    with suppress(OSError), made.null_ref_context():
        assert told(made) != before
        spoil(made)
    assert told(made) == before


def test_what_fails_inside_the_values_forward_leaves_no_trace() -> None:
    module = with_value_adapter()
    assert module.value_head is not None
    expected_N = outputs(module).logprobs_N
    hook = module.policy.get_base_model().model.norm.register_forward_hook(Planted(times=1))
    with pytest.raises(OSError, match="planted"):
        outputs(module)
    hook.remove()
    assert torch.equal(outputs(module).logprobs_N, expected_N)


class Planted:
    """Fails at a call after so many that do not."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self, *_: object) -> None:
        self.times -= 1
        if self.times < 0:
            raise OSError("planted")


def test_the_reference_is_the_base_or_the_adapter_named(tmp_path: Path, judge: Path) -> None:
    policy = build_policy(judged(judge), LORA, None)
    assert isinstance(policy, PeftModel)
    randomize(policy, "default")
    ids = torch.tensor([[0, 6, 7, 8]])
    for name in (None, "judge"):
        with reference_adapter(policy.eval(), name):
            inside = policy(ids).logits
        policy.set_adapter(name or "default")
        if name is None:
            with policy.disable_adapter():
                expected = policy(ids).logits
        else:
            expected = policy(ids).logits
        assert torch.equal(inside, expected)
        policy.set_adapter("default")


CRITICS: dict[str, dict[str, Any]] = {
    "head": {},
    "adapter": {"changes": {"value_adapter": True}},
    "model": {"value_model": value_model},
    "none": {"changes": {"advantage_estimator": "reinforce++"}},
}


@pytest.mark.parametrize("kind", CRITICS)
def test_every_critic_goes_with_a_reference_and_a_reward_by_adapters(
    tmp_path: Path, judge: Path, kind: str
) -> None:
    given = dict(CRITICS[kind])
    if "value_model" in given:
        given["value_model"] = given["value_model"]()
    changes = {"value_adapter": False, "total_episodes": 32, **given.pop("changes", {})}
    made = trained_on_one_base(tmp_path, judge, changes=changes, **given)
    made.train()
    first, second = logged(made, "objective/kl")
    assert first == pytest.approx(0, abs=1e-5)
    assert second != 0
    assert logged(made, "reward/adapter")


def test_a_decoder_of_another_architecture_can_be_the_critic(tmp_path: Path) -> None:
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "pad_token_id": 1}
    shape = GPT2Config(vocab_size=len(tiny.WORDS), n_positions=32, num_labels=1, **sizes)
    made = trainer(tmp_path, value_model=GPT2ForSequenceClassification(shape))
    made.train()
    first, *_, last = logged(made, "loss/value_avg")
    assert last != first
    small = GPT2ForSequenceClassification(GPT2Config(vocab_size=10, n_positions=32, num_labels=1, **sizes))
    told = refused(SpecError, lambda: trainer(tmp_path, value_model=small))
    assert "10 ids given; the policy has 16" in told
    told = refused(ValueError, lambda: trainer(tmp_path, value_model=tiny.encoder_reward_model()))
    assert "score head has None outputs" in told


def test_one_base_serves_all_four_roles(tmp_path: Path, judge: Path) -> None:
    made = trained_on_one_base(tmp_path, judge)
    storages = {
        weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes()
        for module in (made.model, *filter(None, [made.reference, made.ref_model]))
        for weight in module.parameters()
    }
    base = sum(weight.nbytes for weight in tiny.policy().parameters())
    adapters = ("default", VALUE_ADAPTER, "judge", "sft")
    own = sum(weight.nbytes for name in adapters for weight in parameters_of(made.model, name).values())
    head = 4 * (16 + 1)
    assert sum(storages.values()) == base + own + head


# The program -------------------------------------------------------------------------------------------


def test_a_program_trains_four_roles_on_one_base(tmp_path: Path, policy_dir: Path, judge: Path) -> None:
    rewards = [
        {"type": "adapter", "name": "taste", "weight": 0.5},
        {"type": "regex", "name": "seven", "pattern": "seven"},
    ]
    method = {"type": "lora", "r": 4, "value": {"type": "adapter"}}
    run_dir = make_run(
        tmp_path / "run",
        policy_dir,
        ppo={"total_episodes": 32, "reward_adapter_name": "judge", "save_steps": 1},
        rewards=rewards,
        method={**method, "adapters": {"judge": {"type": "local", "path": str(judge)}}},
    )
    assert main([str(run_dir.path)]) == 0

    said = [json.loads(line) for line in run_dir.events.read_text().splitlines()]
    metrics = [event["data"] for event in said if event["type"] == "metrics"]
    assert len(metrics) == 2
    for update in metrics:
        score = 0.5 * update["reward/taste"] + update["reward/seven"]
        assert update["objective/scores"] == pytest.approx(score, abs=1e-5)


def test_values_other_than_the_configs_default_belong_to_a_run(tmp_path: Path) -> None:
    assert not config(tmp_path).value_adapter
    identity = trainer(tmp_path, changes={"value_adapter": True})._run_identity()
    assert identity["value_adapter"] is True
