"""Every setting of the service and the worker, each from one environment variable with the prefix PROXIMA_.

Nothing else reads the environment. What is not set is derived from `data_dir`: then one directory holds
everything, and nothing else must be installed.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Self

from pydantic import Field, PositiveFloat, PositiveInt, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1024 * 1024


class Settings(BaseSettings):
    """Where things are, and what is allowed."""

    model_config = SettingsConfigDict(env_prefix="PROXIMA_", frozen=True, use_attribute_docstrings=True)

    data_dir: Path = Path("proxima-data")
    """Directory of everything that has no place of its own."""
    database_url: str = ""
    """`sqlite:///path` or `postgresql://user:password@host/name`. Default: a file in `data_dir`."""
    broker_url: str = ""
    """`redis://host:6379/0`, or `filesystem:///directory`. Default: a directory in `data_dir`."""
    storage_url: str = ""
    """`file:///directory`, `s3://bucket/prefix`, `gs://…`, `az://…`. Default: a directory in `data_dir`."""
    storage_options: dict[str, str] = Field(default_factory=dict)
    """Options of the object store, as JSON: `{"endpoint": "http://minio:9000", "region": "eu"}`."""
    runs_dir: Path | None = None
    """Directory of the workers' run directories. Default: in `data_dir`."""
    key_secret: SecretStr = SecretStr("")
    """Secret under which API keys are kept; at least 32 characters. Default: one in a file of `data_dir`."""

    model_roots: tuple[Path, ...] = ()
    """Directories a job may name models in, as a JSON list. Default: `models` in `data_dir`."""
    allow_hub_models: bool = True
    """Whether a job may name models of the Hugging Face hub."""
    allow_cpu: bool = False
    """Whether a worker without GPUs runs jobs on its CPU."""

    max_body_bytes: PositiveInt = MIB
    """Limit of a request's body, uploads apart."""
    max_file_bytes: PositiveInt = 512 * MIB
    """Limit of an uploaded file."""
    lease_seconds: PositiveFloat = 60.0
    """A worker that is silent for so long has lost its job."""
    heartbeat_seconds: PositiveFloat = 10.0
    """A worker renews its lease at least so often."""

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, given: dict[str, object]) -> dict[str, object]:
        data = Path(str(given.get("data_dir") or "proxima-data")).absolute()
        derived: dict[str, object] = {
            "database_url": f"sqlite:///{data / 'proxima.db'}",
            "broker_url": f"filesystem://{data / 'broker'}",
            "storage_url": f"file://{data / 'storage'}",
            "runs_dir": data / "runs",
            "model_roots": (data / "models",),
        }
        return (
            derived
            | {name: value for name, value in given.items() if value not in (None, "")}
            | {"data_dir": data}
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        secret = self.key_secret.get_secret_value()
        if secret and len(secret) < 32:
            raise ValueError(
                "PROXIMA_KEY_SECRET has under 32 characters; make one with 'openssl rand -hex 32'"
            )
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError(
                f"PROXIMA_HEARTBEAT_SECONDS is {self.heartbeat_seconds:g} and PROXIMA_LEASE_SECONDS is "
                f"{self.lease_seconds:g}: a lease must outlast two heartbeats; raise the lease"
            )
        return self

    def read_key_secret(self) -> bytes:
        """The secret of API keys; made once, in a file only its owner reads, where none was set."""
        if secret := self.key_secret.get_secret_value():
            return secret.encode()
        path = self.data_dir / "key.secret"
        if not path.exists():
            create_private(path, secrets.token_hex(32))
        return path.read_bytes()


def create_private(path: Path, content: str) -> None:
    """Create a file that only its owner reads, whole from the first moment, unless there is one by now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=path.parent) as file:  # readable to its owner only
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(file.name, path)
