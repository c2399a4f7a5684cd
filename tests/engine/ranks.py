"""One of several processes of a test: runs scenarios one after the other, and writes down what each saw.

    accelerate launch ... python -m tests.engine.ranks OUTPUT SCENARIO ...

Starting processes costs many seconds and a scenario hardly one, so a group of them goes through many. A
scenario is a function of a directory that all processes share; called in a test, it runs in one process.
"""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ppo_engine import PPOTrainer, load_reward_adapter
from ppo_engine.__main__ import main as engine
from ppo_engine.actor_critic import causal_lm
from ppo_engine.adapters import parameters_of
from ppo_engine.batch import Experience
from ppo_engine.draws import Purpose
from ppo_engine.learn import NotFinite
from ppo_engine.memory import OutOfMemory
from ppo_engine.parallel import Parallel
from ppo_engine.rewards import NamedReward, RewardBatch, Scorer
from ppo_engine.run_dir import Acks, Control, RunDir
from tests.engine import tiny
from tests.engine.scarcity import scarce, scarce_reward, told_of_memory
from tests.engine.training import GOOD, PROMPTS, STOP, likes_seven, make_run, trainer, value_model

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


def said(made: PPOTrainer, names: tuple[str, ...] = SAID) -> dict[str, list[float]]:
    history = [entry for entry in made.state.log_history if "objective/kl" in entry]
    return {name: [entry[name] for entry in history] for name in names}


def weights(made: PPOTrainer) -> dict[str, torch.Tensor]:
    return made.parallel.state_dict(made.model, trained_only=True)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


def exported(made: PPOTrainer, directory: Path) -> dict[str, Any]:
    """The tensors of an export by name: their shapes, and the sum of their entries' absolute values."""
    made.save_model(str(directory))
    made.parallel.barrier()
    return sizes(directory)


def sizes(directory: Path) -> dict[str, Any]:
    tensors = load_file(next(directory.glob("*model.safetensors")))
    return {name: [list(weight.shape), float(weight.abs().sum())] for name, weight in tensors.items()}


def told(made: PPOTrainer) -> dict[str, Any]:
    """What the modules were told: the adapters that compute, what is trained, and modes."""
    return {
        "adapters": [
            (name, module._active_adapter, module._disable_adapters)
            for name, module in made.model.named_modules()
            if isinstance(module, BaseTunerLayer)
        ],
        "trained": [(name, weight.requires_grad) for name, weight in made.model.named_parameters()],
        "modes": [(name, module.training) for name, module in made.model.named_modules()],
    }


