"""Which adapter of a peft model computes: switched in place, and nothing else is touched.

peft's own switches (`set_adapter`, `disable_adapter`) also change which weights are trained. Here the layers
are told which adapter computes, and afterwards told what they were told before. This module does not know
what adapters are for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

VALUE_ADAPTER = "~value"
"""The adapter of the critic; no user's adapter can have this name."""
REWARD_HEADS = "reward_heads"
"""Where a peft model has the score heads of reward adapters, by the adapter's name."""
_LAYERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


class Switch:
    """Of all layers of a peft model that hold adapters. Made once its adapters are all there."""

    def __init__(self, policy: nn.Module) -> None:
        self._layers: list[Any] = [module for module in policy.modules() if isinstance(module, _LAYERS)]
        self._adapters = [_adapters_of(layer) for layer in self._layers]

    @contextmanager
    def computing_with(self, adapter: str | None) -> Iterator[None]:
        """Inside, this adapter computes, or with None the base alone; afterwards all is as before."""
        with self.as_now():
            for layer, adapters in zip(self._layers, self._adapters, strict=True):
                layer._disable_adapters = adapter is None
                layer._active_adapter = [adapter] if adapter in adapters else []
            yield

    def as_now(self) -> AbstractContextManager[None]:
        """Inside, whenever that is, what computes now computes; afterwards, what did before."""
        return _State(self._layers)

    def recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` of `torch.utils.checkpoint`: a layer is recomputed with the adapter of its forward.

        The backward pass comes when another adapter is on again.
        """
        return nullcontext(), self.as_now()


class _State:
    """What the layers were told when this was made; it can be entered more than once."""

    def __init__(self, layers: list[Any]) -> None:
        self._layers, self._told = layers, _told(layers)
        self._before: list[list[tuple[Any, bool]]] = []

    def __enter__(self) -> None:
        self._before.append(_told(self._layers))
        self._tell(self._told)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tell(self._before.pop())

    def _tell(self, told: list[tuple[Any, bool]]) -> None:
        for layer, (active, disabled) in zip(self._layers, told, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def _adapters_of(layer: Any) -> set[str]:
    if isinstance(layer, BaseTunerLayer):
        return set(layer._all_available_adapter_names())
    return set(layer._adapters)


def _told(layers: list[Any]) -> list[tuple[Any, bool]]:
    return [(layer._active_adapter, layer._disable_adapters) for layer in layers]


def parameters_of(policy: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's own weights, by name."""
    return {
        before + adapter + after: weight for (before, after), weight in weights_of(policy, adapter).items()
    }


def weights_of(policy: nn.Module, adapter: str) -> dict[tuple[str, str], nn.Parameter]:
    """An adapter's own weights, by what stands before and after the adapter in their names."""
    found: dict[tuple[str, str], nn.Parameter] = {}
    for place, part in policy.named_modules():
        if isinstance(part, nn.ParameterDict) and adapter in part:
            found[f"{place}.", ""] = part[adapter]
        elif isinstance(part, nn.ModuleDict) and adapter in part:
            own = part[adapter].named_parameters()
            found |= {(f"{place}.", f".{name}"): weight for name, weight in own}
    return found
