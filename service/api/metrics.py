"""`/v1/jobs/{id}/metrics`: numbers by update, as JSON or CSV."""

from __future__ import annotations

import csv
import io
from typing import Annotated

import fastapi
from fastapi import APIRouter, Request, Response
from pydantic import Field

from service.api.context import MOST, JobId, Project, Query, Shared
from service.api.negotiation import chosen
from service.api.openapi import refusals
from service.specs import MetricsRow, Page

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["metrics"])

JSON, CSV = "application/json", "text/csv"


class MetricsQuery(Query):
    """Which metrics."""

    names: list[str] = Field(default_factory=list, max_length=100)
    """Only these, in this order: `a,b`, or given several times."""
    after: int = Field(default=-1, ge=-1, le=MOST)
    """The last update one has metrics of."""
    # No more: a part is made in one go, and every other request waits meanwhile.
    limit: int = Field(default=1000, ge=1, le=1000)
    """Most updates of the answer."""


@router.get(
    "/metrics",
    response_model=Page[MetricsRow],
    responses={
        200: {
            "description": "JSON, or with `Accept: text/csv` CSV: a header, then a line per update. Its "
            "columns are the `names`, in their order; without any, the metrics of the job's first update: "
            "every part has the same. Where there is more, `Link` names the next part.",
            "content": {CSV: {"schema": {"type": "string"}, "example": "update,objective/kl\r\n1,0.02\r\n"}},
        },
        **refusals(404, 406, 422),
    },
)
async def list_metrics(
    request: Request,
    job_id: JobId,
    query: Annotated[MetricsQuery, fastapi.Query()],
    shared: Shared,
    project: Project,
) -> Page[MetricsRow] | Response:
    """The metrics of each update, those of the last attempt at it."""
    names = list(dict.fromkeys(name for part in query.names for name in part.split(",") if name))
    wants_csv = chosen(request.headers.get("accept"), (JSON, CSV)) == CSV
    if wants_csv and not names:
        names = await shared.results.first_metrics(project, job_id)
    page = await shared.results.metrics(project, job_id, names, query.after, query.limit)
    if not wants_csv:
        return page
    headers = {"Content-Disposition": f'attachment; filename="{job_id}-metrics.csv"'}
    if page.has_more:
        following = request.url.include_query_params(after=page.data[-1].update)
        headers["Link"] = f'<{following.path}?{following.query}>; rel="next"'
    return Response(_table(page.data, names), media_type=CSV, headers=headers)


def _table(rows: list[MetricsRow], columns: list[str]) -> str:
    """RFC 4180, a column per name. What an update lacks stays empty."""
    target = io.StringIO()
    writer = csv.writer(target)
    writer.writerow(["update", *columns])
    writer.writerows([row.update, *(row.metrics.get(name, "") for name in columns)] for row in rows)
    return target.getvalue()
