"""`/v1/jobs/{id}/events`, `/samples`, and `/logs`: what a job says, in pages or as it happens."""

from __future__ import annotations

import re
from typing import Annotated, Any

import fastapi
from fastapi import APIRouter, Header, Request, Response
from fastapi.sse import format_sse_event
from pydantic import Field
from starlette.responses import PlainTextResponse

from ppo_engine.issues import Issue, shown
from service.api.context import MOST, JobId, Project, Query, Shared
from service.api.negotiation import chosen
from service.api.openapi import refusals
from service.api.stream import EventStream
from service.errors import Invalid
from service.planning import invalid
from service.results import event_of
from service.specs import Event, Page, SamplesRow

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["events"])

JSON, SSE = "application/json", "text/event-stream"

_STREAM_EXAMPLE = (
    'event: state\ndata: {"seq":1,"key":"state:1","type":"state","attempt":0,"update":0,'
    '"created_at":"2026-11-23T10:00:00Z","data":{"state":"queued","attempt":0}}\nid: 1\n\n'
)


LastEventId = Annotated[
    str,
    Header(
        alias="Last-Event-ID",
        description="For streams: the id of the last event one has, in place of `after`. Browsers send it "
        "when they reconnect.",
        examples=["12"],
    ),
]


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
    """Most updates of the answer."""


class LogQuery(Query):
    """How much of a log."""

    tail: int = Field(default=64 * 1024, ge=1, le=1024 * 1024)
    """Most bytes, from the end; the first line is whole, unless it is the only one."""


@router.get(
    "/events",
    response_model=Page[Event],
    responses={
        200: {
            "description": "A page, or with `Accept: text/event-stream` a stream: all events after `after`, "
            "or after the header `Last-Event-ID`, then new ones as they happen, until the job is over.",
            "content": {SSE: {"schema": {"type": "string"}, "example": _STREAM_EXAMPLE}},
        },
        204: {"description": "The stream is at its end, and a browser is not to ask again: the job is over."},
        **refusals(404, 406, 422),
    },
)
async def list_events(
    request: Request,
    job_id: JobId,
    query: Annotated[EventsQuery, fastapi.Query()],
    shared: Shared,
    project: Project,
    last_event_id: LastEventId = "",
) -> Page[Event] | Response:
    """What happened to a job, oldest first."""
    if chosen(request.headers.get("accept"), (JSON, SSE)) == JSON:
        return await shared.results.events(project, job_id, query.after, query.limit, query.type)
    # A browser that reconnects sends the URL it began with, and the header: that is what it has.
    field, after = ("Last-Event-ID", _number(last_event_id)) if last_event_id else ("after", query.after)
    prospect = await shared.results.prospect(project, job_id, after, query.type)
    if after > prospect.newest:
        raise _wrong(
            field, str(after), f"the newest event of this job is {prospect.newest}: give the last you have."
        )
    if prospect.is_over:
        return Response(status_code=204)
    return EventStream(shared.feed, job_id, after, lambda row: _frame(row, query.type))


def _number(last_event_id: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", last_event_id):
        raise _wrong(
            "Last-Event-ID", last_event_id, "an id is the `seq` of an event: give the last you have."
        )
    return int(last_event_id)


def _wrong(field: str, given: str, rule: str) -> Invalid:
    return invalid([Issue(loc=(field,), msg=f"{shown(given)} given; {rule}")])


def _frame(row: Any, types: list[str]) -> bytes:
    """One event of a stream; nothing for one that was not asked for."""
    if types and row.type not in types:
        return b""
    event = event_of(row)
    return format_sse_event(data_str=event.model_dump_json(), event=event.type, id=str(event.seq))


@router.get("/samples", responses=refusals(404, 422))
async def list_samples(
    job_id: JobId, query: Annotated[SamplesQuery, fastapi.Query()], shared: Shared, project: Project
) -> Page[SamplesRow]:
    """Completions sampled along the way, by update."""
    return await shared.results.samples(project, job_id, query.after, query.limit)


@router.get(
    "/logs",
    response_class=PlainTextResponse,
    responses={
        200: {"content": {"text/plain": {"example": "update 11: reward 0.41\nupdate 12: reward 0.44\n"}}},
        **refusals(404, 422),
    },
)
async def read_log(
    job_id: JobId, query: Annotated[LogQuery, fastapi.Query()], shared: Shared, project: Project
) -> PlainTextResponse:
    """The last lines of the engine's log; empty before an engine has run."""
    return PlainTextResponse(await shared.results.log_tail(project, job_id, query.tail))
