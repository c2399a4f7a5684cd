"""The benchmark's own parts: turns, failures, ratios within rounds, responses that end, the floor."""

import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import floor, report, training, workload
from benchmarks.cells import GRID, GROWTH, STANDARD, Comparison, Contender
from ppo_engine.draws import Purpose
from ppo_engine.rollout.generate import generate
from ppo_engine.rollout.sampling import row_uniforms

SIZE = workload.Size("tiny", vocabulary=64, hidden=16, layers=1, heads=2, intermediate=32)
OURS = Contender("Proxima", "proxima", "lora-head")
COMPARISON = Comparison("tiny LoRA", SIZE, (OURS,), rounds=2, batch=8, response=6)
INTERPRETERS = {"proxima": sys.executable}


def row(label: str, *seconds: float, peak_mib: int = 100, text: int = 300) -> training.Row:
    rollouts = [{"seconds": 0.5, "response_tokens": 200, "text_tokens": text} for _ in seconds]
    contender = Contender(label, "proxima", "full")
    return training.Row(
        COMPARISON, contender, list(seconds), rollouts, matrix_rate=1e9, peak_rss_bytes=peak_mib * 2**20
    )


def test_a_trainer_does_its_updates_in_a_process_of_its_own(tmp_path: Path) -> None:
    workload.make(SIZE, tmp_path / SIZE.name)
    (measured,) = training.compare(COMPARISON, INTERPRETERS, tmp_path, deadline=time.monotonic() + 600)
    assert measured.failure is None
    assert len(measured.seconds) == len(measured.phases) == COMPARISON.rounds
    assert measured.peak_rss_bytes > 50 * 2**20
    assert measured.versions["torch"]
    for seconds, rollout, phases in zip(measured.seconds, measured.rollouts, measured.phases, strict=True):
        assert 0 < rollout["response_tokens"] <= 8 * 6
        assert rollout["response_tokens"] + 8 * 4 <= rollout["text_tokens"]
        assert 0 < rollout["seconds"] < seconds
        assert set(phases) == {"rollout", "reward", "scoring", "update"}
        assert sum(phases.values()) <= seconds


def test_a_trainer_that_fails_is_a_result_with_its_last_lines(tmp_path: Path) -> None:
    (tmp_path / SIZE.name).mkdir()
    (measured,) = training.compare(COMPARISON, INTERPRETERS, tmp_path, deadline=time.monotonic() + 600)
    assert measured.failure is not None
    assert measured.failure.startswith("tiny LoRA, Proxima ended")
    assert "prompts.json" in measured.failure
    assert "could not run it" in report.training_table([measured])


def test_speed_is_the_median_of_the_ratios_within_rounds() -> None:
    theirs, ours = row("TRL", 2.0, 20.0, 4.0), row("ours", 1.0, 4.0, 1.0)
    assert ours.speed_against(theirs) == 4.0
    assert ours.updates_per_second == 1.0
    assert ours.rollout_tokens_per_second == 400.0


def test_the_table_shows_speed_and_memory_against_the_first_contender() -> None:
    lines = report.training_table([row("TRL", 2.0, peak_mib=400), row("ours", 0.5, peak_mib=100)])
    theirs, ours = lines.splitlines()[1:3]
    assert theirs.split()[2:8] == ["TRL", "0.5000", "1.00x", "400", "400", "MiB"]
    assert ours.split()[2:9] == ["ours", "2.0000", "4.00x", "400", "100", "MiB", "0.25x"]


def test_the_floor_counts_the_matrix_products_of_an_update() -> None:
    """One layer: four 16 x 16 and three 16 x 32 matrices; the head 64 x 16. By hand."""
    trunk, policy = 4 * 256 + 3 * 512, 4 * 256 + 3 * 512 + 1024
    assert (SIZE.trunk_weights, SIZE.head_weights) == (trunk, 1024)
    once = 2 * policy + 2 * trunk + 2 * policy  # rollout, reward, reference
    assert floor.operations(SIZE, "lora-head", 10, 4) == 10 * (once + 4 * 4 * policy)
    assert floor.operations(SIZE, "lora", 10, 4) == 10 * (once + 2 * trunk + 4 * (4 * policy + 6 * trunk))
    assert floor.operations(SIZE, "full", 10, 4) == 10 * (once + 2 * trunk + 4 * (6 * policy + 6 * trunk))
    took = 3 * floor.operations(SIZE, "full", 300, 4) / 1e9
    assert row("ours", took).over_floor == pytest.approx(3.0)
    assert floor.matrix_rate(torch.get_num_threads()) > 1e8


def test_responses_of_an_early_model_have_about_the_mean_that_is_asked_for(tmp_path: Path) -> None:
    early = workload.ending_early(SIZE, 5.0)
    workload.make(early, tmp_path)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    responses = generate(
        policy,
        [[5, 6, 7]] * 300,
        row_uniforms(0, 1, range(300), 60, Purpose.ROLLOUT),
        temperature=workload.TEMPERATURE,
        stop_token_id=workload.EOS,
        batch_rows=300,
        device=torch.device("cpu"),
    )
    mean = sum(len(response.ids) for response in responses) / 300
    assert 4.0 < mean < 6.0


def test_every_cell_has_a_title_of_its_own() -> None:
    titles = [cell.title for cell in (*GRID, *GROWTH)]
    assert len(set(titles)) == len(titles)
    assert set(STANDARD) <= set(GRID)
