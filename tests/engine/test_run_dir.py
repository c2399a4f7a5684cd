"""Files of a run directory: typed, replaced atomically, and complete or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppo_engine.issues import SpecError
from ppo_engine.run_dir import (
    MANIFEST,
    Acks,
    Control,
    Result,
    RunDir,
    damage,
    describe,
    read_manifest,
    write_atomic,
)
from ppo_engine.spec import parse
from tests.engine.test_spec import raw


def test_small_files_come_back_as_they_were(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)

    assert run_dir.read_control() == Control(wanted="run", lease_until=None)
    assert run_dir.read_acks() is None
    assert run_dir.read_result() is None
    run_dir.write_control(Control(wanted="pause", lease_until=12.5))
    run_dir.write_acks(Acks(checkpoints=(2, 4)))
    run_dir.write_result(Result(outcome="stopped", reason="pause", update=4, message="m"))
    run_dir.write_spec(parse(raw()))
    assert run_dir.read_control() == Control(wanted="pause", lease_until=12.5)
    assert run_dir.read_acks() == Acks(checkpoints=(2, 4))
    assert run_dir.read_result() == Result(outcome="stopped", reason="pause", update=4, message="m")
    assert run_dir.read_spec() == parse(raw())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_first_word_on_how_it_ended_stands(tmp_path: Path) -> None:
    first = Result(outcome="failed", reason="oom", update=4, message="out of memory")
    RunDir(tmp_path).write_result(first)
    RunDir(tmp_path).write_result(
        Result(outcome="failed", reason="crash", update=4, message="Connection closed by peer")
    )

    assert RunDir(tmp_path).read_result() == first


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 1}'])
def test_a_spec_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    RunDir(tmp_path).spec.write_text(content)

    with pytest.raises(SpecError):
        RunDir(tmp_path).read_spec()


def test_a_directory_without_a_whole_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    for update in (10, 2, 9):
        directory = run_dir.checkpoint(update)
        directory.mkdir(parents=True)
        (directory / "weights").write_bytes(b"w")
        manifest = describe(directory, update, {"a": 1.0}).model_dump_json().encode()
        write_atomic(directory / MANIFEST, manifest)
    (run_dir.checkpoint(9) / MANIFEST).write_bytes(b'{"update": 9, "fi')
    (run_dir.checkpoints / "update-11").mkdir()
    (run_dir.checkpoints / "update-x").mkdir()

    assert run_dir.complete_checkpoints() == [2, 10]
    assert run_dir.complete_exports() == []


def test_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"aaa")
    (tmp_path / "b").write_bytes(b"bbb")
    write_atomic(tmp_path / MANIFEST, describe(tmp_path, 1, {}).model_dump_json().encode())
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert [file.name for file in manifest.files] == ["b", "sub/a"]

    assert damage(tmp_path, manifest) is None
    (tmp_path / "b").write_bytes(b"bbc")
    assert damage(tmp_path, manifest) == "b does not have the sha256 of its manifest"
    (tmp_path / "b").write_bytes(b"bb")
    assert damage(tmp_path, manifest) == "b has 2 bytes instead of 3"
    (tmp_path / "b").unlink()
    assert damage(tmp_path, manifest) == "b is missing"
