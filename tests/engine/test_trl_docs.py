"""docs/migrating-from-trl.md is complete: every argument, every metric, every trap."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ppo_engine import PPOConfig
from tests.engine.test_config import OWN_DEFAULTS, TRL_DEFAULTS
from tests.engine.test_trl_traps import TRAPS
from tests.engine.training import PROMPTS, trainer

PAGE = (Path(__file__).parents[2] / "docs" / "migrating-from-trl.md").read_text()
TRL_METRICS = """
    eps objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores
    policy/approxkl_avg policy/clipfrac_avg loss/policy_avg loss/value_avg val/clipfrac_avg
    policy/entropy_avg val/ratio val/ratio_var val/num_eos_tokens lr episode
"""


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_cells(text: str) -> list[str]:
    """What the tables of a section are about; a cell may name several."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_each_argument_of_trl_and_of_ours_has_one_row() -> None:
    assert sorted(first_cells(section("Arguments"))) == sorted([*TRL_DEFAULTS, *OWN_DEFAULTS])
    for name in first_cells(section("Arguments")):
        assert name in PPOConfig.__dataclass_fields__, name


def test_each_metric_of_trl_has_one_row() -> None:
    assert sorted(first_cells(section("Metrics"))) == sorted(TRL_METRICS.split())


@pytest.mark.parametrize(
    "changes",
    [
        {"critic_warmup": 1, "early_stop_kl": 1e-6},
        {"advantage_estimator": "rloo", "num_return_sequences": 2},
    ],
)
def test_each_metric_that_is_logged_is_told(tmp_path: Path, changes: dict[str, object]) -> None:
    made = trainer(tmp_path, eval_dataset=PROMPTS[:3], changes={"total_episodes": 32, **changes})
    made.train()
    made.evaluate()
    logged = {
        name.replace("likes_seven", "NAME").replace("eval/greedy/", "eval/")
        for entry in made.state.log_history
        for name in entry
    }

    told = set(re.findall(r"`([^`]+)`", section("Metrics")))
    assert logged - {"epoch", "step"} <= told
    if "critic_warmup" in changes:
        assert set(TRL_METRICS.split()) <= logged


def test_each_trap_has_one_row() -> None:
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \|", section("Fixed traps"), re.MULTILINE)]

    assert numbers == list(TRAPS)
