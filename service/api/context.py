"""What endpoints are given: the use cases, and in whose name the request speaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Path, Request, Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field

from service.background import Background
from service.feed import Feed
from service.files import Files
from service.jobs import Jobs
from service.results import Results
from service.settings import Settings
from service.storage import Storage
from service.store.session import Store

MOST = 2**31 - 1
"""The highest number of an event or an update that can be asked for."""


@dataclass(frozen=True)
class Context:
    """Everything that lives as long as the process."""

    settings: Settings
    store: Store
    storage: Storage
    key_secret: bytes
    background: Background
    feed: Feed
    jobs: Jobs
    files: Files
    results: Results


def context_of(request: Request) -> Context:
    context = request.app.state.context
    assert isinstance(context, Context)
    return context


_bearer = HTTPBearer(
    auto_error=False, description="An API key of the project: `pxm_…`.", bearerFormat="API key"
)


def _project_of(request: Request, documented: Annotated[object, Security(_bearer)]) -> str:
    """The project whose key was sent; `Authenticated` has let nobody else pass."""
    project_id = request.scope["state"]["project_id"]
    assert isinstance(project_id, str)
    return project_id


Shared = Annotated[Context, Depends(context_of)]
Project = Annotated[str, Depends(_project_of)]
JobId = Annotated[
    str,
    Path(description="The id of a job of the project.", examples=["job_0190f3a2b4c57d8e9f00112233445566"]),
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="Any text new to this request. The same request sent again with it within 24 hours "
        "makes nothing new and gets the same answer.",
        examples=["5f1c3a52-9d0e-4a43-8d4c-0d6cbe4f1a77"],
    ),
]


class Query(BaseModel):
    """Base of what is asked for behind the `?`: unknown names are refused, as in bodies."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ListQuery(Query):
    """Which part of a list."""

    after: str | None = None
    """The id of the last item one has; without it, from the newest on."""
    limit: int = Field(default=20, ge=1, le=100)
    """Most items of the answer."""
