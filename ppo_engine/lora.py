"""LoRA layers that add their change inside the matrix product, instead of in passes over its output.

peft computes W x + s B (A x) with two more passes over the whole output, and a third in the backward pass.
Here both go into the product. This module knows peft's plain linear layer; any other, and any special use of
it, is left to peft.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F


def fuse(policy: nn.Module) -> None:
    """Exchange the forward of every plain LoRA layer; weights, names, and adapters stay as they are."""
    if isinstance(policy, PeftModel):
        for module in policy.modules():
            if type(module) is Linear:
                module.__class__ = FusedLinear


class FusedLinear(Linear):  # type: ignore[misc]  # peft is published without types
    """`peft.tuners.lora.Linear` whose forward fuses where one plain adapter is active."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [..., in]; returns [..., out], equal to peft's but for rounding. N rows, R rank, I in, O out."""
        adapter = None if args or kwargs else self._only_adapter(x)
        if adapter is None:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        rows_NI = x.flatten(0, -2)
        result_NO: Tensor = self.base_layer(rows_NI)
        narrow_NR = F.linear(rows_NI, self.lora_A[adapter].weight)
        wide_RO, scale = self.lora_B[adapter].weight.t(), self.scaling[adapter]
        if type(self.base_layer) is nn.Linear:  # its backward pass does not need what it gave
            result_NO.addmm_(narrow_NR, wide_RO, alpha=scale)
        else:
            result_NO = torch.addmm(result_NO, narrow_NR, wide_RO, alpha=scale)
        return result_NO.view(*x.shape[:-1], -1)

    def _only_adapter(self, x: Tensor) -> str | None:
        """The one active adapter of this layer, where nothing about it is special; else None."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        adapter: str = self.active_adapters[0]
        if adapter not in self.lora_A or adapter in self.lora_variant or self.lora_bias[adapter]:
            return None
        weight = self.lora_A[adapter].weight
        is_sharded = hasattr(weight, "ds_id")  # ZeRO-3 gathers weights as their own module is called
        dropout = self.lora_dropout[adapter]
        has_dropout = self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0
        is_mixed = torch.is_autocast_enabled(x.device.type) or weight.dtype != x.dtype
        return None if is_sharded or has_dropout or is_mixed else adapter
