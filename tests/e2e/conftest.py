"""The embedded stack, once for all end-to-end tests, with a small model that jobs may name."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from randomwalks.client import Proxima
from randomwalks.stack import Service, running

from tests.engine import tiny

TINY = "tiny"


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Here, and in the engines, which inherit this environment."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory whose models jobs may name; `TINY` is a Llama of two layers."""
    directory = tmp_path_factory.mktemp("models")
    tiny.save(tiny.policy(), tiny.tokenizer(), directory / TINY)
    return directory


@pytest.fixture(scope="package")
def service(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("stack"), models) as service:
        yield service


@pytest.fixture
def proxima(service: Service) -> Iterator[Proxima]:
    with Proxima(service.url, service.key) as proxima:
        yield proxima
