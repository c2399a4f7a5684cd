"""Real text: the stories example, run as its README says, makes held-out stories happier than chance would.

Needs a small story model: `PROXIMA_STORIES_MODEL`, or `../shared/models/stories260k` beside the checkout.
"""

import json
import os
import statistics
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from happy_stories import happiness
from peft import PeftModel
from randomwalks.client import Proxima
from randomwalks.stack import running
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.servers import absent

CHECKOUT = Path(__file__).parents[2]
STORIES = CHECKOUT / "examples" / "stories"
STORIES_PER_PROMPT = 12


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (STORIES / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def model() -> Path:
    default = CHECKOUT.parent / "shared" / "models" / "stories260k"
    path = Path(os.environ.get("PROXIMA_STORIES_MODEL", default))
    if not path.is_dir():
        absent("A story model", f"set PROXIMA_STORIES_MODEL, or put one at {default}")
    return path.resolve()


@pytest.fixture(scope="module")
def stories_proxima(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxima]:
    with (
        running(tmp_path_factory.mktemp("stack"), model.parent) as service,
        Proxima(service.url, service.key) as proxima,
    ):
        yield proxima


def train(proxima: Proxima, model: Path, directory: Path) -> Path:
    """Submit the example's spec as it stands, with the ids of its uploaded files; gives the adapter."""
    spec = json.loads((STORIES / "spec.json").read_text())
    spec["model"]["path"] = model.name
    spec["prompts"] = {
        "train": proxima.upload("prompts.jsonl", rows_of("prompts.jsonl")),
        "eval": proxima.upload("heldout.jsonl", rows_of("heldout.jsonl")),
    }
    job_id = proxima.create("happier stories", spec, str(uuid.uuid4()))["id"]
    last = list(proxima.follow(job_id))[-1]
    assert last["data"]["state"] == "succeeded", proxima.job(job_id)["error"]
    return proxima.download_adapter(job_id, directory)


def write_stories(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Continue each prompt at temperature 1, always from the same seed."""
    torch.manual_seed(0)
    encoded = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        ids = model.eval().generate(**encoded, do_sample=True, top_k=0, max_new_tokens=48, eos_token_id=1)
    texts: list[str] = tokenizer.batch_decode(ids[:, encoded.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def test_held_out_stories_become_happier(
    stories_proxima: Proxima, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = train(stories_proxima, model, tmp_path / "adapter")
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    prompts = [row["prompt"] for row in rows_of("heldout.jsonl")] * STORIES_PER_PROMPT
    before = write_stories(AutoModelForCausalLM.from_pretrained(model), tokenizer, prompts)
    base = AutoModelForCausalLM.from_pretrained(model)
    after = write_stories(PeftModel.from_pretrained(base, adapter), tokenizer, prompts)
    score = happiness()
    scores = [score(SimpleNamespace(responses=texts)) for texts in (before, after)]
    gains = [new - old for old, new in zip(*scores, strict=True)]
    mean, error = statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5
    with capsys.disabled():
        sys.stdout.write(
            f"\n{len(gains)} held-out stories: happiness {statistics.mean(scores[0]):.2f} -> "
            f"{statistics.mean(scores[1]):.2f}, a gain of {mean:.2f} +- {error:.2f}\n"
            f"before: {prompts[0]} {before[0]}\nafter:  {prompts[0]} {after[0]}\n"
        )
    assert mean > 0.2
    assert mean > 5 * error
