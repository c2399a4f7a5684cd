"""In bf16, what models compute is half as long; what losses are made of is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.training import trainer


@pytest.mark.parametrize("lora", [True, False])
def test_log_probabilities_advantages_and_losses_are_fp32(tmp_path: Path, lora: bool) -> None:
    made = trainer(tmp_path, lora=lora, changes={"bf16": True, "total_episodes": 16})
    computed: set[torch.dtype] = set()
    kept: set[torch.dtype] = set()
    losses = made.learner._losses

    def computes(module: nn.Module, arguments: Any, output: Any) -> None:
        computed.add(output.dtype)

    def looks(experience: Any, *more: Any) -> Any:
        loss, sums = losses(experience, *more)
        parts = ("logprobs", "ref_logprobs", "advantages", "values", "returns")
        kept.update(getattr(experience, f"{part}_BR").dtype for part in parts)
        kept.update({loss.dtype, sums.dtype})
        return loss, sums

    for name, module in made.model.named_modules():
        if name.endswith("q_proj"):
            module.register_forward_hook(computes)
    made.learner._losses = looks  # type: ignore[method-assign]
    made.train()

    assert computed == {torch.bfloat16}
    assert kept == {torch.float32}
    moments = [state["exp_avg"].dtype for state in made.optimizer.state.values()]
    assert set(moments) == {torch.float32}
