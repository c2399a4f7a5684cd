"""The broker in a directory: nobody ever reads half of what another writes."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from celery import Celery

from service import queue
from service.settings import Settings

MESSAGES = 300
PAYLOAD = "x" * 100_000
SENDERS, TURNS = 4, 50
LIMIT_SECONDS = 300


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(broker_url=f"filesystem://{tmp_path}")


def ringer(settings: Settings) -> Celery:
    app = Celery("ringer", set_as_current=False)
    app.conf.update(queue.broker_config(settings))
    return app


def run_in_thread(work: object) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_message_is_whole_as_soon_as_it_is_seen(settings: Settings, tmp_path: Path):
    def send() -> None:
        with ringer(settings) as app:
            for _ in range(MESSAGES):
                app.send_task("worker.train", [PAYLOAD], queue="default")

    sender = run_in_thread(send)
    seen: set[Path] = set()
    while sender.is_alive() or len(seen) < MESSAGES:
        was_alive = sender.is_alive()
        for path in set((tmp_path / "messages").glob("[!.]*.default.msg")) - seen:
            assert json.loads(path.read_text())["headers"]["task"] == "worker.train"
            seen.add(path)
        assert was_alive or len(seen) == MESSAGES


def test_tables_are_written_and_read_at_once(settings: Settings):
    """Every sender begins by writing its queue into its exchange's table, which the others read."""
    start = threading.Barrier(SENDERS)
    failures: list[Exception] = []

    def bind(number: int) -> None:
        try:
            with ringer(settings).connection_for_write() as connection:
                for turn in range(TURNS):
                    start.wait(LIMIT_SECONDS)
                    connection.default_channel._queue_bind(f"jobs-{turn}", f"key-{number}", None, "default")
                    assert connection.default_channel.get_table(f"jobs-{turn}")
        except Exception as failure:  # told to the main thread
            failures.append(failure)
            start.abort()

    senders = [run_in_thread(lambda number=number: bind(number)) for number in range(SENDERS)]
    for sender in senders:
        sender.join()
    assert failures == []
    with ringer(settings).connection_for_read() as connection:
        for turn in range(TURNS):
            bound = {entry.routing_key for entry in connection.default_channel.get_table(f"jobs-{turn}")}
            assert bound == {f"key-{number}" for number in range(SENDERS)}
