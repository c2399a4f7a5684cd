"""How good a policy is: sample walks from it with plain transformers, and look at them.

Knows nothing of Proxima: it loads a base model, and an adapter onto it, as anybody would.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from randomwalks.graph import MAX_NODES, Graph


@dataclass(frozen=True)
class Sample:
    """Walks sampled from a policy, and their mean optimality."""

    walks: Sequence[str]
    optimality: float


def sample(graph: Graph, base: Path, adapter: Path | None = None, per_start: int = 50) -> Sample:
    """Sample `per_start` walks from every start at temperature 1, the same ones each time."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = tokenizer(graph.starts * per_start, return_tensors="pt")
    torch.manual_seed(0)
    with torch.inference_mode():
        ids = model.eval().generate(**prompts, do_sample=True, top_k=0, max_new_tokens=MAX_NODES - 1)
    walks = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return Sample(walks, sum(map(graph.optimality, walks)) / len(walks))
