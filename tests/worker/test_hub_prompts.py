"""Prompts from data sets of a hub: read, checked, kept at their commit, and missed in plain words."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ppo_engine.issues import SpecError
from ppo_engine.model_sources import HubData
from ppo_engine.run_dir import RunDir
from tests.engine import tiny
from tests.hub_server import LocalHub, local_hub
from tests.servers import free_port
from tests.worker import test_engine
from tests.worker.fleet import SPEC, Fleet
from tests.worker.test_engine import REAL
from worker import hub as worker_hub
from worker import launch
from worker.hub import Hub, HubAway
from worker.hub_prompts import is_final

pytestmark = pytest.mark.anyio

ROWS: list[dict[str, Any]] = [{"prompt": f"Say {number}", "answer": number} for number in range(64)]
NEW_ROWS = ROWS[::-1][:32]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def card(**paths: str) -> str:
    """A README that has a configuration for each path."""
    named = [f"- config_name: {name}\n  data_files: {path}\n" for name, path in paths.items()]
    return f"---\nconfigs:\n{''.join(named)}---\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """The hub that this process and all it starts ask."""
    with local_hub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        yield served


async def fetch(tmp_path: Path, max_bytes: int = 2**20, **source: Any) -> tuple[Any, list[dict[str, Any]]]:
    """What a worker finds of a data set, and the rows that an engine would read."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.data_dir.mkdir(parents=True, exist_ok=True)
    environment = launch.environment(os.environ, (), (), allow_hub=True)
    given = HubData(type="hub", **source)
    fetched = await Hub(environment, max_bytes).fetch_prompts("train", given, run_dir)
    return fetched, [json.loads(line) for line in run_dir.data("hub-train").read_text().splitlines()]


# What can be read --------------------------------------------------------------------------------------


