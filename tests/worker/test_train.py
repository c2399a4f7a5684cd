"""One job, from its claim to its end: what a worker makes of an engine's ways."""

from __future__ import annotations

import asyncio
import io
import json
import os
import tarfile
import threading
from hashlib import sha256

import pytest

from tests.worker.fleet import SPEC, Fleet
from tests.worker.stand_in import chain

pytestmark = pytest.mark.anyio

ENDLESS = ("--updates", 1_000_000, "--seconds", 0.02)


def starts(log: str) -> int:
    """How often an engine was started."""
    return log.count('"arguments"')


async def test_a_job_runs_to_its_end(fleet: Fleet) -> None:
    job_id = await fleet.submit()
    await fleet.work("--updates", 5, "--save-every", 2)

    job = await fleet.job(job_id)
    assert (job.state, job.attempt, job.update, job.error_code) == ("succeeded", 1, 5, None)
    assert job.total_updates == 16, "planned by the worker"
    said = await fleet.events(job_id)
    assert [event.seq for event in said] == list(range(1, len(said) + 1))
    states = [event.data["state"] for event in said if event.type == "state"]
    assert states == ["queued", "running", "succeeded"]
    assert said[-1].type == "state", "nothing is said after the end"
    metrics = [event for event in said if event.type == "metrics"]
    assert [event.update for event in metrics] == [1, 2, 3, 4, 5]
    assert metrics[0].data == {"objective/scores": 1.0, "nan": "NaN"}
    assert list(fleet.runs_dir.iterdir()) == [], "run directories are removed"
    fleet.no_engine_left()


async def test_what_a_run_made_lies_in_storage(embedded: Fleet) -> None:
    job_id = await embedded.submit()
    await embedded.work("--updates", 7, "--save-every", 2)

    exports = await embedded.artifacts(job_id, "export")
    assert [export.update for export in exports] == [2, 4, 6, 7]
    for export in exports:
        for file in export.files:
            content = await embedded.content(export, file["name"])
            assert (len(content), sha256(content).hexdigest()) == (file["size"], file["sha256"])
    policy = json.loads(await embedded.content(exports[-1], "adapter.json"))
    assert policy == {"update": 7, "state": chain(7)}
    assert exports[-1].metrics == {"objective/scores": 7.0}

    checkpoints = await embedded.artifacts(job_id, "checkpoint")
    assert [made.update for made in checkpoints] == [6, 7], "the newest two are kept"
    kept = {path.parent.parent.name for path in (embedded.settings.data_dir / "storage").rglob("state.json")}
    assert kept == {"update-6", "update-7"}, "the bytes of the others are gone, too"
    assert "arguments" in await embedded.log(job_id)


async def test_the_archive_holds_the_export_and_is_the_same_each_time(embedded: Fleet) -> None:
    contents = []
    for _ in range(2):
        job_id = await embedded.submit()
        await embedded.work("--updates", 2)
        [archive] = await embedded.artifacts(job_id, "archive")
        [file] = archive.files
        contents.append(await embedded.content(archive, file["name"]))
        assert sha256(contents[-1]).hexdigest() == file["sha256"]
    assert contents[0] == contents[1]
    with tarfile.open(fileobj=io.BytesIO(contents[0])) as tar:
        assert tar.getnames() == ["adapter.json", "adapter_config.json"]
        assert {member.mtime for member in tar.getmembers()} == {0}
        assert json.load(tar.extractfile("adapter.json") or io.BytesIO())["state"] == chain(2)


async def test_a_cancel_takes_effect_and_leaves_the_partial_policy(fleet: Fleet) -> None:
    job_id = await fleet.submit()
    async with fleet.working(*ENDLESS, "--rank"):
        await fleet.gets_to(job_id, 3)
        await fleet.wish(job_id, "cancel")

    job = await fleet.job(job_id)
    assert job.state == "cancelled"
    [*_, last] = await fleet.artifacts(job_id, "archive")
    assert last.update == job.update, "the policy at the moment of the stop"
    [*_, finished] = await fleet.events(job_id, "finished")
    assert finished.data == {"outcome": "stopped", "reason": "cancel"}
    fleet.no_engine_left()


