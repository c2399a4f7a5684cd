"""`python -m worker`: a worker, until it is told to leave (SIGTERM, or Ctrl-C)."""

from __future__ import annotations

import sys

from worker.app import app, gpus, settings

OPTIONS = ("--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "INFO")


def main() -> int:
    if not gpus and not settings.allow_cpu:
        sys.stderr.write(
            "No NVIDIA GPU is visible here; set PROXIMA_ALLOW_CPU=true to run jobs on the CPU.\n"
        )
        return 2
    app.worker_main(["worker", *OPTIONS, *sys.argv[1:]])
    return 0


if __name__ == "__main__":
    sys.exit(main())
