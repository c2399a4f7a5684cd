"""`/v1/jobs/{id}/events`, `/samples`, and `/logs`: what a job says, in pages or as it happens."""

from __future__ import annotations

from typing import Annotated, Any

import fastapi
from fastapi import APIRouter, Header, Request, Response
from fastapi.sse import format_sse_event
from pydantic import Field
from starlette.responses import PlainTextResponse

from service.api.context import MOST, Project, Query, Shared
from service.api.negotiation import chosen
from service.api.openapi import refusals
from service.api.stream import EventStream
from service.results import event_of
from service.specs import Event, Page, SamplesRow

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["events"])

JSON, SSE = "application/json", "text/event-stream"

_STREAM_EXAMPLE = (
    'event: state\ndata: {"seq":1,"key":"state:1","type":"state","attempt":0,"update":0,'
    '"created_at":"2026-11-23T10:00:00Z","data":{"state":"queued","attempt":0}}\nid: 1\n\n'
)


class EventsQuery(Query):
    """Which events."""

    after: int = Field(default=0, ge=0, le=MOST)
    """The `seq` of the last event one has."""
    limit: int = Field(default=100, ge=1, le=1000)
    """Most events of a page; a stream has no limit."""
    type: list[str] = Field(default_factory=list, max_length=16)
    """Only events of these types; give it several times for several types."""


class SamplesQuery(Query):
    """Which samples."""

    after: int = Field(default=-1, ge=-1, le=MOST)
    """The last update one has samples of."""
    limit: int = Field(default=20, ge=1, le=100)


class LogQuery(Query):
    """How much of a log."""

    tail: int = Field(default=64 * 1024, ge=1, le=1024 * 1024)
    """Most bytes, from the end; the first line is whole."""


@router.get(
    "/events",
    response_model=Page[Event],
    responses={
        200: {
            "description": "A page, or with `Accept: text/event-stream` a stream: all events after `after`, "
            "or after the header `Last-Event-ID`, then new ones as they happen, until the job is over.",
            "content": {SSE: {"schema": {"type": "string"}, "example": _STREAM_EXAMPLE}},
        },
        **refusals(404, 406, 422),
    },
)
async def list_events(
    request: Request,
    job_id: str,
    query: Annotated[EventsQuery, fastapi.Query()],
    shared: Shared,
    project: Project,
    last_event_id: Annotated[int | None, Header(alias="Last-Event-ID", ge=0, le=MOST)] = None,
) -> Page[Event] | Response:
    """What happened to a job, oldest first."""
    if chosen(request.headers.get("accept"), (JSON, SSE)) == JSON:
        return await shared.results.events(project, job_id, query.after, query.limit, query.type)
    await shared.results.check(project, job_id)
    after = query.after if last_event_id is None else last_event_id
    return EventStream(shared.feed, job_id, after, lambda row: _frame(row, query.type))


def _frame(row: Any, types: list[str]) -> bytes:
    """One event of a stream; nothing for one that was not asked for."""
    if types and row.type not in types:
        return b""
    event = event_of(row)
    return format_sse_event(data_str=event.model_dump_json(), event=event.type, id=str(event.seq))


@router.get("/samples", responses=refusals(404, 422))
async def list_samples(
    job_id: str, query: Annotated[SamplesQuery, fastapi.Query()], shared: Shared, project: Project
) -> Page[SamplesRow]:
    """Completions sampled along the way, by update."""
    return await shared.results.samples(project, job_id, query.after, query.limit)


@router.get("/logs", response_class=PlainTextResponse, responses=refusals(404, 422))
async def read_log(
    job_id: str, query: Annotated[LogQuery, fastapi.Query()], shared: Shared, project: Project
) -> PlainTextResponse:
    """The last lines of the engine's log; empty before an engine has run."""
    return PlainTextResponse(await shared.results.log_tail(project, job_id, query.tail))