async def test_a_pause_keeps_the_run_and_a_resume_goes_on(embedded: Fleet) -> None:
    job_id = await embedded.submit()
    async with embedded.working(*ENDLESS):
        await embedded.gets_to(job_id, 3)
        await embedded.wish(job_id, "pause")
    paused = await embedded.job(job_id)
    assert paused.state == "paused"

    await embedded.wish(job_id, "run")
    await embedded.work("--updates", paused.update + 2)

    job = await embedded.job(job_id)
    assert (job.state, job.attempt, job.update) == ("succeeded", 2, paused.update + 2)
    [*_, last] = await embedded.artifacts(job_id, "export")
    assert json.loads(await embedded.content(last, "adapter.json"))["state"] == chain(job.update)
    assert [event.data["to"] for event in await embedded.events(job_id, "rewound")] == [paused.update]


async def test_a_worker_that_is_to_leave_gives_the_job_back_unspent(embedded: Fleet) -> None:
    job_id = await embedded.submit()
    leaving = threading.Event()
    async with embedded.working(*ENDLESS, "--rank", leaving=leaving.is_set):
        await embedded.gets_to(job_id, 3)
        leaving.set()

    job = await embedded.job(job_id)
    assert (job.state, job.stalled_attempts, job.worker) == ("queued", 0, None)
    [*_, checkpoint] = await embedded.artifacts(job_id, "checkpoint")
    assert checkpoint.update == job.update, "saved at the moment of the stop"
    embedded.no_engine_left()


async def test_a_worker_that_is_to_leave_claims_nothing(embedded: Fleet) -> None:
    job_id = await embedded.submit()
    await embedded.work(leaving=lambda: True)
    assert (await embedded.job(job_id)).state == "queued"


async def test_a_crash_fails_the_job_with_the_last_of_its_log(fleet: Fleet) -> None:
    job_id = await fleet.submit()
    await fleet.work("--crash-at", 3, "--updates", 9, "--rank")

    job = await fleet.job(job_id)
    assert (job.state, job.error_code, job.update) == ("failed", "crash", 3)
    assert job.error_message == "The engine ended with exit status 3 and said nothing about why; see the log."
    assert (job.error_log_tail or "").endswith("Traceback: the stand-in was told to crash")
    assert [made.update for made in await fleet.artifacts(job_id, "export")] == [2]
    fleet.no_engine_left()


async def test_an_engine_that_is_killed_says_by_what(embedded: Fleet) -> None:
    job_id = await embedded.submit()
    await embedded.work("--die-at", 1)
    job = await embedded.job(job_id)
    assert (job.state, job.error_code) == ("failed", "crash")
    assert "signal 9 (Killed)" in (job.error_message or "")


async def test_a_failure_keeps_the_engines_reason(embedded: Fleet) -> None:
    job_id = await embedded.submit()
    await embedded.work("--fail-at", 2, "--reason", "oom")
    job = await embedded.job(job_id)
    assert (job.state, job.error_code) == ("failed", "oom")
    assert job.error_message == "The stand-in ended: oom."
    assert [event.update for event in await embedded.events(job.id, "metrics")] == [1, 2]


@pytest.mark.parametrize("memory_ends_at", [1, 3], ids=["before a checkpoint", "after one"])
async def test_an_engine_without_memory_is_started_once_more_and_no_event_is_lost_or_kept_twice(
    embedded: Fleet, memory_ends_at: int
) -> None:
    job_id = await embedded.submit()
    await embedded.work("--out-of-memory-at", memory_ends_at, "--updates", 6, "--save-every", 2)

    job = await embedded.job(job_id)
    assert (job.state, job.attempt, job.update) == ("succeeded", 1, 6)
    assert starts(await embedded.log(job_id)) == 2
    said = await embedded.events(job_id)
    keys = [event.key for event in said if event.type not in ("state", "artifact")]
    rewound = [] if memory_ends_at == 1 else ["rewound:a1:2"]
    assert sorted(keys) == sorted(
        [
            *("started", "warning:begun_again:1", *rewound, "finished"),
            *(f"metrics:{update}" for update in range(1, 7)),
            *(f"checkpoint:{update}" for update in (2, 4, 6)),
        ]
    )
    assert [event.update for event in said if event.type == "metrics"] == [1, 2, 3, 4, 5, 6]
    [warning] = [event for event in said if event.type == "warning"]
    assert (warning.data["code"], warning.data["update"]) == ("out_of_memory", 1)


