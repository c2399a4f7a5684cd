"""A job from POST to a policy in use: LoRA, full fine-tuning, and one that is cancelled on its way."""

import io
import tarfile
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from randomwalks.client import Proxima
from randomwalks.stack import Service
from safetensors.torch import load, load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import TINY
from tests.engine.tiny import WORDS

PROMPTS = [{"prompt": f"{first} {second}"} for first in WORDS[6:] for second in WORDS[6:]]
UPDATES = 3


def spec_of(proxima: Proxima, method: dict[str, Any], updates: int) -> dict[str, Any]:
    """A job that likes the word "seven"."""
    return {
        "model": {"type": "local", "path": TINY},
        "prompts": {"train": proxima.upload("prompts.jsonl", PROMPTS)},
        "method": method,
        "rewards": [{"name": "seven", "type": "regex", "pattern": "seven"}],
        "ppo": {
            "total_episodes": 16 * updates,
            "per_device_train_batch_size": 16,
            "response_length": 8,
            "learning_rate": 1e-2,
            "save_steps": 2,
        },
    }


def run(proxima: Proxima, method: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """Submit a job and follow it to its end; its id and its events."""
    job = proxima.create("e2e", spec_of(proxima, method, UPDATES), str(uuid.uuid4()))
    return job["id"], list(proxima.follow(job["id"]))


def logits_of(model: Any, directory: Path) -> Tensor:
    ids = AutoTokenizer.from_pretrained(directory)("one two three", return_tensors="pt").input_ids
    with torch.inference_mode():
        logits: Tensor = model.eval()(ids).logits
    return logits


def tensors_in(directory: Path) -> dict[str, Tensor]:
    """Everything that any file of weights in the directory holds."""
    weights = {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}
    assert not [path for path in directory.iterdir() if path.suffix in {".pt", ".bin", ".pth", ".pkl"}]
    return weights


def read_archive(service: Service, job_id: str) -> dict[str, bytes]:
    """The files of a job's archive: those of its newest checkpoint, byte for byte."""
    headers = {"Authorization": f"Bearer {service.key}"}

    def get(path: str) -> httpx.Response:
        url = f"{service.url}/v1/jobs/{job_id}/{path}"
        return httpx.get(url, headers=headers, timeout=60).raise_for_status()

    with tarfile.open(fileobj=io.BytesIO(get("adapter").content)) as tar:
        packed = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    newest = get("checkpoints").json()["data"][-1]
    url = f"checkpoints/{newest['update']}/files"
    assert packed == {file["name"]: get(f"{url}/{file['name']}").content for file in newest["files"]}
    return packed


def tensors_of(packed: dict[str, bytes]) -> set[str]:
    """The names of all tensors of an archive, whose other files are text."""
    weights = {name for name in packed if name.endswith(".safetensors")}
    for name in packed.keys() - weights:
        packed[name].decode()
    return {tensor for name in weights for tensor in load(packed[name])}


def check_events(events: list[dict[str, Any]]) -> None:
    """Numbered without gaps, every update in its order, and the states of a job that goes well."""
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    states = [event["data"]["state"] for event in events if event["type"] == "state"]
    assert states == ["queued", "running", "succeeded"]
    assert [event["update"] for event in events if event["type"] == "metrics"] == list(range(1, UPDATES + 1))


def test_a_lora_job_ends_as_an_adapter_that_peft_loads(
    proxima: Proxima, models: Path, tmp_path: Path
) -> None:
    job_id, events = run(proxima, {"type": "lora", "r": 4})
    check_events(events)
    adapter = proxima.download_adapter(job_id, tmp_path / "adapter")
    names = tensors_in(adapter)
    assert names
    assert all(".lora_" in name for name in names), "nothing but adapter weights is handed out"
    base = AutoModelForCausalLM.from_pretrained(models / TINY)
    before = logits_of(base, models / TINY)
    after = logits_of(PeftModel.from_pretrained(base, adapter), adapter)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize(
    "method",
    [
        {"type": "lora", "r": 4},
        {"type": "lora", "r": 4, "value": {"type": "model"}},
        {"type": "full"},
        {"type": "full", "value": {"type": "head"}},
    ],
    ids=lambda method: "-".join([method["type"], method.get("value", {}).get("type", "default")]),
)
def test_an_archive_holds_the_policy_and_nothing_else(
    proxima: Proxima, service: Service, models: Path, method: dict[str, Any]
) -> None:
    """Nothing of the value head, the critic, the optimizer, or the reference, by any name."""
    job_id, _ = run(proxima, method)
    found = tensors_of(read_archive(service, job_id))
    base = set(tensors_in(models / TINY))
    if method["type"] == "full":
        assert found == base
        return
    targets = [name for name in base if name.endswith("_proj.weight")]
    assert found == {
        f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"
        for name in targets
        for side in "AB"
    }


def test_a_full_job_ends_as_a_model_that_transformers_loads(
    proxima: Proxima, models: Path, tmp_path: Path
) -> None:
    job_id, events = run(proxima, {"type": "full"})
    check_events(events)
    directory = proxima.download_adapter(job_id, tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(models / TINY)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert tensors_in(directory).keys() == tensors_in(models / TINY).keys()
    assert not torch.allclose(logits_of(base, models / TINY), logits_of(model, directory))


def test_a_cancelled_job_keeps_what_it_learned(
    proxima: Proxima, service: Service, models: Path, tmp_path: Path
) -> None:
    job = proxima.create("e2e", spec_of(proxima, {"type": "lora", "r": 4}, 10_000), str(uuid.uuid4()))
    states = []
    for event in proxima.follow(job["id"]):
        if event["key"] == "metrics:2":
            url, key = f"{service.url}/v1/jobs/{job['id']}/cancel", f"Bearer {service.key}"
            assert httpx.post(url, headers={"Authorization": key}).is_success
        if event["type"] == "state":
            states.append(event["data"]["state"])
    assert states == ["queued", "running", "cancelled"]
    assert 2 <= proxima.job(job["id"])["update"] < 10_000
    adapter = proxima.download_adapter(job["id"], tmp_path / "adapter")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models / TINY), adapter)


