"""The stories example: its reward, its prompts, and its spec."""

import json
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

from happy_stories import happiness

from ppo_engine.reward_kinds import Plugin
from ppo_engine.spec import parse

STORIES = Path(__file__).parents[2] / "examples" / "stories"


def test_happy_text_scores_above_sad_text() -> None:
    responses = ["She was very happy and they all laughed.", "The box was there.", "He was sad and he cried."]
    happy, plain, sad = happiness()(SimpleNamespace(responses=responses))
    assert 1 >= happy > plain == 0 > sad >= -1


def test_no_prompt_is_both_trained_on_and_held_out() -> None:
    train, heldout = (
        (STORIES / name).read_text().splitlines() for name in ("prompts.jsonl", "heldout.jsonl")
    )
    assert len(set(train)) == len(train) == 120
    assert len(set(heldout)) == len(heldout) == 24
    assert not set(train) & set(heldout)


def test_the_specs_of_the_examples_name_plug_ins_that_are_installed() -> None:
    installed = {found.name for found in entry_points(group="proxima.rewards")}
    for path in (STORIES / "spec.json", STORIES.parent / "randomwalks" / "randomwalks" / "spec.json"):
        raw = json.loads(path.read_text())
        raw["prompts"] = dict.fromkeys(raw["prompts"], "file_1")
        [reward] = parse(raw).rewards
        assert isinstance(reward, Plugin)
        assert reward.plugin in installed
