"""The GPU example: its spec is one that the engine takes, and fits the prompts its script writes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ppo_engine.facts import Facts
from ppo_engine.plan import plan
from ppo_engine.spec import RunSpec, parse
from service.uploads.rows import check_row
from tests.deploy.places import ROOT

EXAMPLE = ROOT / "examples" / "qwen"


@pytest.fixture(scope="module")
def spec() -> RunSpec:
    return parse(json.loads((EXAMPLE / "spec.json").read_text()))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, object]]]:
    directory: Path = tmp_path_factory.mktemp("qwen")
    subprocess.run([sys.executable, str(EXAMPLE / "prompts.py"), str(directory)], check=True)
    return {
        name: [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    }


def test_is_a_lora_run_of_the_hub_model_on_one_gpu(spec: RunSpec) -> None:
    assert spec.model.type == "hub"
    assert spec.model.repo == "Qwen/Qwen2.5-0.5B-Instruct"
    assert (spec.method.type, spec.resources.gpus, spec.resources.precision) == ("lora", 1, "bf16")


def test_can_be_planned_with_its_prompts(spec: RunSpec, prompts: dict[str, list[dict[str, object]]]) -> None:
    planned = plan(spec, Facts(prompts=len(prompts["train"])))
    assert (planned.batch_size, planned.num_total_batches, planned.optimizer_steps) == (128, 100, 800)
    assert planned.warnings == ()


def test_prompts_are_rows_the_service_takes_and_held_out_ones_are_new(
    prompts: dict[str, list[dict[str, object]]],
) -> None:
    for rows in prompts.values():
        assert [issue for row in rows for issue in check_row(row)] == []
    questions = {name: {str(row["messages"]) for row in rows} for name, rows in prompts.items()}
    assert questions["train"].isdisjoint(questions["heldout"])


def test_right_answers_earn_both_rewards(spec: RunSpec, prompts: dict[str, list[dict[str, object]]]) -> None:
    correct, number_only = spec.rewards
    assert correct.type == "string_check"
    assert number_only.type == "regex"
    for row in prompts["train"]:
        assert re.search(number_only.pattern, str(row[str(correct.column)]))


def test_readme_commands_fill_in_the_spec(spec: RunSpec) -> None:
    readme = (EXAMPLE / "README.md").read_text()
    assert spec.prompts.train == "TRAIN_FILE_ID"
    assert spec.prompts.eval == "HELDOUT_FILE_ID"
    assert re.search(r"sed .*TRAIN_FILE_ID.*HELDOUT_FILE_ID.*spec\.json", readme)