CHATS = [
    {"messages": [{"role": "user", "content": "Hi"}]},
    {"messages": [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi", "name": "a"}]},
    {"messages": [{"role": "user", "content": "Sum", "tools": [1]}], "more": {"a": None}},
]


@pytest.mark.parametrize(
    ("files", "source", "expected"),
    [
        ({"train.jsonl": jsonl(ROWS), "test.jsonl": jsonl(ROWS[:2])}, {"split": "test"}, ROWS[:2]),
        ({"prompts.csv": "prompt,answer\nSay 0,0\nSay 1,1\n"}, {}, ROWS[:2]),
        ({"rows.jsonl.gz": gzip.compress(jsonl(ROWS).encode())}, {}, ROWS),
        (
            {
                "data/train-00000-of-00002.parquet": parquet(pa.Table.from_pylist(ROWS[:40])),
                "data/train-00001-of-00002.parquet": parquet(pa.Table.from_pylist(ROWS[40:])),
            },
            {},
            ROWS,
        ),
        (
            {
                "a.jsonl": jsonl(ROWS),
                "b.jsonl": jsonl(NEW_ROWS),
                "README.md": card(en="a.jsonl", de="b.jsonl"),
            },
            {"config": "de"},
            NEW_ROWS,
        ),
    ],
)
async def test_a_split_becomes_the_rows_that_an_upload_would(
    hub: LocalHub, tmp_path: Path, files: Mapping[str, str | bytes], source: dict[str, str], expected: Any
) -> None:
    commit = hub.push("acme/prompts", files)
    fetched, rows = await fetch(tmp_path, repo="acme/prompts", **source)
    assert rows == expected
    assert (fetched.commit, fetched.rows) == (commit, len(expected))
    assert set(fetched.columns) == {"prompt", "answer"}


async def test_chats_of_several_forms_stay_what_they_are(hub: LocalHub, tmp_path: Path) -> None:
    hub.push("acme/chats", {"chats.jsonl": jsonl(CHATS)})
    _, rows = await fetch(tmp_path, repo="acme/chats")
    assert [row["messages"] for row in rows] == [
        [{name: part for name, part in message.items() if part is not None} for message in chat["messages"]]
        for chat in CHATS
    ]


async def test_columns_without_a_form_in_json_are_left_out(hub: LocalHub, tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a", "b"], "at": pa.array([0, 1], pa.timestamp("s")), "raw": [b"x", b"y"]})
    hub.push("acme/times", {"train.parquet": parquet(table)})
    fetched, rows = await fetch(tmp_path, repo="acme/times")
    assert rows == [{"prompt": "a"}, {"prompt": "b"}]
    assert fetched.columns == ("prompt",)


async def test_a_revision_is_read_where_it_was(hub: LocalHub, tmp_path: Path) -> None:
    before = hub.push("acme/prompts", {"train.jsonl": jsonl(ROWS)})
    hub.push("acme/prompts", {"train.jsonl": jsonl(NEW_ROWS)})
    fetched, rows = await fetch(tmp_path, repo="acme/prompts", revision=before)
    assert (fetched.commit, rows) == (before, ROWS)


# What cannot -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "source", "loc", "words"),
    [
        (None, {"repo": "acme/none"}, ("repo",), ['"acme/none" given; the hub has no such data set']),
        (None, {"repo": "acme/closed"}, ("repo",), ['"acme/closed" given', "token"]),
        ({"a.jsonl": jsonl(ROWS)}, {"revision": "v2"}, ("revision",), ['"v2" given', "no such branch, tag"]),
        ({"a.jsonl": jsonl(ROWS)}, {"split": "test"}, ("split",), ['"test" given', '["train"]']),
        ({"a.jsonl": jsonl(ROWS)}, {"config": "fr"}, ("config",), ['"fr" given', '["default"]']),
        (
            {"a.jsonl": jsonl(ROWS), "README.md": card(en="a.jsonl", de="a.jsonl")},
            {},
            ("config",),
            ["Not given", '["en", "de"]'],
        ),
        ({"a.jsonl": jsonl([{"text": "x"}])}, {}, (), ['the columns ["text"] given', '"prompt"']),
        (
            {"a.jsonl": jsonl([{"prompt": "x"}, {"prompt": ""}, {"prompt": None}])},
            {},
            (),
            ['Row 2: "" given; a prompt is text that is not empty.'],
        ),
        ({"a.jsonl": '{"prompt": "x"}\nnonsense{\n'}, {}, (), ["which cannot be read", "JSON"]),
        ({"README.md": "Nothing"}, {}, (), ["acme/prompts@main (train) given, which cannot be read"]),
        ({"prompts.py": "raise SystemExit"}, {}, (), ["scripts are no longer supported"]),
        ({"a.txt": "x\n"}, {}, ("repo",), ['files of the kind text; rows are read from ["arrow"']),
        ({"a.jsonl": jsonl(ROWS), "README.md": card(en="/proc/self/environ")}, {}, (), ["cannot be read"]),
        ({"a.jsonl": jsonl(ROWS * 1000)}, {}, (), ["more than 1048576 bytes as JSONL"]),
    ],
)
async def test_what_is_no_prompt_data_says_so_at_its_field(
    hub: LocalHub,
    tmp_path: Path,
    files: Mapping[str, str | bytes] | None,
    source: dict[str, str],
    loc: tuple[str, ...],
    words: list[str],
) -> None:
    hub.push("acme/prompts", files or {})
    hub.push("acme/closed", {"train.jsonl": jsonl(ROWS)})
    hub.closed.add("acme/closed")
    with pytest.raises(SpecError) as refused:
        await fetch(tmp_path, **{"repo": "acme/prompts", **source})
    first = refused.value.issues[0]
    assert first.loc == ("prompts", "train", *loc)
    for word in words:
        assert word in first.msg


async def test_a_data_set_cannot_name_files_of_this_machine(hub: LocalHub, tmp_path: Path) -> None:
    secret = tmp_path / "others.jsonl"
    secret.write_text(jsonl(ROWS))
    for path in (secret, f"file://{secret}", f"../../../../../../../..{secret}"):
        hub.push("acme/sly", {"a.jsonl": jsonl(ROWS), "README.md": card(en=str(path))})
        with pytest.raises(SpecError, match="cannot be read"):
            await fetch(tmp_path, repo="acme/sly")


async def test_a_small_file_that_unpacks_to_a_huge_one_is_refused(hub: LocalHub, tmp_path: Path) -> None:
    table = pa.table({"prompt": pa.DictionaryArray.from_arrays([0] * 8000, ["x" * 2**20])})
    content = parquet(table)
    assert len(content) < 2**21
    hub.push("acme/bomb", {"train.parquet": content})
    with pytest.raises(SpecError, match="cannot be read: ArrowMemoryError"):
        await fetch(tmp_path, repo="acme/bomb")


async def test_a_reader_that_crashes_says_so(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    broken = Hub({"PYTHONHOME": "/nowhere"}, max_bytes=1)  # no Python starts with that
    with pytest.raises(SpecError, match=r"prompts.eval: acme/x at main cannot be had .* status 1"):
        await broken.fetch_prompts("eval", HubData(type="hub", repo="acme/x"), run_dir)


async def test_a_hub_that_is_away_is_told_from_what_it_lacks(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(worker_hub, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(HubAway, match="acme/prompts at main cannot be had from the hub: "):
        await fetch(tmp_path, repo="acme/prompts")


@pytest.mark.parametrize("patience", [1, 3])
async def test_a_hub_that_has_had_enough_of_requests_is_asked_another_time(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: int
) -> None:
    """Whatever was asked last: the commit is known already."""
    hub.push("acme/prompts", {"train.jsonl": jsonl(ROWS)})
    hub.patience = patience
    monkeypatch.setattr(worker_hub, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(HubAway, match="acme/prompts at main cannot be had from the hub: "):
        await fetch(tmp_path, repo="acme/prompts")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def refused(status: int) -> HfHubHTTPError:
    return HfHubHTTPError("no", response=httpx.Response(status, request=httpx.Request("GET", "http://hub")))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (LocalEntryNotFoundError("it could not be asked for"), False),
        (caused(DatasetNotFoundError("none"), refused(503)), False),
        (caused(FileNotFoundError("none"), refused(429)), False),
        (caused(ValueError("no config"), httpx.ConnectError("away")), False),
        (caused(FileNotFoundError("none"), refused(404)), True),
        (ValueError("a file that is no table"), True),
        (OSError("the disk"), False),
    ],
    ids=["not asked", "503", "429", "no way", "404", "no table", "disk"],
)
def test_what_a_hub_that_is_away_makes_of_a_data_set_is_not_final(error: Exception, expected: bool) -> None:
    assert is_final(error) is expected


# In a job ----------------------------------------------------------------------------------------------


def on_hub(field: str = "train", **source: Any) -> dict[str, Any]:
    return {field: {"type": "hub", "repo": "acme/prompts", **source}}


async def test_a_job_is_planned_with_the_rows_that_the_hub_has(embedded: Fleet, hub: LocalHub) -> None:
    commit = hub.push("acme/prompts", {"train.jsonl": jsonl(ROWS)})
    ppo = {**SPEC["ppo"], "total_episodes": None, "num_train_epochs": 2.0}
    job_id = await embedded.submit({**SPEC, "prompts": on_hub(), "ppo": ppo})
    hub.away = 1  # for a moment
    await embedded.work("--updates", 1)
    job = await embedded.job(job_id)
    assert (job.state, job.attempt) == ("succeeded", 1), await embedded.log(job_id)
    assert (job.plan or {})["total_episodes"] == 128
    assert job.total_updates == 32
    assert job.spec["prompts"]["train"]["revision"] == commit


async def test_a_reward_that_reads_a_column_the_data_lacks_fails_the_job(
    embedded: Fleet, hub: LocalHub
) -> None:
    hub.push("acme/prompts", {"train.jsonl": jsonl(ROWS)})
    reward = {"type": "string_check", "name": "right", "column": "solution"}
    job_id = await embedded.submit({**SPEC, "prompts": on_hub(), "rewards": [reward]})
    await embedded.work("--updates", 1)
    job = await embedded.job(job_id)
    assert (job.state, job.error_code) == ("failed", "invalid_spec")
    [issue] = job.error_issues or []
    assert issue["loc"] == ["rewards", 0, "column"]
    assert '["answer"]' in issue["msg"]


async def test_where_the_operator_allows_no_hub_none_is_asked(embedded: Fleet, hub: LocalHub) -> None:
    job_id = await embedded.submit({**SPEC, "prompts": on_hub()})
    await embedded.work("--updates", 1, allow_hub_models=False)
    job = await embedded.job(job_id)
    assert [issue["loc"] for issue in job.error_issues or []] == [["prompts", "train", "repo"]]
    assert hub.asked == []


@pytest.fixture
async def real(embedded: Fleet, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny.save(tiny.policy(), tiny.tokenizer(), embedded.settings.model_roots[0] / "llama")
    embedded.prompts = test_engine.PROMPTS
    return embedded


async def test_a_run_that_goes_on_has_the_prompts_it_began_with(real: Fleet, hub: LocalHub) -> None:
    commit = hub.push("acme/prompts", {"train.jsonl": test_engine.PROMPTS})
    job_id = await real.submit({**test_engine.SPEC, "prompts": on_hub()})
    leaving = threading.Event()
    async with real.working(engine_command=REAL, leaving=leaving.is_set):
        await real.has_checkpoint(job_id, 2)
        leaving.set()
    assert (await real.job(job_id)).state == "queued"

    fewer = b"".join(test_engine.PROMPTS.splitlines(keepends=True)[1:])
    hub.push("acme/prompts", {"train.jsonl": fewer})
    await real.work(engine_command=REAL)
    job = await real.job(job_id)
    assert (job.state, job.attempt) == ("succeeded", 2), job.error_message
    assert job.spec["prompts"]["train"]["revision"] == commit


async def test_held_out_prompts_of_the_hub_are_named_in_the_card(real: Fleet, hub: LocalHub) -> None:
    commit = hub.push("acme/prompts", {"test.jsonl": test_engine.PROMPTS})
    ppo = {**test_engine.SPEC["ppo"], "total_episodes": 16, "eval_steps": 2}
    prompts = {"train": await real.upload(), **on_hub("eval", split="test")}
    job_id = await real.submit({**test_engine.SPEC, "ppo": ppo, "prompts": prompts})
    await real.work(engine_command=REAL)
    job = await real.job(job_id)
    assert job.state == "succeeded", await real.log(job_id)
    assert len(await real.events(job_id, "evaluation")) == 1
    [*_, archive] = await real.artifacts(job_id, "archive")
    with tarfile.open(fileobj=io.BytesIO(await real.content(archive, "export.tar"))) as tar:
        [readme] = [member for member in tar if member.name.endswith("README.md")]
        text = tar.extractfile(readme).read().decode()  # type: ignore[union-attr]
    assert f"| eval_dataset: acme/prompts@{commit} (test) |" in text
    assert "| train_dataset |" in text
