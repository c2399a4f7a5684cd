"""A program that keeps the engine's side of the run-directory protocol, and nothing else of an engine.

    stand_in.py [options] RUN_DIR --attempt N

Its "policy" is a chain of digests, one link per update, so that a run that was killed and resumed can be told
from one that lost or repeated an update. The options make it behave badly, for the worker's sake.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from ppo_engine.events import BEGUN_AGAIN, Event, encode
from ppo_engine.run_dir import (
    MANIFEST,
    Halvings,
    Reason,
    Result,
    RunDir,
    complete_updates,
    damage,
    describe,
    read_manifest,
    write_atomic,
)

POLL_SECONDS = 0.02


def chain(updates: int) -> str:
    """The policy after so many updates."""
    state = ""
    for update in range(1, updates + 1):
        state = hashlib.sha256(f"{state}{update}".encode()).hexdigest()
    return state


class StandIn:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.run_dir = RunDir(options.run_dir)
        self.parent = os.getppid()
        self.sigterm = False
        self.update = 0
        self.state = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_sigterm)

    def _on_sigterm(self, number: int, frame: object) -> None:
        self.sigterm = True
        os.write(2, b"the stand-in was sent SIGTERM\n")

    def run(self) -> int:
        self.run_dir.read_spec()
        self.resume()
        self.say("started", "started", {"plan": {}, "versions": {}})
        if self.run_dir.halvings.exists():
            halvings = self.run_dir.read_halvings().model_dump()
            self.say("warning", BEGUN_AGAIN + str(halvings["update"]), {"code": "out_of_memory", **halvings})
        if self.options.rank:
            subprocess.Popen(
                [sys.executable, "-c", "import time; time.sleep(600)", str(self.run_dir.path)],
                start_new_session=True,
            )
        while self.update < self.options.updates:
            if reason := self.stop_reason():
                self.save()
                return self.end("stopped", reason)
            self.misbehave()
            self.step()
        self.save()
        return self.end("succeeded", "finished")

    def resume(self) -> None:
        """Go on from the last checkpoint; what was said after it is taken back, as the engine does."""
        whole = complete_updates(self.run_dir.checkpoints)
        if not whole:
            self.run_dir.events.unlink(missing_ok=True)
            return
        directory = self.run_dir.checkpoint(whole[-1])
        manifest = read_manifest(directory)
        assert manifest is not None
        assert damage(directory, manifest) is None
        kept = json.loads((directory / "state.json").read_text())
        self.update, self.state = kept["update"], kept["state"]
        if self.run_dir.events.exists():
            os.truncate(self.run_dir.events, kept["said"])
        else:
            self.say("rewound", f"rewound:a{self.options.attempt}:{self.update}", {"to": self.update})

    def step(self) -> None:
        time.sleep(self.options.seconds)
        self.update += 1
        self.state = hashlib.sha256(f"{self.state}{self.update}".encode()).hexdigest()
        self.say(
            "metrics", f"metrics:{self.update}", {"objective/scores": float(self.update), "nan": float("nan")}
        )
        if self.update % self.options.save_every == 0:
            self.save()

    def misbehave(self) -> None:
        """Do what the options ask for at this update."""
        if self.update == self.options.crash_at:
            sys.stderr.write("Traceback: the stand-in was told to crash\n")
            os._exit(3)
        if self.update == self.options.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.update == self.options.fail_at:
            sys.exit(self.end("failed", self.options.reason))
        if self.update == self.options.out_of_memory_at and not self.run_dir.halvings.exists():
            self.run_dir.write_halvings(Halvings(update=1))
            self.leave_result("stopped", "oom")
            sys.exit(1)
        if self.update == self.options.garble_at:
            with self.run_dir.events.open("ab") as file:
                file.write(b"no event\n")
        while self.update == self.options.hang_at:
            time.sleep(POLL_SECONDS)

    def stop_reason(self) -> Reason | None:
        control = self.run_dir.read_control()
        if control.wanted != "run":
            return control.wanted
        if self.sigterm:
            return "sigterm"
        if control.lease_until is not None and time.time() > control.lease_until:
            return "lease"
        return "parent" if os.getppid() != self.parent else None

    def save(self) -> None:
        """A checkpoint and an export of this update; then older checkpoints go, where they are safe."""
        if self.update in complete_updates(self.run_dir.exports):
            return
        state = {"update": self.update, "state": self.state}
        kept = {**state, "said": self.run_dir.events.stat().st_size}
        self.write(self.run_dir.checkpoint(self.update), {"state.json": kept, "part/optimizer.json": {}})
        self.write(self.run_dir.export(self.update), {"adapter_config.json": {}, "adapter.json": state})
        self.say("checkpoint", f"checkpoint:{self.update}", {"update": self.update, "metrics": {}})
        self.await_acks()

    def write(self, directory: Path, files: dict[str, object]) -> None:
        partial = directory.with_name(f".{directory.name}.partial")
        for name, content in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(json.dumps(content))
        manifest = describe(partial, self.update, {"objective/scores": float(self.update)})
        write_atomic(partial / MANIFEST, manifest.model_dump_json().encode())
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)

    def await_acks(self) -> None:
        """Go on when at most one checkpoint is not safe elsewhere."""
        while True:
            acks = self.run_dir.read_acks()
            present = self.run_dir.complete_checkpoints()
            safe = present if acks is None else [update for update in present if update in acks.checkpoints]
            if len(present) - len(safe) <= 1 or self.stop_reason():
                break
            time.sleep(POLL_SECONDS)
        for update in safe[:-1]:
            shutil.rmtree(self.run_dir.checkpoint(update))

    def say(self, kind: str, key: str, data: dict[str, object]) -> None:
        event = Event.model_validate(
            {"key": key, "type": kind, "update": self.update, "time": time.time(), "data": data}
        )
        with self.run_dir.events.open("ab") as file:
            file.write(encode(event))

    def end(self, outcome: str, reason: Reason) -> int:
        self.say("finished", "finished", {"outcome": outcome, "reason": reason})
        self.leave_result(outcome, reason)
        return 0 if outcome != "failed" else 1

    def leave_result(self, outcome: str, reason: Reason) -> None:
        message = f"The stand-in ended: {reason}."
        self.run_dir.write_result(
            Result.model_validate(
                {"outcome": outcome, "reason": reason, "update": self.update, "message": message}
            )
        )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument("--crash-at", type=int)
    parser.add_argument("--die-at", type=int)
    parser.add_argument("--hang-at", type=int)
    parser.add_argument("--garble-at", type=int)
    parser.add_argument("--fail-at", type=int)
    parser.add_argument("--out-of-memory-at", type=int)
    parser.add_argument("--reason", default="nan")
    parser.add_argument("--rank", action="store_true")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--attempt", type=int)
    sys.stderr.write(json.dumps({"environment": dict(os.environ), "arguments": sys.argv[1:]}) + "\n")
    return StandIn(parser.parse_args()).run()


if __name__ == "__main__":
    sys.exit(main())
