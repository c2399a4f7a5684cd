"""The only file that speaks to other processes, and DeepSpeed: prepare, backward, clip, step, gather.

A loss handed to `backward` is this process's share of a sum whose denominator is global, so gradients are
summed over processes, never averaged. The reduced loss and norm are looked at before a step is taken.
Without DeepSpeed every process computes by itself, and gradients are summed once per optimizer step: so all
can begin a step again when one of them ran out of memory in it.
This module knows no PPO.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

_T = TypeVar("_T")
_EFFICIENT_TOKENS = {"cpu": 1280}
"""Of a forward and backward: with more of them, activations leave the cache, and nothing is gained."""
_ZERO = "zero"  # what DeepSpeed's part of a checkpoint is called
_BUCKET_BYTES = (
    25 * 2**20
)  # gradients that are summed over processes at a time, beside the gradients themselves


def before_processes_meet() -> None:
    """Keep DeepSpeed on a CPU from compiling an operator of its own, which gloo does without.

    The compilation takes most of a minute, and fails where there is no C++ compiler.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true" or torch.cuda.is_available():
        return
    import deepspeed.ops  # noqa: PLC0415  (an optional dependency)

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def has_bf16() -> bool:
    """Whether the device of this process computes in bf16; every CPU does."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported()


def processes_started() -> int:
    """How many processes the launcher has started, whether or not they have found each other."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def offload_of(plugin: Any) -> str:
    """In a spec's words, what accelerate's DeepSpeed plugin moves off the device; without a plugin, none."""
    device = "none" if plugin is None else plugin.offload_optimizer_device or "none"
    return {"none": "none", "cpu": "optimizer"}.get(device, device)


