"""The Celery application of a worker: `python -m worker`, or `celery --app worker.app worker`.

The pool is `solo`: one process, which claims a job, runs its engine as a process group, and supervises it to
its end. Celery hears the bell and the signals; it knows nothing of jobs. A message is acknowledged before it
is acted on, since it carries no truth, and no result is kept. `docs/decisions/0003-*.md` says why.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import threading
from typing import Any

from celery import Celery, signals

from service.queue import TASK, broker_config
from service.settings import of_environment
from service.storage import Storage
from service.store.session import Store
from worker.launch import find_gpus
from worker.reaper import Reaper
from worker.settings import WorkerSettings
from worker.train import Worker, run_jobs

log = logging.getLogger(__name__)

settings = of_environment(WorkerSettings)
gpus = find_gpus(os.environ) if settings.gpus is None else settings.gpus

app = Celery("proxima", set_as_current=False)
app.conf.update(
    broker_config(settings),
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    task_default_queue=settings.queue,
    task_acks_late=False,
    worker_pool="solo",
    worker_concurrency=1,
    worker_prefetch_multiplier=1,
    worker_enable_remote_control=False,
    worker_send_task_events=False,
    worker_redirect_stdouts=False,
)

_name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
_leaving = threading.Event()
_busy = threading.Event()
_reaper = Reaper(settings, idle=lambda: not (_busy.is_set() or _leaving.is_set()))


@app.task(name=TASK, ignore_result=True)  # type: ignore[untyped-decorator]  # celery has no types
def train() -> None:
    """There is work: take up jobs until there is none."""
    _busy.set()
    try:
        asyncio.run(_train())
    finally:
        _busy.clear()


async def _train() -> None:
    store = Store.open(settings.database_url)
    storage = Storage.open(settings.storage_url, settings.storage_options)
    try:
        await run_jobs(Worker(settings, store, storage, _name, gpus, _leaving.is_set))
    finally:
        await store.close()


@signals.worker_ready.connect  # type: ignore[untyped-decorator]
def _on_ready(**_: Any) -> None:
    log.info("worker %s: %s", _name, f"GPUs {', '.join(gpus)}" if gpus else "no GPU")
    _reaper.start()


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _on_leave(**_: Any) -> None:
    """In a signal handler, in the middle of whatever runs: the beat sees it, and has the engine save."""
    _leaving.set()


@signals.worker_shutdown.connect  # type: ignore[untyped-decorator]
def _on_end(**_: Any) -> None:
    _reaper.stop()
