"""The client's side of the service benchmark, in a process of its own: speaks HTTP and nothing else.

Prints one JSON object. `create` posts jobs over some number of connections at once; `submit` posts jobs one
after another and notes when each was seen running, and when its first update was seen.
"""

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=["create", "submit"])
    parser.add_argument("--url", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--connections", type=int, default=1)
    options = parser.parse_args()
    task = create if options.task == "create" else submit
    print(json.dumps(asyncio.run(task(options))))


def client(options: argparse.Namespace) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=options.url,
        headers={"Authorization": f"Bearer {options.key}"},
        timeout=120,
        trust_env=False,
        limits=httpx.Limits(max_connections=options.connections + 1),
    )


async def create(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds for all jobs together, and the latency of each."""
    async with client(options) as http:
        body = job(options.model, await upload(http))
        await http.post("/v1/jobs", json=body)
        latencies: list[float] = []
        numbers = iter(range(options.jobs))
        began = time.perf_counter()
        posters = [post_all(http, body, numbers, latencies) for _ in range(options.connections)]
        await asyncio.gather(*posters)
        seconds = time.perf_counter() - began
    return {"connections": options.connections, "seconds": seconds, "latencies": latencies}


async def post_all(
    http: httpx.AsyncClient, body: dict[str, Any], numbers: Iterator[int], latencies: list[float]
) -> None:
    """One connection: posts until the shared numbers run out."""
    for number in numbers:
        began = time.perf_counter()
        answer = await http.post("/v1/jobs", json={**body, "name": f"load {number}"})
        latencies.append(time.perf_counter() - began)
        answer.raise_for_status()


async def submit(options: argparse.Namespace) -> dict[str, Any]:
    """For each job: seconds from the POST until it is seen running, and until its first update is seen."""
    running, updated = [], []
    async with client(options) as http:
        body = job(options.model, await upload(http))
        for _ in range(options.jobs):
            began = time.perf_counter()
            answer = await http.post("/v1/jobs", json=body)
            answer.raise_for_status()
            seen = {name: moment - began async for name, moment in milestones(http, answer.json()["id"])}
            running.append(seen["running"])
            updated.append(seen["metrics"])
    return {"running": running, "updated": updated}


async def milestones(http: httpx.AsyncClient, job_id: str) -> AsyncIterator[tuple[str, float]]:
    """The states and the first update of a job with the time each was seen, until the stream ends."""
    headers = {"Accept": "text/event-stream"}
    seen: set[str] = set()
    async with http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as stream:
        async for line in stream.aiter_lines():
            if not line.startswith("data:"):
                continue
            event = json.loads(line.removeprefix("data:"))
            name = event["data"]["state"] if event["type"] == "state" else event["type"]
            if name == "failed":
                raise RuntimeError(f"{job_id} failed: {event}")
            if name not in seen:
                seen.add(name)
                yield name, time.perf_counter()


async def upload(http: httpx.AsyncClient) -> str:
    """A small prompt file; returns its id."""
    rows = "".join(json.dumps({"prompt": f"w{number} w{number + 1}"}) + "\n" for number in range(2, 66))
    answer = await http.post(
        "/v1/files", data={"purpose": "prompts"}, files={"file": ("prompts.jsonl", rows.encode())}
    )
    answer.raise_for_status()
    file_id: str = answer.json()["id"]
    return file_id


def job(model: str, file_id: str) -> dict[str, Any]:
    """A job of one small update."""
    return {
        "spec": {
            "model": {"type": "local", "path": str(Path(model).resolve())},
            "prompts": {"train": file_id},
            "method": {"type": "lora"},
            "rewards": [{"type": "length", "name": "short", "target": 4}],
            "ppo": {"total_episodes": 8, "per_device_train_batch_size": 8, "response_length": 8},
        }
    }


if __name__ == "__main__":
    main()
