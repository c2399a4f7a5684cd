"""Stored bytes as an answer: streamed in constant memory, resumable, and named by their content."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from service.api.problems import problem
from service.api.ranges import Span, entity_tag, judge, repr_digest

Open = Callable[[int, int], Awaitable[AsyncIterator[bytes]]]

_BYTES: dict[str, Any] = {
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}, "example": "(the bytes)"}
}
DOWNLOADED: dict[int | str, dict[str, Any]] = {
    200: {"description": "All bytes. ETag and Repr-Digest are their sha256.", "content": _BYTES},
    206: {"description": "The bytes that Range names.", "content": _BYTES},
    304: {"description": "The content is what If-None-Match names."},
}
"""What the documentation says of the answers."""


@dataclass(frozen=True)
class Content:
    """What may be downloaded.

    sha256: hexadecimal, of all its `size` bytes. open: streams bytes start (included) to stop (excluded);
    fails before the first byte where there are none.
    """

    filename: str
    size: int
    sha256: str
    open: Open
    media_type: str = "application/octet-stream"


async def download(request: Request, content: Content) -> Response:
    """Answer a GET for stored content."""
    verdict = judge(request.headers, content.sha256, content.size)
    named = {
        "ETag": entity_tag(content.sha256),
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
    }
    if verdict.status == 304:
        return Response(status_code=304, headers=named)
    if verdict.status == 412:
        detail = f"If-Match {request.headers['if-match']} given; the content is {named['ETag']}: start again."
        return problem(request.scope, 412, "precondition_failed", detail, headers=named)
    if verdict.status == 416:
        detail = (
            f"Range {request.headers['range']} given; the content has {content.size} bytes: ask within them."
        )
        headers = {**named, "Content-Range": f"bytes */{content.size}"}
        return problem(request.scope, 416, "range_not_satisfiable", detail, headers=headers)
    headers = {**named, **_described(content, verdict.span)}
    if verdict.status == 206:
        headers["Content-Range"] = f"bytes {verdict.span.start}-{verdict.span.stop - 1}/{content.size}"
    body = await content.open(verdict.span.start, verdict.span.stop)
    return StreamingResponse(body, verdict.status, headers, content.media_type)


def _described(content: Content, span: Span) -> dict[str, str]:
    return {
        "Content-Length": str(span.stop - span.start),
        "Repr-Digest": repr_digest(content.sha256),
        "Content-Disposition": _attachment(content.filename),
    }


def _attachment(filename: str) -> str:
    """RFC 6266: a plain name for every client, and the exact one for those that read RFC 8187."""
    plain = "".join(
        char if char.isascii() and (char.isalnum() or char in "._-") else "_" for char in filename
    )
    exact = "" if plain == filename else f"; filename*=UTF-8''{quote(filename, safe='')}"
    return f'attachment; filename="{plain}"{exact}'