async def test_the_next_attempt_knows_how_much_fits(embedded: Fleet) -> None:
    job_id = await embedded.submit()
    async with embedded.working(*ENDLESS, "--out-of-memory-at", 1):
        await embedded.gets_to(job_id, 3)
        await embedded.wish(job_id, "pause")
    paused = await embedded.job(job_id)

    await embedded.wish(job_id, "run")
    await embedded.work("--out-of-memory-at", paused.update, "--updates", paused.update + 2)

    assert (await embedded.job(job_id)).state == "succeeded"
    assert [starts(await embedded.log(job_id, attempt)) for attempt in (1, 2)] == [2, 1]


async def test_after_a_failure_the_worker_takes_the_next_job(embedded: Fleet) -> None:
    made = [await embedded.submit(), await embedded.submit()]
    await embedded.work("--crash-at", 1)
    assert [(await embedded.job(job_id)).error_code for job_id in made] == ["crash", "crash"]


async def test_an_engine_that_ignores_the_stop_is_ended_after_the_grace_period(embedded: Fleet) -> None:
    job_id = await embedded.submit()
    async with embedded.working("--hang-at", 3, "--updates", 9, "--rank", stop_grace_seconds=0.5):
        await embedded.gets_to(job_id, 3)
        await embedded.wish(job_id, "cancel")

    assert (await embedded.job(job_id)).state == "cancelled"
    assert [made.update for made in await embedded.artifacts(job_id, "export")] == [2]
    embedded.no_engine_left()


async def test_a_cancel_is_heard_before_the_engine_starts(embedded: Fleet) -> None:
    job_id = await embedded.submit()
    config = embedded.settings.model_roots[0] / "tiny" / "config.json"
    config.unlink()
    os.mkfifo(config)  # whoever reads it waits
    try:
        async with embedded.working(*ENDLESS):
            await embedded.reaches(job_id, "running")
            await embedded.wish(job_id, "cancel")
    finally:
        config.open("wb").close()
    assert (await embedded.job(job_id)).state == "cancelled"
    assert await embedded.artifacts(job_id, "log") == []


async def test_a_lost_fence_ends_the_engine_and_writes_nothing_more(fleet: Fleet) -> None:
    job_id = await fleet.submit()
    async with fleet.working(*ENDLESS, "--rank"):
        await fleet.gets_to(job_id, 3)
        await fleet.take_away(job_id)
        before = len(await fleet.events(job_id))

    job = await fleet.job(job_id)
    assert (job.state, job.worker) == ("running", "somebody else")
    assert len(await fleet.events(job_id)) == before
    fleet.no_engine_left()


async def test_garbage_among_the_events_ends_the_attempts(embedded: Fleet) -> None:
    job_id = await embedded.submit()
    for _ in range(3):
        await embedded.work("--garble-at", 0, "--save-every", 1_000_000, *ENDLESS)

    job = await embedded.job(job_id)
    assert (job.state, job.error_code, job.attempt) == ("failed", "worker_error", 3)
    assert "the last: ValidationError" in (job.error_message or "")
    assert "arguments" in (job.error_log_tail or ""), "the engine's log, also where it was never uploaded"
    embedded.no_engine_left()


async def test_a_machine_whose_disk_is_broken_fails_no_job(embedded: Fleet) -> None:
    made = [await embedded.submit(), await embedded.submit()]
    embedded.runs_dir.touch()
    for _ in range(4):
        await embedded.work()
    for job_id in made:
        assert (await embedded.job(job_id)).state == "queued"
    assert (await embedded.job(made[0])).stalled_attempts == 0

    embedded.runs_dir.unlink()
    await embedded.work()
    assert [(await embedded.job(job_id)).state for job_id in made] == ["succeeded", "succeeded"]


async def test_what_only_the_worker_can_check_fails_the_job(embedded: Fleet) -> None:
    job_id = await embedded.submit({**SPEC, "ppo": {**SPEC["ppo"], "response_length": 128}})
    await embedded.work()

    job = await embedded.job(job_id)
    assert (job.state, job.error_code) == ("failed", "invalid_spec")
    assert [issue["loc"] for issue in job.error_issues or []] == [["ppo", "response_length"]]
    assert "128 given; the model has 128 positions" in (job.error_message or "")


