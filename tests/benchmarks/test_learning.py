"""The learning report's own parts: tasks scored by hand, tables over seeds, pictures, and their page."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from randomwalks.policy import make_model, make_tokenizer

from benchmarks.learning import __main__ as report
from benchmarks.learning import digits, plots, walks
from benchmarks.learning.curve import Curve


def curve(variant: str, seed: int, *rewards: float, final: float = 0.5) -> Curve:
    episodes = [10.0 * (update + 1) for update in range(len(rewards))]
    return Curve("walks", variant, seed, episodes, list(rewards), [0.1] * len(rewards), final)


@pytest.mark.parametrize(
    ("prompt", "right"), [("3,5:4", "7,9,1,3"), ("5,3:3", "1,9,7"), ("0,0:2", "0,0"), ("1,9:1", "7")]
)
def test_digits_go_on_modulo_ten(prompt: str, right: str) -> None:
    assert digits.answer(prompt) == right


def test_digits_earn_until_the_first_that_is_wrong() -> None:
    """The right response to 3,5:2 is "7,9" and eos: four tokens, a quarter each."""
    written = ["7,9<eos>", "7,8<eos>", "9,9<eos>", "7,9,"]
    tokens = {word: index for index, word in enumerate(digits.WORDS)}
    ids = [
        [tokens[word] for word in (*text.removesuffix("<eos>"), *(["<eos>"] if "<eos>" in text else []))]
        for text in written
    ]
    batch = SimpleNamespace(prompts=["3,5:2"] * 4, response_ids=ids)
    assert digits.right_characters(batch) == [[0.25] * 4, [0.25, 0.25, 0, 0], [0] * 4, [0.25, 0.25, 0.25, 0]]


def test_every_prompt_of_digits_is_text_of_its_tokenizer() -> None:
    tokenizer = digits.make_tokenizer()
    assert len(tokenizer) == digits.make_config().vocab_size
    for row in digits.prompts()[:50]:
        assert tokenizer.decode(tokenizer(row["prompt"])["input_ids"]) == row["prompt"]
        assert len(digits.answer(row["prompt"])) + 1 <= 32


def test_trls_reward_is_ours() -> None:
    """Read at one token, as TRL reads it, the model gives what the function gives."""
    tokenizer = make_tokenizer()
    model = walks.OptimalityModel(tokenizer)
    encoded = tokenizer(walks.WALKS[:20], return_tensors="pt", padding=True)
    hidden = model.backbone(**encoded).hidden_states[-1]
    batch = SimpleNamespace(
        prompts=[walk[0] for walk in walks.WALKS[:20]], responses=[walk[1:] for walk in walks.WALKS[:20]]
    )
    assert model.score(hidden)[:, -1, 0].tolist() == pytest.approx(walks.optimality(batch))
    assert len(set(walks.optimality(batch))) > 2


def test_the_table_is_over_seeds() -> None:
    curves = [curve("a", seed, 0.1, final=final) for seed, final in enumerate((0.9, 0.96, 0.93))]
    assert report.table([*curves, curve("b", 1, 0.1)]).splitlines()[2:] == [
        "| a | 3 | 0.9300 | 0.9300 | 0.9000 to 0.9600 | 0.10 |",
        "| b | 1 | 0.5000 | 0.5000 | 0.5000 to 0.5000 | 0.10 |",
    ]


def test_a_picture_is_the_same_for_the_same_numbers(tmp_path: Path) -> None:
    curves = [curve("a", 1, 0.1, 0.2), curve("a", 2, 0.3, 0.1), curve("b", 1, 0.5, 0.6)]
    for name in ("one.svg", "two.svg"):
        plots.rewards(curves, "title", "reward", tmp_path / name)
        plots.reward_against_kl(curves, "title", "reward", tmp_path / f"kl-{name}")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert (tmp_path / "kl-one.svg").read_bytes() == (tmp_path / "kl-two.svg").read_bytes()


def test_only_what_stands_between_the_markers_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "learning.md"
    page.write_text(report.PAGE.read_text())
    monkeypatch.setattr(report, "PAGE", page)
    before = page.read_text()
    for task in report.TASKS:
        report.write_into_page(task, f"table of {task}")
        report.write_into_page(task, f"another table of {task}")
    after = page.read_text()
    assert "another table of digits" in after
    assert "\ntable of" not in after
    assert after.split("<!-- walks: begin -->")[0] == before.split("<!-- walks: begin -->")[0]


def test_every_run_has_a_curve_of_its_own() -> None:
    planned = list(report.runs(report.TASKS, 2, Path("model")))
    assert len({run.curve for run in planned}) == len(planned)
    assert {run.library for run in planned} == {"proxima", "trl"}


def test_walks_are_sampled_from_the_policy_that_is_given() -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    assert walks.sampled_optimality(make_model(tokenizer), tokenizer, 0) < 0.2
