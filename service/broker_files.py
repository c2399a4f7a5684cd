"""A Celery broker in a directory: kombu's filesystem transport, made safe for several processes.

Kombu's own shows a message's file before anything stands in it, and an exchange's table while it is
rewritten; whoever reads just then fails, and a worker dies of it. Here a message appears whole, and tables
are read and written under one lock.
"""

from __future__ import annotations

import fcntl
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kombu.transport import filesystem
from kombu.utils.json import dumps


class Channel(filesystem.Channel):  # type: ignore[misc]  # kombu has no types
    """A channel whose messages and tables are never seen half written."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for folder in (self.data_folder_in, self.control_folder):
            Path(folder).mkdir(parents=True, exist_ok=True)

    def _put(self, queue: str, payload: Any, **_: Any) -> None:
        # The name is what kombu's `_get` looks for: in order of time, with the queue behind the first dot.
        name = f"{time.time_ns() // 1_000_000}_{uuid.uuid4()}.{queue}.msg"
        folder = Path(self.data_folder_out)
        partial = folder / f".{name}"
        partial.write_text(dumps(payload))
        partial.rename(folder / name)

    def get_table(self, exchange: str) -> Any:
        with self._locked():
            return super().get_table(exchange)

    def _queue_bind(self, *binding: Any) -> None:
        with self._locked():
            super()._queue_bind(*binding)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.control_folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class Transport(filesystem.Transport):  # type: ignore[misc]  # kombu has no types
    """For `broker_transport = "service.broker_files:Transport"`."""

    Channel = Channel


def options(directory: Path) -> dict[str, Any]:
    """`broker_transport_options` for a directory."""
    messages = str(directory / "messages")
    return {
        "data_folder_in": messages,
        "data_folder_out": messages,
        "control_folder": str(directory / "control"),
        "polling_interval": 0.2,  # seconds
    }
