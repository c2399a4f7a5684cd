"""What a run weighs: the weights it trains, and the bytes its roles take, from a spec and facts.

Null where nothing is known of the model. This module loads nothing, and checks no rule.
"""

from __future__ import annotations

from ppo_engine.facts import Facts
from ppo_engine.role_rules import saved_modules, targeted
from ppo_engine.spec import (
    DEFAULT_ADAPTER,
    Full,
    Lora,
    RunSpec,
    ValueAdapter,
    ValueHead,
    critic,
    trained_from,
)

_FP32 = 4
_BF16 = 2
_ADAM_STATES = 2
_OPTIMIZER = {"none": "optimizer", "optimizer": "optimizer_off_gpu"}  # where its states lie


def parameters(spec: RunSpec, facts: Facts) -> tuple[int | None, int | None]:
    """Trained in all, and of them the policy's."""
    policy, value = _policy_trained(spec, facts), _value_trained(spec, facts)
    return None if policy is None or value is None else policy + value, policy


def memory(spec: RunSpec, facts: Facts) -> dict[str, int] | None:
    """Bytes by role.

    What is trained, its gradients and Adam's two moments, the reference that is copied from it, frozen
    adapters, and reward models are fp32; the frozen base under adapters has the run's precision. What is
    offloaded is told under a name of its own.
    """
    trained, policy = parameters(spec, facts)
    if facts.model is None or facts.model.parameters is None or trained is None or policy is None:
        return None
    base, frozen, reference = 0, 0, 0
    reward = sum(model.parameters or 0 for model in facts.rewards.values())
    if isinstance(spec.method, Lora):
        base = facts.model.parameters * (_BF16 if spec.resources.precision == "bf16" else _FP32)
        own = spec.ppo.model_adapter_name or DEFAULT_ADAPTER
        judge = spec.ppo.reward_adapter_name
        sizes = {name: adapter.parameters or 0 for name, adapter in facts.adapters.items() if name != own}
        reward += sizes.pop(judge, 0) if judge is not None else 0
        frozen = sum(sizes.values())
    else:
        reference = facts.model.parameters
    roles = {
        "policy": base + (policy + frozen) * _FP32,
        "reference": reference * _FP32,
        "value": (trained - policy) * _FP32,
        "gradients": trained * _FP32,
        _OPTIMIZER[spec.resources.offload]: trained * _FP32 * _ADAM_STATES,
    }
    if reward:
        roles["reward"] = reward * _FP32
    return roles


def _policy_trained(spec: RunSpec, facts: Facts) -> int | None:
    if facts.model is None:
        return None
    if isinstance(spec.method, Full):
        return facts.model.parameters
    start = trained_from(spec.method, spec.ppo)
    if start is not None and start in facts.adapters:
        return facts.adapters[start].parameters
    return _new_adapter(spec, facts)


def _new_adapter(spec: RunSpec, facts: Facts) -> int | None:
    """Weights of a new adapter as the spec describes it, and of the modules trained whole beside it."""
    if facts.model is None or not isinstance(spec.method, Lora):
        return None
    linears = facts.model.linears
    targets = targeted(spec.method.target_modules, linears)
    matrices = sum(spec.method.r * sum(linears[name]) for name in targets)
    return matrices + _trained_whole(spec, facts) if linears else None


def _trained_whole(spec: RunSpec, facts: Facts) -> int:
    """Weights of the modules that are trained whole beside the adapter."""
    if facts.model is None or not isinstance(spec.method, Lora):
        return 0
    start = trained_from(spec.method, spec.ppo)
    if start is not None and start in facts.adapters:
        return facts.adapters[start].whole
    modules = facts.model.modules
    return sum(modules[name] for name in saved_modules(spec.method.modules_to_save, modules))


def _value_trained(spec: RunSpec, facts: Facts) -> int | None:
    """A head on the policy has a bias; an own model is a trunk with the head of its class, which has none."""
    role = critic(spec)
    if role is None:
        return 0
    if isinstance(role, ValueHead | ValueAdapter):
        width = facts.model and facts.model.hidden_size
        adapter = _policy_trained(spec, facts) if isinstance(role, ValueAdapter) else 0
        whole = _trained_whole(spec, facts) if isinstance(role, ValueAdapter) else 0
        return width + 1 + adapter - whole if width and adapter is not None else None
    model = facts.model if role.source is None else facts.value
    if model is None or model.trunk_parameters is None or model.hidden_size is None:
        return None
    return model.trunk_parameters + model.hidden_size