class Parallel:
    """The processes of a run, seen from one of them."""

    def __init__(self, accelerator: Accelerator, max_grad_norm: float) -> None:
        self.accelerator = accelerator
        self.max_grad_norm = max_grad_norm
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self.is_main: bool = accelerator.is_main_process
        self.efficient_tokens = _EFFICIENT_TOKENS.get(self.device.type)
        plugin = getattr(accelerator.state, "deepspeed_plugin", None)
        self.zero_stage: int | None = None if plugin is None else plugin.zero_stage

    # Preparing -----------------------------------------------------------------------------------------

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Wrap the trained module and its optimizer. DeepSpeed's own accumulation is off: we accumulate."""
        if self.zero_stage is not None:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            config["train_batch_size"] = self.world_size
            config["train_micro_batch_size_per_gpu"] = 1
            config["gradient_accumulation_steps"] = 1
            config["gradient_clipping"] = self.max_grad_norm
            config["zero_allow_untested_optimizer"] = True
            config["zero_force_ds_cpu_optimizer"] = False
            # Steps that are not finite are dropped in bf16 too, whatever a configuration file says.
            config.setdefault("bf16", {})["check_grad_overflow"] = True
            engine, sharding = self.accelerator.prepare(module, optimizer)
            self._from_first(module.buffers())  # DeepSpeed has done so with the weights
            return engine, sharding
        # To evaluate: accelerate's word for placing it and setting its precision, without DDP around it.
        prepared = self.accelerator.prepare_model(module, evaluation_mode=True)
        self.make_alike(module)
        return prepared, self.accelerator.prepare_optimizer(optimizer)

    def prepare_frozen(self, module: nn.Module, trained: nn.Module) -> nn.Module:
        """Place a module that only scores, alike everywhere; it is to round as the prepared one does."""
        if self.zero_stage is not None:
            engine: Any = trained
            dtype, _ = engine.get_data_types()
            # As DeepSpeed has cast what it trains: the weights, and not the buffers.
            for parameter in module.parameters():
                parameter.data = parameter.data.to(dtype)
        module.to(self.device)
        self.make_alike(module)
        return module

    def make_alike(self, module: nn.Module) -> None:
        """Give all processes the first one's weights: each may have drawn its own."""
        self._from_first((*module.parameters(), *module.buffers()))

    @torch.no_grad()
    def _from_first(self, tensors: Iterable[Tensor]) -> None:
        if self.world_size == 1:
            return
        for tensor in tensors:
            sent = tensor.to(self.device).contiguous()  # as NCCL has them
            torch.distributed.broadcast(sent, 0)
            if sent is not tensor:
                tensor.copy_(sent)

    def unwrap(self, module: nn.Module) -> Any:
        return self.accelerator.unwrap_model(module)

    # Stepping ------------------------------------------------------------------------------------------

    def backward(self, module: nn.Module, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradients; under DeepSpeed, processes meet at the `last` one of a step."""
        if self.zero_stage is not None:
            loss = loss * self.world_size  # DeepSpeed averages over processes; the loss is a share of a sum
            engine: Any = module
            engine.set_gradient_accumulation_boundary(last)
            # DeepSpeed looks at gradients only: a loss that is no number must not leave gradients that are.
            engine.backward(loss * (1 + (loss - loss).detach()))
            return
        loss.backward()  # type: ignore[no-untyped-call]

    def drop_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """As if no micro-batch of the step had been seen."""
        optimizer.zero_grad(set_to_none=True)

    def step(self, module: nn.Module, optimizer: torch.optim.Optimizer, loss: float) -> float | None:
        """Clip and apply the gradients, then clear them; `loss` is the step's, summed over processes.

        Returns the gradients' norm before clipping, or None where loss or norm was not finite: then
        nothing was applied, on any process.
        """
        if self.zero_stage is not None:
            return self._step_deepspeed(module)
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if self.world_size > 1:
            _sum_gradients(parameters)
        limit = self.max_grad_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        is_finite = _is_finite(loss) and _is_finite(norm)
        if is_finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm if is_finite else None

    def _step_deepspeed(self, module: nn.Module) -> float | None:
        """DeepSpeed drops a step whose norm is not finite itself, on all processes, and forgets its sums."""
        engine: Any = module
        engine.step()
        norm = float(engine.get_global_grad_norm())
        return norm if _is_finite(norm) and not engine.optimizer.overflow else None

    def forget(self, module: nn.Module, optimizer: torch.optim.Optimizer, groups: Collection[int]) -> None:
        """Drop what the optimizer knows of the parameters in some groups, as if it had taken no step."""
        inner: Any = getattr(optimizer, "optimizer", optimizer)
        if self.zero_stage is None:
            kept = [parameter for index in groups for parameter in inner.param_groups[index]["params"]]
        else:
            sharded: Any = module
            inner, kept = sharded.optimizer.optimizer, _shards(sharded.optimizer, groups)
        for parameter in kept:
            inner.state.pop(parameter, None)

    # Talking -------------------------------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes."""
        if self.world_size == 1:
            return tensor
        total: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return total

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item() > 0)

    def gather(self, value: _T) -> list[_T]:
        """Every process's value, by rank."""
        gathered: list[_T] = gather_object([value]) if self.world_size > 1 else [value]
        return gathered

    @contextmanager
    def together(self, *kinds: type[Exception]) -> Iterator[None]:
        """Around what each process does for itself: an error of these kinds on any is raised on all of them.

        Else the others would wait for the one that failed, and die of that.
        """
        failure: Exception | None = None
        try:
            yield
        except kinds as error:
            failure = error
        told = None if failure is None else _portable(failure)
        first = next((error for error in self.gather(told) if error is not None), None)
        if first is not None:
            raise failure or first

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    # Whole weights -------------------------------------------------------------------------------------

    @contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Inside, ZeRO-3 shards of these parameters are whole on every process. Elsewhere nothing happens."""
        if self.zero_stage != 3:
            yield
            return
        import deepspeed  # noqa: PLC0415  (an optional dependency)

        with deepspeed.zero.GatheredParameters(list(parameters)):
            yield

    @contextmanager
    def standing_alone(self, module: nn.Module, *parts: nn.Module) -> Iterator[None]:
        """Inside, forwards of parts of the prepared module need no other process; with ZeRO-3, no backward.

        Their weights are whole. That alone is not enough: hooks of ZeRO-3 take the weights of each submodule
        away after its forward, and ask all processes for them at the next one.
        """
        if self.zero_stage != 3:
            yield
            return
        engine: Any = module
        offload = engine.optimizer.parameter_offload
        with self.gathered(parameter for part in parts for parameter in part.parameters()):
            for hook in (*offload.forward_hooks, *offload.backward_hooks):
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                offload._register_deepspeed_module(offload.module)

    def state_dict(self, module: nn.Module, *, trained_only: bool) -> dict[str, Tensor]:
        """Whole weights on the CPU; on every process, by their names in the module given."""
        chosen = {
            name: parameter
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if parameter.requires_grad or not trained_only
        }
        with self.gathered(chosen.values()):
            return {name: parameter.detach().cpu().clone() for name, parameter in chosen.items()}

    # Full state ----------------------------------------------------------------------------------------

    def save_state(self, directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write trained weights and the optimizer's state; every process calls this."""
        if self.zero_stage is not None:
            engine: Any = module
            engine.save_checkpoint(str(directory), tag=_ZERO, exclude_frozen_parameters=True)
            return
        if self.is_main:
            state = {
                "weights": self.state_dict(self.unwrap(module), trained_only=True),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(state, directory / "training_state.pt")

    def load_state(self, directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Read back what `save_state` wrote. Raises FileNotFoundError where it is not there."""
        if self.zero_stage is not None:
            self._load_deepspeed(directory, module)
            return
        state = torch.load(directory / "training_state.pt", map_location="cpu", weights_only=True)
        parameters = dict(self.unwrap(module).named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, weight in state["weights"].items():
                parameters[name].copy_(weight)
        optimizer.load_state_dict(state["optimizer"])

    def _load_deepspeed(self, directory: Path, module: nn.Module) -> None:
        engine: Any = module
        loaded = None
        if (directory / _ZERO).is_dir():
            loaded, _ = engine.load_checkpoint(str(directory), _ZERO, load_module_strict=False)
        if loaded is None:  # what DeepSpeed cannot read it passes over, and goes on with the weights it has
            raise FileNotFoundError(f"{directory} holds no DeepSpeed state that can be loaded.")


def _sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum over processes, in place, a bucket at a time, in the order of the parameters on all of them.

    Those that no process has used keep none, as in one process: then an optimizer leaves them as they are.
    """
    buckets: dict[torch.dtype, list[Tensor]] = {}
    for parameter in _used(parameters):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket = buckets.setdefault(parameter.dtype, [])
        bucket.append(parameter.grad)
        if sum(gradient.nbytes for gradient in bucket) >= _BUCKET_BYTES:
            _sum_together(buckets.pop(parameter.dtype))
    for bucket in buckets.values():
        _sum_together(bucket)


def _used(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Those that have a gradient on any process."""
    counts = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
    counts = counts.to(parameters[0].device)
    torch.distributed.all_reduce(counts)
    return [parameter for parameter, count in zip(parameters, counts.tolist(), strict=True) if count]


def _sum_together(tensors: Sequence[Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    torch.distributed.all_reduce(flat)
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _shards(optimizer: Any, groups: Collection[int]) -> list[Tensor]:
    """This process's shards of the parameters in some groups, as DeepSpeed's inner optimizer keeps them."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        owner = optimizer.sub_group_to_group_id
        return [
            shard
            for index, shard in enumerate(optimizer.fp32_partitioned_groups_flat)
            if owner[index] in groups
        ]
    shards = getattr(optimizer, "single_partition_of_fp32_groups", None)
    if shards is None:  # ZeRO-1 in bf16
        shards = optimizer.fp32_groups_flat_partition
    return [shards[index] for index in groups]


def _is_finite(value: float) -> bool:
    return value == value and value not in (float("inf"), float("-inf"))


def _portable(error: Exception) -> Exception:
    """The error, or where it cannot be sent to another process and made again there, what it says."""
    try:
        made_again: Exception = pickle.loads(pickle.dumps(error))
    except Exception:  # somebody else's class: how it may fail here is its own affair
        return RuntimeError(f"{type(error).__name__}: {error}")
    return made_again