async def test_a_broken_model_is_told_by_the_name_it_was_given(embedded: Fleet) -> None:
    (embedded.settings.model_roots[0] / "tiny" / "config.json").write_text("{")
    job_id = await embedded.submit()
    await embedded.work()
    message = (await embedded.job(job_id)).error_message or ""
    assert "tiny/config.json" in message
    assert str(embedded.directory) not in message


async def test_a_model_outside_the_allowed_roots_is_refused(embedded: Fleet) -> None:
    job_id = await embedded.submit({**SPEC, "model": {"type": "local", "path": "/etc"}})
    await embedded.work()
    job = await embedded.job(job_id)
    assert (job.state, job.error_code) == ("failed", "invalid_spec")
    assert [issue["loc"] for issue in job.error_issues or []] == [["model", "path"]]


async def test_without_a_gpu_nothing_is_claimed_unless_the_operator_allows_it(embedded: Fleet) -> None:
    job_id = await embedded.submit()
    await embedded.work(allow_cpu=False)
    assert (await embedded.job(job_id)).state == "queued"


async def test_the_engine_sees_nothing_of_the_workers_secrets(
    embedded: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROXIMA_DATABASE_URL", "postgresql://user:password@host/name")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job_id = await embedded.submit()
    await embedded.work()

    told = json.loads((await embedded.log(job_id)).splitlines()[0])
    names = set(told["environment"])
    assert not [name for name in names if name.startswith(("PROXIMA", "AWS"))]
    assert names & {"PATH", "OMP_NUM_THREADS"} == {"PATH", "OMP_NUM_THREADS"}
    assert told["environment"]["CUDA_VISIBLE_DEVICES"] == ""
    assert told["arguments"][-2:] == ["--attempt", "1"]


async def test_the_engine_gets_the_secrets_that_its_spec_names(
    embedded: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROXIMA_SECRET_JUDGE", "ours")
    monkeypatch.setenv("PROXIMA_SECRET_OTHER", "theirs")
    judge = {
        "type": "plugin",
        "name": "judge",
        "plugin": "happiness",
        "options": {"key": {"secret": "JUDGE"}},
    }
    job_id = await embedded.submit({**SPEC, "rewards": [judge]})
    await embedded.work()

    environment = json.loads((await embedded.log(job_id)).splitlines()[0])["environment"]
    given = {name: value for name, value in environment.items() if name.startswith("PROXIMA")}
    assert given == {"PROXIMA_SECRET_JUDGE": "ours"}


async def test_the_engine_gets_what_the_trackers_of_its_spec_need(
    embedded: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "key")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token")
    job_id = await embedded.submit({**SPEC, "report_to": ["wandb"]})
    await embedded.work()

    environment = json.loads((await embedded.log(job_id)).splitlines()[0])["environment"]
    given = {name: value for name, value in environment.items() if name.startswith(("WANDB", "MLFLOW"))}
    assert given == {"WANDB_API_KEY": "key"}


async def test_the_engine_gets_the_key_and_the_leave_that_a_server_is_asked_with(
    embedded: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROXIMA_SECRET_SIGNING", "whsec_ours")
    server = {
        "type": "http",
        "name": "judge",
        "url": "http://10.0.0.7/score",
        "signing_key": {"secret": "SIGNING"},
    }
    for allowed, expected in ((False, {}), (True, {"PROXIMA_HTTP_ALLOW_PRIVATE": "1"})):
        embedded.settings = embedded.settings.model_copy(update={"http_allow_private": allowed})
        job_id = await embedded.submit({**SPEC, "rewards": [server]})
        await embedded.work()

        environment = json.loads((await embedded.log(job_id)).splitlines()[0])["environment"]
        given = {name: value for name, value in environment.items() if name.startswith("PROXIMA")}
        assert given == {"PROXIMA_SECRET_SIGNING": "whsec_ours", **expected}


async def test_an_ended_loop_leaves_no_engine(embedded: Fleet) -> None:
    job_id = await embedded.submit()
    task = asyncio.create_task(embedded.work(*ENDLESS, "--rank"))
    await embedded.gets_to(job_id, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert embedded.engines() == []
