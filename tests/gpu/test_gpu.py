"""On a GPU: bf16 trains, a run resumes, and memory is what the plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ppo_engine.facts import Facts
from ppo_engine.load import read_facts
from ppo_engine.plan import plan
from ppo_engine.run_dir import Control, RunDir
from tests.engine import tiny
from tests.engine.test_program import events, finish
from tests.engine.training import PROMPTS, make_run, trainer

pytestmark = pytest.mark.gpu

# Large enough that what is kept in memory is not what the allocator rounds up to.
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8}
METHODS: list[dict[str, Any]] = [{"type": "lora", "r": 64}, {"type": "full"}]


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("policy")
    tiny.save(tiny.policy(), tiny.tokenizer(), directory)
    return directory


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("large")
    tiny.save(tiny.policy(**LARGE), tiny.tokenizer(), directory)
    return directory


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["type"])
def test_bf16_trains_and_begins_at_the_reference(
    tmp_path: Path, policy_dir: Path, method: dict[str, Any]
) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir, method=method, resources={"precision": "bf16"})
    assert finish(run_dir).outcome == "succeeded"

    said = [event.data for event in events(run_dir) if event.type == "metrics"]
    assert said[0]["objective/kl"] == 0
    assert said[1]["objective/kl"] != 0
    assert [logs["optimizer_steps"] for logs in said] == [4.0] * 6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_losses_are_made_of_is_whole(tmp_path: Path, precision: str) -> None:
    made = trainer(tmp_path, changes={"use_cpu": False, "bf16": precision == "bf16"})
    seen: list[torch.dtype] = []
    losses = made.learner._losses

    def looks(experience: Any, *more: Any) -> Any:
        loss, sums = losses(experience, *more)
        parts = (experience.logprobs_BR, experience.advantages_BR, experience.returns_BR, loss, sums)
        seen.extend(part.dtype for part in parts)
        return loss, sums

    made.learner._losses = looks  # type: ignore[method-assign]
    made.train()
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["type"])
def test_a_paused_run_goes_on_to_its_end(tmp_path: Path, policy_dir: Path, method: dict[str, Any]) -> None:
    run_dir = make_run(tmp_path / "run", policy_dir, method=method, resources={"precision": "bf16"})
    run_dir.write_control(Control(wanted="pause"))
    paused = finish(run_dir)
    assert (paused.outcome, paused.update) == ("stopped", 1)

    run_dir.write_control(Control())
    assert finish(run_dir, attempt=2).outcome == "succeeded"
    file = next(run_dir.export(6).glob("*model.safetensors"))
    assert all(weight.isfinite().all() for weight in load_file(file).values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["type"])
def test_memory_is_what_the_plan_says(
    tmp_path: Path, large: Path, method: dict[str, Any], precision: str
) -> None:
    run_dir = make_run(
        tmp_path / "run",
        large,
        method=method,
        ppo={"total_episodes": 16},
        resources={"precision": precision},
    )
    planned = _planned(run_dir)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert finish(run_dir).outcome == "succeeded"

    # Responses of eight tokens: activations are small beside what is kept.
    used = torch.cuda.max_memory_allocated() - before
    assert used == pytest.approx(sum(planned.values()), rel=0.15), planned


def _planned(run_dir: RunDir) -> dict[str, int]:
    spec = run_dir.read_spec()
    facts: Facts = read_facts(spec, len(PROMPTS), {"train": set(PROMPTS[0])})
    memory = plan(spec, facts).memory
    assert memory is not None
    return memory
