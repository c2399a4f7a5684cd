"""The bell: tells workers through Celery that there is work in a queue.

It carries no truth. Workers find jobs in the database, and the reaper rings again for what is forgotten, so a
bell that is lost, doubled, or late does no harm. A task is sent by its name: its code is the worker's.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

from celery import Celery

from service import broker_files
from service.settings import Settings

TASK = "worker.train"

logger = logging.getLogger(__name__)

_FILES = "filesystem://"
_CONNECT_SECONDS = 3.0


def broker_config(settings: Settings) -> dict[str, Any]:
    """Celery's settings for the broker, the same for those who ring and those who listen."""
    common = {"broker_connection_timeout": _CONNECT_SECONDS, "task_ignore_result": True}
    if settings.broker_url.startswith(_FILES):
        return common | {
            "broker_url": _FILES,
            "broker_transport": "service.broker_files:Transport",
            "broker_transport_options": broker_files.options(Path(settings.broker_url.removeprefix(_FILES))),
        }
    return common | {
        "broker_url": settings.broker_url,
        "broker_transport_options": {"socket_connect_timeout": _CONNECT_SECONDS},
    }


class Bell:
    """Rings from a thread of its own: whoever asks for it waits for nothing, whatever the broker does.

    Asked for several times before it has rung, it rings once: one bell is enough for any number of jobs.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._asked: set[str] = set()
        self._change = threading.Condition()
        self._ringing = False
        threading.Thread(target=self._run, name="bell", daemon=True).start()

    def ring(self, queue: str) -> None:
        """Have the workers of a queue told, soon."""
        with self._change:
            self._asked.add(queue)
            self._change.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait until all that was asked for was rung, or failed; whether that came within so many seconds."""
        with self._change:
            return self._change.wait_for(lambda: not (self._asked or self._ringing), seconds)

    def _run(self) -> None:
        app = Celery("proxima-bell", set_as_current=False)
        app.conf.update(broker_config(self._settings))
        while True:
            with self._change:
                self._change.wait_for(lambda: bool(self._asked))
                queues, self._asked, self._ringing = self._asked, set(), True
            for queue in queues:
                _send(app, queue)
            with self._change:
                self._ringing = False
                self._change.notify_all()


def _send(app: Celery, queue: str) -> None:
    try:
        app.send_task(TASK, queue=queue, ignore_result=True, retry=False)
    except Exception as error:
        # Whatever a broker and its driver raise: the job is safe, and the reaper rings for it.
        logger.warning("No bell for queue %s: %s: %s", queue, type(error).__name__, error)


_bells: dict[tuple[int, str], Bell] = {}
_lock = threading.Lock()


def ring(settings: Settings, queue: str) -> Bell:
    """Tell the workers of a queue that there is work. Returns at once, and never fails.

    There is one bell for each broker in each process: threads and connections do not survive a fork.
    """
    with _lock:
        place = (os.getpid(), settings.broker_url)
        bell = _bells.get(place) or _bells.setdefault(place, Bell(settings))
    bell.ring(queue)
    return bell
