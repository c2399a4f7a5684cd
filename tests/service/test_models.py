"""Which models a job may name, and what the service can tell of them."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from ppo_engine.issues import SpecError
from ppo_engine.spec import parse
from service.models import REWARD_PLUGINS, PathRefused, locate, read_facts, resolve


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "models"


def refusal(path: str, *roots: Path) -> str:
    with pytest.raises(PathRefused) as caught:
        locate(path, roots)
    return str(caught.value)


def test_a_path_is_found_relative_and_absolute(root: Path):
    assert locate("tiny", [root]) == root / "tiny"
    assert locate(str(root / "tiny"), [root]) == root / "tiny"
    assert locate("tiny", [root.parent / "elsewhere", root]) == root / "tiny"


def test_a_link_inside_is_followed_and_a_link_out_is_not(root: Path):
    (root / "alias").symlink_to("tiny")
    (root / "out").symlink_to(root.parent / "elsewhere")
    assert locate("alias", [root]) == root / "tiny"
    assert '"out" given, a link that leads out' in refusal("out", root)


def test_a_root_that_is_itself_a_link(root: Path):
    (root.parent / "linked").symlink_to(root)
    assert locate("tiny", [root.parent / "linked"]) == root / "tiny"
    assert locate(str(root / "tiny"), [root.parent / "linked"]) == root / "tiny"


@pytest.mark.parametrize("path", ["/etc", "/", "//etc", "../elsewhere", "tiny/../../elsewhere", "tiny/.."])
def test_a_path_outside_is_refused_by_its_words(root: Path, path: str):
    msg = refusal(path, root)
    assert f"{json.dumps(path)} given" in msg
    assert "inside a directory the operator allows" in msg


def test_a_sibling_whose_name_begins_like_a_root_is_outside(root: Path):
    (root.parent / "models-private").mkdir()
    assert "inside a directory" in refusal(str(root.parent / "models-private"), root)


def test_what_is_not_there_is_refused_unless_the_root_is_not_mounted_here(root: Path):
    assert "no such directory" in refusal("huge", root)
    unmounted = root.parent / "not-mounted"
    assert locate("huge", [root, unmounted]) == unmounted / "huge"
    assert locate("tiny", [unmounted, root]) == root / "tiny"


def test_paths_no_file_system_can_follow(root: Path):
    (root / "loop").symlink_to("loop")
    assert "given" in refusal("loop", root)
    assert "cannot be followed" in refusal("a" * 5000, root)


def test_without_roots_no_local_model_is_allowed():
    assert "allows no local models" in refusal("tiny")


def raw_spec(**parts: Any) -> dict[str, Any]:
    return {
        "model": {"type": "local", "path": "tiny"},
        "prompts": {"train": "file_1"},
        "rewards": [{"type": "length", "name": "short", "target": 5}],
        **parts,
    }


def issues_of_resolving(raw: dict[str, Any], root: Path) -> dict[tuple[str | int, ...], str]:
    with pytest.raises(SpecError) as caught:
        resolve(parse(raw), [root], allow_hub=False)
    return {issue.loc: issue.msg for issue in caught.value.issues}


def test_every_model_a_spec_names_is_checked_at_its_place(root: Path):
    out, hub = {"type": "local", "path": "/etc"}, {"type": "hub", "repo": "owner/name"}
    raw = raw_spec(
        method={"type": "lora", "adapters": {"old": out}, "value": {"type": "model", "source": hub}},
        rewards=[{"type": "model", "name": "judge", "source": out}],
    )
    issues = issues_of_resolving(raw, root)
    assert set(issues) == {
        ("method", "adapters", "old", "path"),
        ("method", "value", "source", "repo"),
        ("rewards", 0, "source", "path"),
    }
    assert (
        '"owner/name" of the hub given; the operator allows local models only'
        in issues[("method", "value", "source", "repo")]
    )


def test_a_resolved_spec_has_real_paths_and_the_rest_as_it_was(root: Path):
    spec = parse(raw_spec(ppo={"total_episodes": 8}))
    resolved = resolve(spec, [root], allow_hub=False)
    assert resolved.model_dump() == {
        **spec.model_dump(),
        "model": {"type": "local", "path": str(root / "tiny")},
    }
    hub = parse(raw_spec(model={"type": "hub", "repo": "owner/name"}))
    assert resolve(hub, [root], allow_hub=True) == hub


def test_a_plugin_must_be_installed(root: Path):
    name = "no-such-plugin"
    assert name not in entry_points(group=REWARD_PLUGINS).names
    issues = issues_of_resolving(raw_spec(rewards=[{"type": "plugin", "name": "x", "plugin": name}]), root)
    assert '"no-such-plugin" given; the plug-ins installed here are' in issues[("rewards", 0, "plugin")]


def test_facts_are_read_where_the_model_is_seen_and_its_place_stays_private(root: Path):
    given = parse(raw_spec())
    spec = resolve(given, [root], allow_hub=False)
    with pytest.raises(SpecError) as caught:
        read_facts(spec, given, prompts=3)
    [issue] = caught.value.issues
    assert issue.loc == ("model", "path")
    assert issue.msg.startswith("tiny has no config.json")
    (root / "tiny" / "config.json").write_text(
        json.dumps({"architectures": ["GPT2LMHeadModel"], "n_positions": 64})
    )
    facts = read_facts(spec, given, prompts=3)
    assert facts.prompts == 3
    assert facts.model is not None
    assert facts.model.context_length == 64


def test_a_model_on_a_disk_not_mounted_here_has_no_facts(root: Path):
    given = parse(raw_spec())
    spec = resolve(given, [root.parent / "not-mounted"], allow_hub=False)
    assert read_facts(spec, given, prompts=None).model is None
