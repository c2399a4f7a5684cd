"""One of several processes of a test: runs scenarios one after the other, and writes down what each saw.

    accelerate launch ... python -m tests.engine.ranks OUTPUT SCENARIO ...

Starting processes costs many seconds and a scenario hardly one, so a group of them goes through many. A
scenario is a function of a directory that all processes share; called in a test, it runs in one process.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from ppo_engine import PPOTrainer
from ppo_engine.__main__ import main as engine
from ppo_engine.actor_critic import causal_lm
from ppo_engine.draws import Purpose
from ppo_engine.learn import NotFinite
from ppo_engine.parallel import Parallel
from ppo_engine.rewards import NamedReward, RewardBatch, Scorer
from ppo_engine.run_dir import Acks, Control, RunDir
from tests.engine import tiny
from tests.engine.training import GOOD, PROMPTS, likes_seven, make_run, trainer

RANK = int(os.environ.get("RANK", "0"))
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
SAID = (
    "objective/scores",
    "objective/kl",
    "loss/policy_avg",
    "loss/value_avg",
    "policy/grad_norm",
    "optimizer_steps",
)


def make(directory: Path, changes: dict[str, Any] | None = None, **given: Any) -> PPOTrainer:
    """A trainer of three updates of 16 rows, over however many processes there are."""
    here = {"gradient_accumulation_steps": 4 // PROCESSES, "ddp_timeout": 60}
    if PROCESSES > 1:
        here["ddp_backend"] = "gloo"
    return trainer(directory, changes={**here, **(changes or {})}, **given)


def said(made: PPOTrainer) -> dict[str, list[float]]:
    history = [entry for entry in made.state.log_history if "objective/kl" in entry]
    return {name: [entry[name] for entry in history] for name in SAID}


def weights(made: PPOTrainer) -> dict[str, torch.Tensor]:
    return made.parallel.state_dict(made.model, trained_only=True)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


def exported(made: PPOTrainer, directory: Path) -> dict[str, Any]:
    """The tensors of an export by name: their shapes, and the sum of their entries' absolute values."""
    made.save_model(str(directory))
    made.parallel.barrier()
    file = next(directory.glob("*model.safetensors"))
    tensors = load_file(file)
    return {name: [list(weight.shape), float(weight.abs().sum())] for name, weight in tensors.items()}


def dense(batch: RewardBatch) -> list[list[float]]:
    return [[float(token == GOOD) for token in ids] for ids in batch.response_ids]


# DDP ---------------------------------------------------------------------------------------------------


def full(directory: Path) -> dict[str, Any]:
    """All weights, a dense reward, whitened rewards; then evaluation on a number of rows that is odd."""
    seen: list[str] = []

    def looks(batch: RewardBatch) -> list[list[float]]:
        seen.extend(batch.prompts)
        return dense(batch)

    made = make(directory, {"whiten_rewards": True}, lora=False, reward_model=[looks, likes_seven])
    made.train()
    seen.clear()
    evaluated = made.evaluate(PROMPTS[:5])
    one_row = made.evaluate(PROMPTS[:1])
    return {
        "said": said(made),
        "evaluated": [evaluated, one_row],
        "seen": list(seen),
        "export": exported(made, directory / "out"),
        "wrapper": type(made.model_wrapped).__name__,
    }


def lora(directory: Path) -> dict[str, Any]:
    made = make(directory)
    made.train()
    return {"said": said(made), "export": exported(made, directory / "out")}


def resume(directory: Path, **given: Any) -> dict[str, Any]:
    """Whether a run that goes on from its first update's checkpoint ends as the run that never stopped."""
    build = sharded if "stage" in given else make
    given["changes"] = {"save_strategy": "steps", "save_steps": 1}
    whole = build(directory, **given)
    whole.train()
    resumed = build(directory, **given)
    fresh = weights(resumed)
    resumed.train(resume_from_checkpoint=directory / "checkpoint-1")
    return {
        "same weights": same(weights(whole), weights(resumed)),
        "same metrics": said(whole) == said(resumed),
        "moved": not same(weights(resumed), fresh),
        "updates": resumed.state.global_step,
    }


def diverged(made: PPOTrainer) -> str:
    """What is said where the logits of one process are no numbers."""
    if RANK == PROCESSES - 1:
        causal_lm(made.model.policy).lm_head.register_forward_hook(lambda *call: call[2] * math.nan)
    try:
        made.train()
    except FloatingPointError as error:
        return str(error)
    return "nothing was raised"


@contextmanager
def reward(function: Callable[[RewardBatch], list[float]]) -> Any:
    """Inside, the program's rewards are this function."""
    scorer = Scorer([NamedReward("seven", function)])
    with mock.patch("ppo_engine.program.build", return_value=scorer):
        yield


