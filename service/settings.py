"""Every setting of the service and the worker, each from one environment variable with the prefix PROXIMA_.

Nothing else reads the environment. What is not set is derived from `data_dir`: then one directory holds
everything, and nothing else must be installed. A program asks `of_environment`, which ends it with a message
where a setting cannot be.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated, Self, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from ppo_engine.findings import rule_and_fix
from ppo_engine.issues import shown

PREFIX = "PROXIMA_"
MIB = 1024 * 1024
_PRIVATE = ("database_url", "broker_url", "storage_url", "storage_options", "key_secret")
"""They may hold passwords: what was given is not shown."""


def _read_json(given: object) -> object:
    try:
        return json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        return given  # as text, it is of the wrong type


Json = BeforeValidator(_read_json)
"""Of lists and objects, which the environment has as JSON."""


def _directory(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise ValueError("it is a directory, or is not there yet: give another path")
    return path


def _begins_with(*schemes: str) -> AfterValidator:
    def check(url: str) -> str:
        scheme, separator, _ = url.partition("://")
        if scheme.partition("+")[0] not in schemes or not separator:
            raise ValueError(f"it begins with {' or '.join(f'{known}://' for known in schemes)}: correct it")
        return url

    return AfterValidator(check)


class Settings(BaseSettings):
    """Where things are, and what is allowed."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, enable_decoding=False, frozen=True, use_attribute_docstrings=True
    )

    data_dir: Annotated[Path, AfterValidator(_directory)] = Path("proxima-data")
    """Directory of everything that has no place of its own."""
    database_url: Annotated[str, _begins_with("sqlite", "postgresql", "postgres")] = ""
    """`sqlite:///path` or `postgresql://user:password@host/name`. Default: a file in `data_dir`."""
    broker_url: Annotated[str, _begins_with("redis", "rediss", "filesystem")] = ""
    """`redis://host:6379/0`, or `filesystem:///directory`. Default: a directory in `data_dir`."""
    storage_url: Annotated[str, _begins_with("file", "s3", "gs", "az")] = ""
    """`file:///directory`, `s3://bucket/prefix`, `gs://…`, `az://…`. Default: a directory in `data_dir`."""
    storage_options: Annotated[dict[str, str], Json] = Field(default_factory=dict)
    """Options of the object store, as JSON: `{"endpoint": "http://minio:9000", "region": "eu"}`."""
    runs_dir: Path | None = None
    """Directory of the workers' run directories. Default: in `data_dir`."""
    key_secret: SecretStr = SecretStr("")
    """Secret under which API keys are kept; at least 32 characters. Default: one in a file of `data_dir`."""

    model_roots: Annotated[tuple[Path, ...], Json] = ()
    """Directories a job may name models in, as a JSON list. Default: `models` in `data_dir`."""
    allow_hub_models: bool = True
    """Whether a job may name models and data sets of the Hugging Face hub."""
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


_Kind = TypeVar("_Kind", bound=Settings)
_FORMS = {
    "bool_parsing": "true or false",
    "dict_type": """a JSON object, such as '{"name": "value"}'""",
    "float_parsing": "a number",
    "int_parsing": "a whole number",
    "path_type": "a path, as text",
    "tuple_type": """a JSON list, such as '["one", "two"]'""",
}


def of_environment(kind: type[_Kind]) -> _Kind:
    """The settings of this process.

    Raises:
        SystemExit: of status 2, after a line on stderr for each setting that cannot be.
    """
    try:
        return kind()
    except ValidationError as error:
        sys.stderr.write("".join(f"{line}\n" for line in wrong(error)))
        raise SystemExit(2) from None


def wrong(error: ValidationError) -> Iterator[str]:
    """Of each setting that cannot be: its variable, what was given, the rule, and the fix."""
    for detail in error.errors(include_url=False):
        field, *inside = map(str, detail["loc"]) if detail["loc"] else ("",)
        given = "A value" if field in _PRIVATE else shown(detail["input"])
        variable = ".".join([PREFIX + field.upper(), *inside])
        if detail["type"] == "value_error":  # in words of this module
            rule = str(detail["ctx"]["error"])
            yield f"{variable}: {given} given; {rule}." if field else f"{rule}."
        elif form := _FORMS.get(detail["type"]):
            yield f"{variable}: {given} given; it is {form}: give that."
        else:
            rule = rule_and_fix(detail["type"], detail["msg"], detail.get("ctx", {}))
            yield f"{variable}: {given} given. {rule}"


def create_private(path: Path, content: str) -> None:
    """Create a file that only its owner reads, whole from the first moment, unless there is one by now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=path.parent) as file:  # readable to its owner only
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(file.name, path)
