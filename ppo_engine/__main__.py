"""`python -m ppo_engine RUN_DIR [--attempt N]`: turn a run directory into a trained policy.

However it ends, short of being killed, `result.json` says how; of several processes, the first one to fail
says why. The exit status is 0 unless the run failed, and nobody relies on it: launchers swallow it.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from ppo_engine.issues import Issue, SpecError
from ppo_engine.redaction import redacted
from ppo_engine.run_dir import Reason, Result, RunDir
from ppo_engine.spec import RunSpec
from ppo_engine.watch import Watch


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ppo_engine", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="holds spec.json and data/")
    parser.add_argument("--attempt", type=int, default=1, help="which try of the job this is")
    options = parser.parse_args(argv)
    run_dir, is_main = RunDir(options.run_dir), os.environ.get("RANK", "0") == "0"
    if not run_dir.spec.is_file():
        parser.error(f"{run_dir.spec} does not exist; a run directory holds spec.json and data/.")
    if is_main:
        run_dir.result.unlink(missing_ok=True)
    with Watch(run_dir, is_main=is_main) as watch:
        result = _run(run_dir, options.attempt, watch)
    if is_main or result.outcome == "failed" or result.reason == "oom":
        run_dir.write_result(result)
    # A launcher waits for the others while one ends well, and they for the one that ran out of memory.
    return 1 if result.outcome == "failed" or result.reason == "oom" else 0


def _run(run_dir: RunDir, attempt: int, watch: Watch) -> Result:
    try:
        return _train(run_dir, run_dir.read_spec(), attempt, watch)
    except SpecError as error:
        return _failed("spec", error, watch)
    except KeyboardInterrupt:
        message = f"Interrupted in update {watch.progress + 1}; the last checkpoint stands."
        return Result(outcome="stopped", reason="sigterm", update=watch.progress, message=message)
    except (Exception, SystemExit) as error:  # whatever it is, the worker must learn of it
        return _failed("crash", error, watch)


def _train(run_dir: RunDir, spec: RunSpec, attempt: int, watch: Watch) -> Result:
    # torch is loaded only now: a spec that cannot be has been told by then.
    from ppo_engine.checkpoint import CheckpointMismatch  # noqa: PLC0415
    from ppo_engine.learn import NotFinite  # noqa: PLC0415
    from ppo_engine.memory import OutOfMemory, is_out_of_memory  # noqa: PLC0415
    from ppo_engine.program import run  # noqa: PLC0415
    from ppo_engine.rewards import RewardError  # noqa: PLC0415

    try:
        return run(run_dir, spec, attempt, watch)
    except CheckpointMismatch as error:
        return _failed("spec", error, watch)
    except RewardError as error:
        return _failed("reward", error, watch)
    except (NotFinite, FloatingPointError) as error:
        return _failed("nan", error, watch)
    except OutOfMemory as error:
        return _failed("oom", error, watch)
    except (MemoryError, RuntimeError) as error:  # outside of what can be done with fewer rows
        if not is_out_of_memory(error):
            raise
        return _failed("oom", error, watch)


def _failed(reason: Reason, error: BaseException, watch: Watch) -> Result:
    # What a user did wrong is told whole by the message; a trace is for faults, ours and those of plug-ins.
    if reason in ("crash", "oom") or (reason == "reward" and error.__cause__ is not None):
        told = "".join(traceback.format_exception(error))
    else:
        told = f"{error}\n"
    sys.stderr.write(redacted(told))  # the log has readers too
    given = error.issues if isinstance(error, SpecError) else ()
    issues = tuple(Issue(loc=issue.loc, msg=redacted(issue.msg)) for issue in given)
    message = redacted(f"{type(error).__name__}: {error}" if reason == "crash" else str(error))
    return Result(outcome="failed", reason=reason, update=watch.progress, message=message, issues=issues)


if __name__ == "__main__":
    # Large tensors of a CPU in huge pages: the same numbers, sooner. torch reads it at its first one.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    sys.exit(main())
