"""What docs/rewards.md says: its examples are right, every kind is in it, and its server and plug-in run."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest

from ppo_engine import reward_kinds
from ppo_engine.rewards import NamedReward, RewardError, Scorer
from ppo_engine.rewards.http import HttpReward, key_of, signature
from ppo_engine.spec import parse
from tests.engine.test_rewards import batch, built

DOCUMENT = (Path(__file__).parents[2] / "docs/rewards.md").read_text()
KEY = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
KINDS = {kind.model_fields["type"].default: kind for kind in get_args(get_args(reward_kinds.Reward)[0])}


def blocks(language: str, holding: str = "") -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    return [block for block in found if holding in block]


def run(code: str, **known: Any) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "documented", **known}
    exec(compile(code, "docs/rewards.md", "exec"), names)
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_a_section_with_an_example_that_is_right(kind: str) -> None:
    section = DOCUMENT.partition(f"\n### {kind}\n")[2].partition("\n### ")[0]
    example = json.loads(re.findall(r"```json\n(.*?)```", section, re.DOTALL)[0])
    assert example["type"] == kind
    adapter = {
        "method": {"type": "lora", "adapters": {"liked": {"type": "local", "path": "a"}}},
        "ppo": {"reward_adapter_name": "liked"},
    }
    parts = adapter if kind == "adapter" else {}
    parse({"model": {"type": "local", "path": "m"}, "prompts": {"train": "p"}, "rewards": [example], **parts})


def test_the_table_says_what_can_fail() -> None:
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\(#\w+\) \| [^|]* \| ([^|]*?) ?\|$", DOCUMENT, re.MULTILINE))
    assert {kind: bool(why) for kind, why in rows.items()} == {
        name: "fallback" in kind.model_fields for name, kind in KINDS.items()
    }


@contextmanager
def documented_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    [code] = blocks("python", "class Judge")
    assert code.count("\n") <= 36
    monkeypatch.setenv("SIGNING_KEY", KEY)
    judge: type[BaseHTTPRequestHandler] = run(code)["Judge"]
    monkeypatch.setattr(judge, "log_message", lambda *args: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), judge) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/score"
        server.shutdown()
        thread.join()


def test_the_server_verifies_signatures_and_gives_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = batch("Please, go on", "No", "I said please")
    with documented_server(monkeypatch) as url:
        spec = {"type": "http", "url": url, "signing_key": {"secret": "JUDGE"}, "batch_size": 2}
        monkeypatch.setenv("PROXIMA_HTTP_ALLOW_PRIVATE", "1")
        monkeypatch.setenv("PROXIMA_SECRET_JUDGE", KEY)
        assert built(spec)(rows).scores == [1, 0, 1]
        for key in (None, key_of("A" * 32)):
            [*found] = HttpReward(url, key=key, allow_private=True)(rows)
            assert all(isinstance(error, RewardError) and "401" in str(error) for error in found)


def test_the_server_refuses_what_was_sent_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    body = b'{"responses": ["please"]}'
    with documented_server(monkeypatch) as url:
        for sent_at, status in ((int(time.time()), 200), (1_600_000_000, 401)):
            headers = {
                "webhook-id": "msg_1",
                "webhook-timestamp": str(sent_at),
                "webhook-signature": signature(key_of(KEY), "msg_1", sent_at, body),
            }
            assert httpx.post(url, content=body, headers=headers).status_code == status


def test_the_plug_in_and_the_wrapped_function_run() -> None:
    [code] = blocks("python", "def cheerful")
    reward = run(code)["cheerful"]("key")
    found = Scorer([NamedReward("r", reward, fallback=-1.0)])(batch("hey!", "hey", ""))
    assert (found.scores, found.failed) == ([1, 0, -1], {"r": 1})

    [code] = blocks("python", "judge = NamedReward")
    named = run(code, my_function=reward)["judge"]
    assert (named.name, named.retries, named.fallback) == ("judge", 3, 0.0)