def test_a_prompt_longer_than_the_context_fails_its_job_and_the_worker_takes_the_next(
    proxima: Proxima,
) -> None:
    long = {"prompt": " ".join([WORDS[6]] * 600)}
    spec = spec_of(proxima, {"type": "lora", "r": 4}, 1)
    bad = spec | {"prompts": {"train": proxima.upload("long.jsonl", [*PROMPTS, long])}}
    ids = [proxima.create("e2e", one, str(uuid.uuid4()))["id"] for one in (bad, spec)]
    assert list(proxima.follow(ids[0]))[-1]["data"]["state"] == "failed"
    error = proxima.job(ids[0])["error"]
    assert error["code"] == "invalid_spec"
    [issue] = error["issues"]
    assert issue["loc"] == ["prompts", "train"]
    assert "a prompt of 601 tokens" in issue["msg"], "what was given: the tokenizer puts one before"
    assert "context less response_length" in issue["msg"], "the rule"
    assert "shorten" in issue["msg"], "the fix"
    assert "Traceback" not in error["message"] + error["log_tail"]
    assert list(proxima.follow(ids[1]))[-1]["data"]["state"] == "succeeded"


def test_a_job_submitted_twice_under_one_key_is_one_job(proxima: Proxima) -> None:
    spec, key = spec_of(proxima, {"type": "lora", "r": 4}, 1), str(uuid.uuid4())
    first, second = (proxima.create("e2e", spec, key) for _ in range(2))
    assert first["id"] == second["id"]
    assert list(proxima.follow(first["id"]))[-1]["data"]["state"] == "succeeded"


@pytest.mark.parametrize("path", ["../tiny", "/etc", "absent"])
def test_a_model_outside_the_allowed_directory_is_refused(proxima: Proxima, path: str) -> None:
    spec = spec_of(proxima, {"type": "lora"}, 1) | {"model": {"type": "local", "path": path}}
    with pytest.raises(Exception, match=r"spec\.model"):
        proxima.estimate(spec)
