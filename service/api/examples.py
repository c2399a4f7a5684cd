"""What answers look like: one of each, for the documentation, by the name of its schema.

They are of one job: LoRA on a model of half a billion weights, with the spec that requests show.
"""

from __future__ import annotations

from typing import Any

from ppo_engine.spec import parse
from service.specs import SPEC_EXAMPLE

_CREATED_AT = "2026-11-23T10:00:00Z"
_SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_METRICS = {"objective/scores": 0.41, "objective/kl": 0.02, "reward/polite": 0.41}

PLAN: dict[str, Any] = {
    "world_size": 1,
    "batch_size": 64,
    "local_batch_size": 64,
    "micro_batch_size": 8,
    "mini_batch_size": 16,
    "local_mini_batch_size": 16,
    "total_episodes": 4096,
    "num_total_batches": 64,
    "optimizer_steps": 1024,
    "parameters_trained": 8_798_209,
    "memory": {"policy": 1_976_131_072, "gradients": 35_192_836, "optimizer": 70_385_672},
    "warnings": [],
}

JOB: dict[str, Any] = {
    "object": "job",
    "id": "job_0190f3a2b4c57d8e9f00112233445577",
    "name": "polite",
    "state": "running",
    "wanted": "run",
    "attempt": 1,
    "created_at": _CREATED_AT,
    "started_at": "2026-11-23T10:00:01Z",
    "finished_at": None,
    "update": 12,
    "total_updates": 64,
    "error": None,
    "spec": parse(SPEC_EXAMPLE).model_dump(mode="json"),
    "plan": PLAN,
    "metadata": {"team": "support"},
}

FILE: dict[str, Any] = {
    "object": "file",
    "id": SPEC_EXAMPLE["prompts"]["train"],
    "filename": "prompts.jsonl",
    "purpose": "prompts",
    "bytes": 52_310,
    "sha256": _SHA256,
    "rows": 1024,
    "columns": ["prompt", "label"],
    "format": "jsonl",
    "created_at": _CREATED_AT,
}

EVENT: dict[str, Any] = {
    "seq": 15,
    "key": "metrics:12",
    "type": "metrics",
    "attempt": 1,
    "update": 12,
    "created_at": _CREATED_AT,
    "data": _METRICS,
}

CHECKPOINT: dict[str, Any] = {
    "object": "checkpoint",
    "update": 50,
    "attempt": 1,
    "created_at": _CREATED_AT,
    "files": [
        {"name": "adapter_config.json", "size": 1034, "sha256": _SHA256},
        {"name": "adapter_model.safetensors", "size": 35_237_104, "sha256": _SHA256},
    ],
    "metrics": _METRICS,
}

METRICS_ROW: dict[str, Any] = {"update": 12, "metrics": _METRICS}
SAMPLES_ROW: dict[str, Any] = {
    "update": 12,
    "samples": [
        {
            "kind": "eval/greedy",
            "prompt": "Can you help me?",
            "response": "Of course, please go on.",
            "score": 1.0,
            "rewards": {"polite": 1.0},
        }
    ],
}


def _page(item: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": [item], "has_more": False}


BY_SCHEMA: dict[str, dict[str, Any]] = {
    "Plan": PLAN,
    "Job": JOB,
    "File": FILE,
    "Checkpoint": CHECKPOINT,
    "Deleted": {"object": "job", "id": JOB["id"], "deleted": True},
    "Health": {"status": "ok"},
    "Page_Job_": _page(JOB),
    "Page_File_": _page(FILE),
    "Page_Event_": _page(EVENT),
    "Page_Checkpoint_": _page(CHECKPOINT),
    "Page_MetricsRow_": _page(METRICS_ROW),
    "Page_SamplesRow_": _page(SAMPLES_ROW),
}
