"""What each role keeps in memory is what the plan says of it. Tensors weigh alike, so a CPU shows it as well.

What comes and goes beside them, activations and caches, is seen on a GPU only: in `test_gpu.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppo_engine import PPOTrainer, program
from ppo_engine.adapters import parameters_of
from ppo_engine.load import read_facts
from ppo_engine.plan import plan
from ppo_engine.rewards import ModelReward
from ppo_engine.run_dir import RunDir
from tests.engine import tiny
from tests.engine.test_program import finish
from tests.engine.training import PROMPTS, make_run

LORA = {"type": "lora", "r": 8}
METHODS: dict[str, dict[str, Any]] = {
    "lora, a head": {"method": LORA},
    "lora, an adapter for the value": {"method": {**LORA, "value": {"type": "adapter"}}},
    "lora, a reward adapter": {"method": LORA, "judged": True},
    "full, a model": {"method": {"type": "full"}},
    "full, a head": {"method": {"type": "full", "value": {"type": "head"}}},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_every_role_keeps_what_the_plan_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, precision: str
) -> None:
    run_dir = run_of(tmp_path, precision=precision, **METHODS[name])
    kept: list[dict[str, int]] = []
    build = program._trainer

    def watched(*given: Any) -> Any:
        made = build(*given)
        # After a step, and before its gradients go: then all is there.
        made.optimizer.optimizer.register_step_post_hook(lambda *_: kept.append(kept_by_role(made)))
        return made

    monkeypatch.setattr(program, "_trainer", watched)
    assert finish(run_dir).outcome == "succeeded"

    told = planned(run_dir)
    assert set(told) == set(kept[0])
    for role, size in told.items():
        assert [each[role] for each in kept] == [pytest.approx(size, rel=0.15)] * 4, role


def run_of(directory: Path, *, method: dict[str, Any], precision: str, judged: bool = False) -> RunDir:
    """A run of one update; its reward is a model, or an adapter on the policy's base."""
    tiny.save(tiny.policy(hidden_size=64, intermediate_size=128), tiny.tokenizer(), directory / "policy")
    tiny.save(tiny.reward_model(), tiny.tokenizer(), directory / "reward")
    model = {"type": "model", "name": "judge", "source": {"type": "local", "path": str(directory / "reward")}}
    given: dict[str, Any] = {"rewards": [model]}
    ppo: dict[str, Any] = {"total_episodes": 16}
    if judged:
        judge = tiny.save_judge(directory / "judge", hidden_size=64, intermediate_size=128)
        method = {**method, "adapters": {"judge": {"type": "local", "path": str(judge)}}}
        given["rewards"] = [{"type": "adapter", "name": "by_adapter"}]
        ppo["reward_adapter_name"] = "judge"
    given |= {"method": method, "resources": {"precision": precision}}
    return make_run(directory / "run", directory / "policy", ppo=ppo, **given)


def planned(run_dir: RunDir) -> dict[str, int]:
    """Bytes by role."""
    spec = run_dir.read_spec()
    memory = plan(spec, read_facts(spec, len(PROMPTS), {"train": set(PROMPTS[0])})).memory
    assert memory is not None
    return memory


def kept_by_role(made: PPOTrainer) -> dict[str, int]:
    """Bytes on the device that hold the weights of each role, gradients, and the optimizer's moments."""
    device, judge = made.parallel.device, made.args.reward_adapter_name
    rewards = [named.reward.model for named in made.collector.scorer.rewards if _is_model(named.reward)]
    value = set(made.model.critic_parameters())
    reward = {weight for model in rewards for weight in model.parameters()}
    if judge is not None:
        reward |= set(parameters_of(made.model.policy, judge).values())
    policy = set(made.model.parameters()) - value - reward
    reference = set() if made.reference is None else set(made.reference.parameters())
    moments = [
        part
        for state in made.optimizer.optimizer.state.values()
        for name, part in state.items()
        if name != "step"
    ]
    sizes = {
        "policy": _bytes(policy, device),
        "reference": _bytes(reference, device),
        "value": _bytes(value, device),
        "gradients": _bytes((it.grad for it in made.model.parameters() if it.grad is not None), device),
        "optimizer": _bytes(moments, device),
    }
    return sizes | ({"reward": _bytes(reward, device)} if reward else {})


def _is_model(reward: object) -> bool:
    return isinstance(reward, ModelReward)


def _bytes(tensors: Iterable[Tensor | nn.Parameter], device: torch.device) -> int:
    """Of the storages on a device; one that several tensors share counts once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor.device.type == device.type
    }
    return sum(storages.values())
