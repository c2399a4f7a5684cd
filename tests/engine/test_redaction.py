"""That no value of a secret stands in what a run tells: any text, and a run whose plug-in blurts it out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_engine.redaction import redacted
from ppo_engine.rewards import NamedReward, RewardBatch, RewardError, Scorer
from tests.engine.training import make_run

ROOT = Path(__file__).parents[2]
VALUES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
    str.strip
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


def plain(value: str) -> str:
    return value


def as_python(value: str) -> str:
    return str(KeyError(value))[1:-1]


def as_json(value: str) -> str:
    return json.dumps({"key": value})


def in_a_url(value: str) -> str:
    return f"https://example.com/?key={quote(value, safe='')}"


@pytest.mark.parametrize("written", [plain, as_python, as_json, in_a_url])
@given(st.lists(VALUES, min_size=1, max_size=3), TEXTS, TEXTS)
def test_no_text_holds_a_value_of_a_secret(
    written: Callable[[str], str], values: list[str], before: str, after: str
) -> None:
    environment = {f"PROXIMA_SECRET_N{index}": value for index, value in enumerate(values)}

    told = redacted(before + "".join(map(written, values)) + after, environment)

    left = re.split(r"<secret N\d>", told)
    assert len(left) > 1
    assert not [value for value in values for piece in left if value in piece]


@given(TEXTS)
def test_a_text_without_secrets_is_left_as_it_is(text: str) -> None:
    assert redacted(text, {"PATH": text, "PROXIMA_SECRET_EMPTY": "", "HF_TOKEN": "short"}) == text


def test_each_is_told_by_its_own_name_and_the_longer_one_first() -> None:
    given = {"PROXIMA_SECRET_A": "abc", "PROXIMA_SECRET_B": "abcdef", "WANDB_API_KEY": "0123456789"}
    assert redacted("abcdef, abc, 0123456789", given) == "<secret B>, <secret A>, <secret WANDB_API_KEY>"


def test_lines_of_a_key_are_found_where_a_trace_indents_them() -> None:
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBg\n-----END KEY-----\n"
    told = redacted("  | -----BEGIN KEY-----\n  | MIIEvQIBADANBg\n", {"PROXIMA_SECRET_PEM": key})
    assert told == "  | <secret PEM>\n  | <secret PEM>\n"


def test_what_a_reward_gave_is_cut_after_its_secrets_have_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROXIMA_SECRET_JUDGE", "hunter2, and much more")
    judge = NamedReward("judge", lambda batch: ["x" * 70 + "hunter2, and much more"])  # type: ignore[list-item]
    with pytest.raises(RewardError, match="x<secret") as refused:
        Scorer([judge])(RewardBatch(["one"], ["two"], [[1]], [{}]))
    assert "hunter" not in str(refused.value)


# A run -----------------------------------------------------------------------------------------------------

SECRET = "hunter2/'\"\\correct horse"
PLUGIN = """
class Wrong(Exception):
    pass

def factory(key):
    raise Wrong(f"no judge takes the key {key}, {key!r}")

def call(key):
    def reward(batch):
        try:
            {}[key]
        except KeyError as error:
            raise Wrong(f"no judge takes the key {key}") from error
    return reward
"""


@pytest.mark.parametrize(("plugin", "reason"), [("factory", "spec"), ("call", "reward")])
def test_a_run_does_not_tell_what_its_plugin_blurts_out(
    policy_dir: Path, tmp_path: Path, plugin: str, reason: str
) -> None:
    (tmp_path / "blurting.py").write_text(PLUGIN)
    info = tmp_path / "blurting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: blurting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[proxima.rewards]\n{plugin} = blurting:{plugin}\n")
    options = {"key": {"secret": "JUDGE"}}
    reward = {"type": "plugin", "name": "judge", "plugin": plugin, "options": options, "retries": 0}
    run_dir = make_run(tmp_path / "run", policy_dir, rewards=[reward])
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{tmp_path}",
        "PROXIMA_SECRET_JUDGE": SECRET,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }

    with run_dir.log.open("wb") as log:
        command = [sys.executable, "-m", "ppo_engine", str(run_dir.path)]
        subprocess.run(command, env=environment, cwd=run_dir.path, stdout=log, stderr=log, check=False)

    result = run_dir.read_result()
    assert result is not None
    assert (result.outcome, result.reason) == ("failed", reason)
    for told in (result.message, run_dir.log.read_text()):
        assert "Wrong: no judge takes the key <secret JUDGE>" in told
    assert [issue.loc for issue in result.issues] == ([("rewards", 0, "plugin")] if reason == "spec" else [])
    for path in (run_dir.result, run_dir.log, run_dir.events):
        said = path.read_text() if path.exists() else ""
        assert not [word for word in ("hunter2", "correct horse") if word in said], path
