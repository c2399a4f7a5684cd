"""Why a run should stop: asked to, signalled, its lease over, or its parent gone.

Rank 0 reads `control.json`; every process watches its parent and signals. A run stops at the end of its
update; where that does not come within a grace period after the lease or the parent went, the process ends
itself: a worker that was stopped or killed can kill nothing.

The parent of a rank is its launcher, where there is one. That whoever started the launcher is gone cannot be
seen from here, but by the lease, which nobody renews then; a starter that wants the ranks to end sooner must
see to it that its launcher and they do not outlive it. Knows no torch.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from pydantic import ValidationError

from ppo_engine.run_dir import Reason, Result, RunDir

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 10.0
_POLITE = (signal.SIGTERM, signal.SIGINT)
EXIT_ABANDONED = 75


class Watch:
    """Looks out for reasons to stop, inside its context.

    progress: updates completed, for the result that is written when the process ends itself.
    """

    def __init__(self, run_dir: RunDir, *, is_main: bool) -> None:
        self.progress = 0
        self._run_dir, self._is_main = run_dir, is_main
        self._parent = os.getppid()
        self._signalled = False
        self._abandoned_since: float | None = None
        self._over = threading.Event()

    def __enter__(self) -> Watch:
        self._handlers = {number: signal.signal(number, self._on_signal) for number in _POLITE}
        threading.Thread(target=self._look_out, name="watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signalled:
            raise KeyboardInterrupt  # somebody at a terminal who does not want to wait for the update's end
        self._signalled = True

    def reason(self) -> Reason | None:
        """Why to stop now; None: go on."""
        if self._is_main:
            control = self._run_dir.read_control()
            if control.wanted != "run":
                return control.wanted
            if control.lease_until is not None and time.time() > control.lease_until:
                return "lease"
        if os.getppid() != self._parent:
            return "parent"
        return "sigterm" if self._signalled else None

    def _look_out(self) -> None:
        """Runs in a thread of its own, since an update, or a collective, may take long or for ever."""
        while not self._over.wait(_POLL_SECONDS):
            try:
                reason = self.reason()
            except (OSError, ValidationError):
                continue  # the file is unreadable for now; the lease it last named is asked for again
            if reason not in ("lease", "parent"):
                self._abandoned_since = None
                continue
            now = time.monotonic()
            self._abandoned_since = self._abandoned_since or now
            if now - self._abandoned_since > _GRACE_SECONDS:
                self._end(reason)

    def _end(self, reason: Reason) -> None:
        if self._is_main:
            message = f"Ended in the middle of update {self.progress + 1}; the last checkpoint stands."
            self._run_dir.write_result(
                Result(outcome="stopped", reason=reason, update=self.progress, message=message)
            )
        os._exit(EXIT_ABANDONED)