def run_of(directory: Path, **changes: Any) -> RunDir:
    """A run directory that the first process makes for all."""
    accumulation = {"gradient_accumulation_steps": 4 // PROCESSES}
    ppo = {**accumulation, **changes.pop("ppo", {})}
    if RANK == 0:
        policy_dir = directory / "policy"
        tiny.save(tiny.policy(), tiny.tokenizer(), policy_dir)
        given = {"resources": {"gpus": PROCESSES}, **changes}
        made = make_run(directory / "making", policy_dir, ppo=ppo, **given)
        made.path.rename(directory / "run")
    while not (directory / "run").exists():
        time.sleep(0.01)
    return RunDir(directory / "run")


def program(run_dir: RunDir) -> dict[str, Any]:
    """Run the program; its exit status here, and the one result there is."""
    status = engine([str(run_dir.path)])
    torch.distributed.barrier()
    result = run_dir.read_result()
    torch.distributed.barrier()
    assert result is not None
    return {"status": status, **result.model_dump(mode="json")}


def reward_fails(directory: Path) -> dict[str, Any]:
    def broken(batch: RewardBatch) -> list[float]:
        if RANK == PROCESSES - 1:
            raise OSError("the disk is on fire")
        return likes_seven(batch)

    run_dir = run_of(directory)
    with reward(broken):
        return program(run_dir)


def spec_for_one_process(directory: Path) -> dict[str, Any]:
    return program(run_of(directory, resources={"gpus": 1}))


def stopped_twice(directory: Path) -> dict[str, Any]:
    """A signal that reaches one process only, then a wish to pause, then on to the end; and neither."""
    updates = 0

    def interrupting(batch: RewardBatch) -> list[float]:
        nonlocal updates
        updates += 1
        if updates == 2 and RANK == PROCESSES - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if updates == 4 and RANK == 0:
            run_dir.write_control(Control(wanted="pause"))
        return likes_seven(batch)

    run_dir = run_of(directory)
    ends = []
    with reward(interrupting):
        for _ in range(3):
            ends.append(program(run_dir))
            if RANK == 0:
                run_dir.write_control(Control())
    quiet = run_of(directory / "quiet")
    with reward(likes_seven):
        ends.append(program(quiet))
    adapters = [(run.export(6) / "adapter_model.safetensors").read_bytes() for run in (run_dir, quiet)]
    return {
        "ends": [[end["outcome"], end["reason"], end["update"]] for end in ends],
        "same": adapters[0] == adapters[1],
        "checkpoints": run_dir.complete_checkpoints(),
    }


def slow_uploads(directory: Path) -> dict[str, Any]:
    """Checkpoints are taken away only once the last process has been asked again and again to wait."""
    run_dir = run_of(directory, ppo={"save_steps": 1, "total_episodes": 48})
    if RANK == 0:
        run_dir.write_acks(Acks())
    asked, ask = [], Parallel.any

    def patient(parallel: Parallel, flag: bool) -> bool:
        asked.append(flag)
        if RANK == PROCESSES - 1 and len(asked) == 9:  # two of them of the checkpoints that need not wait
            run_dir.write_acks(Acks(checkpoints=(1, 2, 3)))
        return ask(parallel, flag)

    with mock.patch.object(Parallel, "any", patient):
        result = program(run_dir)
    acks = run_dir.read_acks()
    assert acks is not None
    return {**result, "acks": acks.checkpoints}


# DeepSpeed ---------------------------------------------------------------------------------------------


def sharded(directory: Path, stage: int, changes: dict[str, Any] | None = None, **given: Any) -> PPOTrainer:
    """A trainer under ZeRO in which no weight is too small to be sharded; of one process, a plain one."""
    if PROCESSES == 1:
        return make(directory, changes, **given)
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
    prepare = Accelerator.prepare

    def none_is_small(accelerator: Accelerator, *modules: Any) -> Any:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return prepare(accelerator, *modules)

    with mock.patch.object(Accelerator, "prepare", none_is_small):
        made = make(directory, changes, **given)
    assert made.parallel.zero_stage == stage
    return made


def trained(
    directory: Path, stage: int, changes: dict[str, Any] | None = None, **given: Any
) -> dict[str, Any]:
    made = sharded(directory, stage, changes, **given)
    start = weights(made)
    made.train()
    return {
        "said": said(made),
        "moved": not same(weights(made), start),
        "export": exported(made, directory / "out"),
    }


# Rows end at very different times, and few are sampled at once: the processes need unlike numbers of steps.
UNEVEN = {"response_length": 24, "local_rollout_forward_batch_size": 2, "total_episodes": 16}


def uneven(directory: Path, gathers: bool) -> dict[str, Any]:
    """Responses, and the forwards that this process needed for them."""
    made = sharded(directory, 3, {**UNEVEN, "ds3_gather_for_generation": gathers})
    sample = made.collector.sample
    forwards: list[None] = []
    responses: list[list[list[int]]] = []

    def counted(model: Any, *arguments: Any, **more: Any) -> Any:
        hook = model.lm_head.register_forward_hook(lambda *_: forwards.append(None))
        rollout = sample(model, *arguments, **more)
        hook.remove()
        responses.append(rollout.response_ids)
        return rollout

    with mock.patch.object(made.collector, "sample", counted):
        made.train()
    return {"said": said(made), "forwards": len(forwards), "responses": responses}


def rollout_fails(directory: Path) -> list[str]:
    """The weights that this process still holds whole after a rollout that failed, and one more forward."""
    made = sharded(directory, 3)
    rollout = made._sample(made.prompts[:2], 1, Purpose.ROLLOUT, 1.0)
    with mock.patch.object(made.collector, "sample", side_effect=TimeoutError), suppress(TimeoutError):
        made.train()
    made.learner.score(made.model_wrapped, rollout, with_value=True)
    return [name for name, weight in made.model.named_parameters() if weight.numel()]


def spoiled(directory: Path, stage: int, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Gradients of one process are no numbers, then its loss is none; then all is well and the run begins."""
    made = sharded(directory, stage, {"total_episodes": 16, **(changes or {})}, lora=False)
    start, losses = weights(made), made.learner._losses

    def no_gradients(*arguments: Any) -> Any:
        loss, sums = losses(*arguments)
        if RANK == PROCESSES - 1:
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss, sums

    def no_loss(*arguments: Any) -> Any:
        loss, sums = losses(*arguments)
        return (loss + math.nan, sums * math.nan) if RANK == PROCESSES - 1 else (loss, sums)

    errors = []
    for spoil in (no_gradients, no_loss):
        with mock.patch.object(made.learner, "_losses", spoil):
            try:
                made.train()
            except NotFinite as error:
                errors.append(str(error))
    untouched = same(start, weights(made))
    made.train()
    return {"errors": errors, "untouched": untouched, "said": said(made)}


def nothing_to_load(directory: Path) -> list[str]:
    """A checkpoint without DeepSpeed's files, and one of which DeepSpeed says that it has loaded nothing."""
    made = sharded(directory, 2)
    (directory / "empty").mkdir(exist_ok=True)
    (directory / "unread" / "zero").mkdir(parents=True, exist_ok=True)
    errors = []
    with mock.patch.object(made.model_wrapped, "load_checkpoint", return_value=(None, None)):
        for name in ("empty", "unread"):
            try:
                made.parallel.load_state(directory / name, made.model_wrapped, made.optimizer)
            except FileNotFoundError as error:
                errors.append(str(error))
    return errors


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    "full": full,
    "lora": lora,
    "resume": resume,
    "diverged": lambda directory: diverged(make(directory)),
    "reward_fails": reward_fails,
    "stopped_twice": stopped_twice,
    "slow_uploads": slow_uploads,
    "spec_for_one_process": spec_for_one_process,
    "zero_1": lambda directory: trained(directory, 1, lora=False),
    "zero_2": lambda directory: trained(directory, 2),
    "zero_3": lambda directory: trained(directory, 3, lora=False),
    "zero_2_bf16": lambda directory: trained(directory, 2, {"bf16": True}),
    "zero_2_resume": lambda directory: resume(directory, stage=2),
    "zero_3_resume": lambda directory: resume(directory, stage=3, lora=False),
    "gathered": lambda directory: uneven(directory, gathers=True),
    "rollout_fails": rollout_fails,
    "in_step": lambda directory: uneven(directory, gathers=False),
    "diverged_in_step": lambda directory: diverged(
        sharded(directory, 3, {**UNEVEN, "ds3_gather_for_generation": False})
    ),
    "zero_2_spoiled": lambda directory: spoiled(directory, 2),
    "zero_3_spoiled": lambda directory: spoiled(directory, 3),
    "zero_2_spoiled_bf16": lambda directory: spoiled(directory, 2, {"bf16": True}),
    "zero_3_spoiled_bf16": lambda directory: spoiled(directory, 3, {"bf16": True}),
    "nothing_to_load": nothing_to_load,
}


def main(output: str, *names: str) -> None:
    for name in names:
        directory = Path(output) / name
        directory.mkdir(exist_ok=True)
        try:
            seen = {"seen": SCENARIOS[name](directory)}
        except Exception as error:
            traceback.print_exc()
            seen = {"error": f"{type(error).__name__}: {error}"}
        (Path(output) / f"{name}.{RANK}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
