"""Fixtures of the engine's tests: one thread, and a small policy with its tokenizer on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ppo_engine import trainer as trainer_module
from tests.engine import tiny
from tests.engine.recording import Recorder


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of two layers, random weights, saved with its tokenizer."""
    directory = tmp_path_factory.mktemp("policy")
    tiny.save(tiny.policy(), tiny.tokenizer(), directory)
    return directory


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Keeps what the updates of a test's trainers work with."""
    recorder = Recorder()
    monkeypatch.setattr(trainer_module, "experience_of", recorder)
    return recorder
