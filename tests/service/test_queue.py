"""The bell on a real broker of each kind: heard, keeping nobody waiting, and harmless when it is broken."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery

from service import queue
from service.settings import Settings
from tests.servers import free_port

LONG = 300.0  # seconds: reached only by a test that fails


@pytest.fixture(params=["redis", "filesystem"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    if request.param == "redis":
        return Settings(broker_url=request.getfixturevalue("redis_url"))
    return Settings(broker_url=f"filesystem://{tmp_path / 'broker'}")


@pytest.fixture
def listener(settings: Settings) -> Iterator[Celery]:
    app = Celery("listener", set_as_current=False)
    app.conf.update(queue.broker_config(settings))
    yield app
    app.close()


def messages(app: Celery, name: str) -> list[tuple[str, bool]]:
    """Takes all messages of a queue: the task of each, and whether its result is wanted."""
    heard = []
    with app.connection_for_read() as connection:
        inbox = app.amqp.queues[name](connection.default_channel)
        while message := inbox.get():
            heard.append((message.headers["task"], not message.headers["ignore_result"]))
            message.ack()
    return heard


def test_a_bell_is_heard_in_its_queue(settings: Settings, listener: Celery):
    for name in ("default", "large"):
        assert queue.ring(settings, name).wait(LONG)
    assert messages(listener, "default") == [("worker.train", False)]
    assert messages(listener, "large") == [("worker.train", False)]


def test_bells_that_come_together_ring_as_few(settings: Settings, listener: Celery):
    for _ in range(1000):
        bell = queue.ring(settings, "busy")
    assert bell.wait(LONG)
    assert 1 <= len(messages(listener, "busy")) < 1000


def test_one_process_has_one_bell(settings: Settings):
    assert queue.ring(settings, "default") is queue.ring(settings, "default")


def test_an_absent_broker_is_told_in_the_log_only(caplog: pytest.LogCaptureFixture):
    settings = Settings(broker_url=f"redis://127.0.0.1:{free_port()}/0")
    with caplog.at_level(logging.WARNING, logger="service.queue"):
        assert queue.ring(settings, "default").wait(LONG)
    assert "No bell for queue default" in caplog.text


def test_a_broker_that_says_nothing_keeps_nobody_waiting():
    """A server that accepts and never answers: the ringer is not held, and later rings are merged."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        settings = Settings(broker_url=f"redis://127.0.0.1:{mute.getsockname()[1]}/0")
        bell = queue.ring(settings, "default")
        for _ in range(100):
            queue.ring(settings, "default")
        assert not bell.wait(0.0)


@pytest.mark.parametrize("settings", ["filesystem"], indirect=True)
def test_a_broker_that_comes_back_is_rung_again(settings: Settings, listener: Celery, tmp_path: Path):
    messages_dir = tmp_path / "broker" / "messages"
    assert queue.ring(settings, "default").wait(LONG)
    for left in messages_dir.iterdir():
        left.unlink()
    messages_dir.rmdir()
    assert queue.ring(settings, "default").wait(LONG)
    messages_dir.mkdir()
    assert queue.ring(settings, "default").wait(LONG)
    assert len(messages(listener, "default")) == 1
