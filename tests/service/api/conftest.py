"""The service over HTTP, on each kind of database, with a client of a project of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.settings import Settings
from tests.conftest import NewDatabase
from tests.service.api.running import MAX_BODY, MAX_FILE, Running, make_model, serving


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with models that are right, and some that are not."""
    root = tmp_path_factory.mktemp("models")
    make_model(root / "tiny")
    make_model(root / "bert", config={"architectures": ["BertForMaskedLM"]})
    make_model(root / "mute", tokenizer={"tokenizer_class": "PreTrainedTokenizerFast"})
    (root / "empty").mkdir()
    (root / "link").symlink_to(make_model(tmp_path_factory.mktemp("elsewhere") / "tiny"))
    return root


@pytest.fixture(scope="session", params=["sqlite", "postgres"])
def service(
    request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    new_database: NewDatabase = request.getfixturevalue(f"new_{request.param}")
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("data"),
        database_url=new_database(),
        model_roots=(models,),
        allow_hub_models=False,
        max_body_bytes=MAX_BODY,
        max_file_bytes=MAX_FILE,
    )
    with serving(settings) as running:
        yield running


@pytest.fixture
def client(service: Running) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client