def spoil(made: PPOTrainer) -> None:
    """Change all that can be told, and fail."""
    made.model.policy.set_adapter("judge")
    made.model.policy.train()
    made.model.policy.requires_grad_(True)
    raise OSError("planted")


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
    shown: list[dict[str, Any]] = []
    made.log_samples = lambda samples, update: shown.extend(samples)  # type: ignore[method-assign]
    evaluated = made.evaluate(PROMPTS[:5])
    one_row = made.evaluate(PROMPTS[:1])
    return {
        "said": said(made),
        "evaluated": [evaluated, one_row],
        "shown": shown,
        "seen": list(seen),
        "export": exported(made, directory / "out"),
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


def is_critic(name: str) -> bool:
    return name.startswith(("value_head.", "value_model."))


class Moves(TrainerCallback):
    """After each update: how far any weight of the policy (False) has moved in it, and any of the critic."""

    def __init__(self) -> None:
        self.made: PPOTrainer | None = None
        self.steps: list[dict[bool, float]] = []

    def on_train_begin(self, *given: Any, **named: Any) -> None:
        assert self.made is not None
        self.before = weights(self.made)

    def on_step_end(self, *given: Any, **named: Any) -> None:
        assert self.made is not None
        now = weights(self.made)
        moved = {name: float((now[name] - weight).abs().max()) for name, weight in self.before.items()}
        self.steps.append(
            {
                role: max(move for name, move in moved.items() if is_critic(name) == role)
                for role in (True, False)
            }
        )
        self.before = now


def warmup(directory: Path, stage: int = 0, **given: Any) -> dict[str, Any]:
    """Three updates of the critic alone, then one of both; an optimizer step in each."""
    changes = {"critic_warmup": 3, "num_ppo_epochs": 1, "num_mini_batches": 1, "total_episodes": 64}
    moves = Moves()
    given = {"callbacks": [moves], "changes": {**changes, "lr_scheduler_type": "constant"}, **given}
    moves.made = made = sharded(directory, stage, **given) if stage else make(directory, **given)
    made.train()
    history = [entry for entry in made.state.log_history if "lr" in entry]
    return {
        "policy moved": [step[False] > 0 for step in moves.steps],
        "critic moved": [step[True] > 0 for step in moves.steps],
        "first step": moves.steps[-1][False] / made.args.learning_rate,
        "lr": [entry["lr"] for entry in history],
        "lr/critic": [entry["lr/critic"] for entry in history],
    }


RARE = tiny.WORDS.index("nine")


def made_up() -> Experience:
    """Eleven rows of unlike lengths, the same in every process; one response alone has the rare token."""
    draw = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(6, RARE, (length,), generator=draw).tolist()

    def drawn(scale: float) -> torch.Tensor:
        return scale * torch.randn(11, 9, generator=draw) * mask

    lengths = torch.tensor([9, 1, 4, 7, 2, 9, 3, 5, 1, 8, 6])
    mask = torch.arange(9) < lengths[:, None]
    responses = [ids(length) for length in lengths.tolist()]
    responses[3][2] = RARE
    logprobs = -2 * mask + drawn(0.3)
    return Experience(
        prompt_ids=[ids(1 + row % 4) for row in range(11)],
        response_ids=responses,
        response_lengths_B=lengths,
        logprobs_BR=logprobs,
        ref_logprobs_BR=logprobs + drawn(0.1),
        rewards_BR=drawn(1.0),
        advantages_BR=drawn(1.0),
        values_BR=drawn(0.1),
        returns_BR=drawn(1.0),
        mask_BR=mask,
        weights_BR=mask.float(),
    )


def two_steps(directory: Path) -> dict[str, Any]:
    """On the same experience: the first step's gradients, the weights after the second; both flat, by name.

    Of the policy's own weights one is for a rare token, which one process sees, and one is never used.
    """
    model = tiny.policy()
    model.model.rare = torch.nn.Parameter(torch.full((16,), 0.5))
    model.model.unused = torch.nn.Parameter(torch.ones(3))

    def shifted(_: Any, given: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        is_rare = given[0] == RARE
        return output + is_rare[..., None] * model.model.rare if is_rare.any() else output

    model.model.embed_tokens.register_forward_hook(shifted)
    changes = {"num_ppo_epochs": 2, "num_mini_batches": 1, "max_grad_norm": 0.0, "weight_decay": 0.1}
    made = make(directory, {**changes, "per_device_train_batch_size": 2}, lora=False, model=model)
    seen: list[dict[str, list[float]]] = []

    def look(*_: Any) -> None:
        named = made.model.named_parameters()
        seen.append({name: it.grad.flatten().tolist() for name, it in named if it.grad is not None})

    made.optimizer.optimizer.register_step_pre_hook(look)
    made.learner.update(made_up(), 1, made.kl_coef)
    assert len(seen) == 2
    after = {name: weight.flatten().tolist() for name, weight in weights(made).items()}
    return {"gradients": seen[0], "weights": after}


def drawn_apart(directory: Path, stage: int = 0) -> dict[str, list[float]]:
    """Each role's sizes of weights, where every process has drawn all of them for itself."""
    judge, critic = tiny.reward_model(), value_model()
    torch.manual_seed(RANK)
    for role in (judge, critic):
        for tensor in (*role.parameters(), *role.buffers()):
            torch.nn.init.normal_(tensor)
    build = partial(sharded, stage=stage) if stage else make
    made = build(
        directory,
        lora=False,
        model=tiny.policy(RANK),
        ref_model=tiny.policy(10 + RANK),
        value_model=critic,
        reward_model=judge,
    )
    (scored,) = made.collector.scorer.rewards
    assert made.reference is not None
    roles = {"reference": made.reference, "reward": scored.reward.model}
    kept = {"trained": weights(made), **{name: dict(role.named_parameters()) for name, role in roles.items()}}
    kept |= {
        f"{name}'s buffers": dict(role.named_buffers())
        for name, role in {"trained": made.model, **roles}.items()
    }
    return {
        name: [float(tensor.detach().double().abs().sum()) for tensor in tensors.values()]
        for name, tensors in kept.items()
    }


CHOICES: dict[str, dict[str, Any]] = {
    "gae": {
        **{"kl_placement": "loss", "kl_estimator": "k2"},
        **{"adaptive_kl_target": 0.1, "adaptive_kl_horizon": 32.0, "early_stop_kl": 1e-3},
        **{"normalize_scores": True, "score_clip": 2.0, "loss_aggregation": "sequence_mean"},
        **{"cliprange_high": 0.3, "dual_clip": 3.0, "entropy_coef": 0.01, "critic_learning_rate": 1e-3},
    },
    "rloo": {"advantage_estimator": "rloo", "num_return_sequences": 4, "loss_aggregation": "sequence_mean"},
    "grpo": {"advantage_estimator": "grpo", "num_return_sequences": 8, "kl_estimator": "k3"},
    "reinforce++": {"advantage_estimator": "reinforce++", "gamma": 0.9, "whiten_rewards": True},
}
"""Choices of the algorithm, whose runs are alike in any number of processes."""
TOLD = tuple(name for name in SAID if name != "loss/value_avg")


def chosen(directory: Path, stage: int = 0) -> dict[str, Any]:
    """What is said of a run with each of the choices."""
    runs = {}
    for name, changes in CHOICES.items():
        place = directory / name.strip("+")
        made = sharded(place, stage, changes) if stage else make(place, changes)
        made.train()
        runs[name] = said(made, (*TOLD, "objective/kl_coef", "objective/rlhf_reward", "policy/entropy_avg"))
    return runs


def out_of_memory(directory: Path) -> dict[str, Any]:
    """Memory ends on the last process alone, in each kind of work, where more than two rows are computed."""
    made = make(directory)
    heard = told_of_memory(made)
    with ExitStack() as stack:
        if RANK == PROCESSES - 1:
            for where in ("rollout", "scoring", "backward"):
                stack.enter_context(scarce(made, 2, where=where))
        made.train()
    return {"said": said(made), "export": exported(made, directory / "out"), "heard": heard}


def reward_out_of_memory(directory: Path) -> dict[str, Any]:
    """Memory ends in the last process's reward model: where it takes more than two rows, then in any case."""
    is_last, judge, hopeless = RANK == PROCESSES - 1, tiny.reward_model(), tiny.reward_model()
    made = make(directory, reward_model=judge)
    heard = told_of_memory(made)
    with scarce_reward(judge, 2 if is_last else 16):
        made.train()
    end = "nothing was raised"
    with scarce_reward(hopeless, 0 if is_last else 16):
        try:
            make(directory, reward_model=hopeless).train()
        except OutOfMemory as error:
            end = str(error)
    return {"said": said(made), "heard": heard, "halvings": made.room.halvings, "end": end}


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


@contextmanager
def none_too_small() -> Iterator[None]:
    """Inside, ZeRO-3 shards every weight that is prepared."""
    prepare = Accelerator.prepare

    def prepared(accelerator: Accelerator, *modules: Any) -> Any:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return prepare(accelerator, *modules)

    with mock.patch.object(Accelerator, "prepare", prepared):
        yield


def sharded(
    directory: Path,
    stage: int,
    changes: dict[str, Any] | None = None,
    *,
    offload: str = "none",
    **given: Any,
) -> PPOTrainer:
    """A trainer under ZeRO in which no weight is too small to be sharded; of one process, a plain one.

    offload: the device that the optimizer's states are moved to.
    """
    if PROCESSES == 1:
        return make(directory, changes, **given)
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
    os.environ["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] = offload
    with none_too_small():
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
    """Responses, the forwards that this process needed for them, and what it held whole or in shards then."""
    made = sharded(directory, 3, {**UNEVEN, "ds3_gather_for_generation": gathers}, value_model=value_model())
    sample = made.collector.sample
    whole: set[str] = set()
    in_shards: set[str] = set()
    forwards: list[None] = []
    responses: list[list[list[int]]] = []

    def counted(model: Any, *arguments: Any, **more: Any) -> Any:
        hook = model.lm_head.register_forward_hook(lambda *_: forwards.append(None))
        for name, weight in made.model.named_parameters():
            (whole if weight.numel() else in_shards).add("critic" if is_critic(name) else "policy")
        rollout = sample(model, *arguments, **more)
        hook.remove()
        responses.append(rollout.response_ids)
        return rollout

    with mock.patch.object(made.collector, "sample", counted):
        made.train()
    return {
        "said": said(made),
        "forwards": len(forwards),
        "responses": responses,
        "held": {"whole": sorted(whole), "in shards": sorted(in_shards)},
    }


def in_turns(directory: Path, stage: int = 0) -> dict[str, Any]:
    """Of twelve rows, the first half's first turns are answered: with two processes, those of one of them."""
    answered = [row["prompt"] for row in PROMPTS[:6]]

    def environment(batch: RewardBatch) -> list[str | None]:
        rows = zip(batch.prompts, batch.response_ids, strict=True)
        return ["nine eight" if prompt in answered and ids.count(STOP) == 1 else None for prompt, ids in rows]

    changes = {"response_length": 24, "temperature": 0.5, "local_rollout_forward_batch_size": 2}
    if stage == 3:
        changes["ds3_gather_for_generation"] = False
    made = (
        sharded(directory, stage, changes, environment=environment)
        if stage
        else make(directory, changes, environment=environment)
    )
    rollout = made._sample(made.prompts[:12], 1, Purpose.ROLLOUT, 0.5)
    return {"ids": rollout.response_ids, "written": rollout.written}


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


# Four roles on one base --------------------------------------------------------------------------------


def roles(directory: Path, stage: int = 0) -> dict[str, Any]:
    """Policy, value, reward, and reference by adapters: trained, switched though that fails, exported."""
    judge = tiny.save_judge(directory / f"judge-{RANK}")
    model = load_reward_adapter(tiny.policy(), judge, "judge")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", modules_to_save=["lm_head"])
    model.add_adapter("sft", lora)
    torch.manual_seed(7)
    for weight in parameters_of(model, "sft").values():
        torch.nn.init.normal_(weight, std=0.1)
    names = {"reward_adapter_name": "judge", "ref_adapter_name": "sft", "value_adapter": True}
    changes = {**names, "gradient_checkpointing": True}
    made = (sharded if stage else make)(
        directory,
        **({"stage": stage} if stage else {}),
        changes=changes,
        model=model,
        peft_config=copy.deepcopy(lora),
        reward_model=None,
    )
    start, before = weights(made), told(made)
    switched = []
    for name in ("sft", None):
        made.args.ref_adapter_name = name
        with suppress(OSError), made.null_ref_context():
            switched.append(told(made) != before)
            spoil(made)
        switched.append(told(made) == before)
    made.args.ref_adapter_name = "sft"
    made.train()
    moved = weights(made)
    made.save_merged_model(str(directory / "merged"))
    made.parallel.barrier()
    return {
        "said": said(made, (*SAID, "reward/adapter")),
        "switched": switched,
        "moved": sorted({"~value" in name for name in moved if not torch.equal(moved[name], start[name])}),
        "untouched": same(moved, weights(made)),
        "export": exported(made, directory / "out"),
        "merged": sizes(directory / "merged"),
    }


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    "full": full,
    "lora": lora,
    "resume": resume,
    "warmup": warmup,
    "warmup_full": lambda directory: warmup(directory, lora=False),
    "two_steps": two_steps,
    "drawn_apart": drawn_apart,
    **{f"zero_{stage}_drawn_apart": partial(drawn_apart, stage=stage) for stage in (1, 2, 3)},
    "chosen": chosen,
    "in_turns": in_turns,
    "zero_3_in_turns": partial(in_turns, stage=3),
    "out_of_memory": out_of_memory,
    "reward_out_of_memory": reward_out_of_memory,
    "diverged": lambda directory: diverged(make(directory)),
    "reward_fails": reward_fails,
    "stopped_twice": stopped_twice,
    "slow_uploads": slow_uploads,
    "spec_for_one_process": spec_for_one_process,
    "zero_1": lambda directory: trained(directory, 1, lora=False),
    "zero_2": lambda directory: trained(directory, 2),
    "zero_3": lambda directory: trained(directory, 3, lora=False),
    "zero_1_offload": lambda directory: trained(directory, 1, offload="cpu"),
    "zero_2_offload": lambda directory: trained(directory, 2, offload="cpu", lora=False),
    "zero_3_offload": lambda directory: resume(directory, stage=3, offload="cpu"),
    "zero_2_bf16": lambda directory: trained(directory, 2, {"bf16": True}),
    "zero_2_warmup": lambda directory: warmup(directory, 2),
    "zero_3_warmup": lambda directory: warmup(directory, 3, lora=False),
    "zero_2_chosen": lambda directory: chosen(directory, 2),
    "zero_1_resume": lambda directory: resume(directory, stage=1),
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
    "roles": roles,
    **{f"zero_{stage}_roles": partial(roles, stage=stage) for stage in (1, 2, 3)},
}


def main(output: str, *names: str) -> None:
    for name in names:
        directory = Path(output) / name
        directory.mkdir(exist_ok=True)
        unset_hf_deepspeed_config()  # else models of this one could be made in the last one's shards
        try:
            seen = {"seen": SCENARIOS[name](directory)}
        except Exception as error:
            traceback.print_exc()
            seen = {"error": f"{type(error).__name__}: {error}"}
        (Path(output) / f"{name}.{RANK}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
