"""Every refusal as one kind of document: RFC 9457, with the `error` object of OpenAI's API in the same body.

A document says what was wrong in words for people (`detail`, `issues`), and in a word for programs (`code`).
Nothing of the server's insides ever stands in one: what was not foreseen is a 500 with the request's id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import compile_path
from starlette.types import Scope

from ppo_engine.issues import Issue, Loc, SpecError, shortened, shown, told
from service.errors import ServiceError
from service.strict_json import BadJson

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 1

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_HTTP_CODES = {
    400: "bad_request",
    404: "route_not_found",
    405: "method_not_allowed",
    406: "not_acceptable",
    412: "precondition_failed",
    413: "too_large",
    416: "range_not_satisfiable",
    422: "invalid_request",
    503: "unavailable",
}


class ProblemResponse(JSONResponse):
    """A problem document. Escaped to ASCII: what a client sent comes back even where it is no Unicode."""

    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode()


def problem(
    scope: Scope,
    status: int,
    code: str,
    detail: str,
    *,
    issues: Sequence[Issue] = (),
    headers: Mapping[str, str] | None = None,
) -> ProblemResponse:
    """The document for one refusal. detail: what was given, the rule, and the fix."""
    title = HTTPStatus(status).phrase
    content: dict[str, Any] = {
        "type": f"urn:proxima:problem:{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "instance": scope["path"],
        "request_id": scope.get("state", {}).get("request_id"),
        "error": {
            "message": detail,
            "type": _OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
            "param": _param(issues),
            "code": code,
        },
    }
    if issues:
        content["issues"] = [issue.model_dump(mode="json") for issue in issues]
    return ProblemResponse(content, status, headers)


def _param(issues: Sequence[Issue]) -> str | None:
    return ".".join(map(str, issues[0].loc)) if issues else None


def invalid(scope: Scope, issues: Sequence[Issue]) -> ProblemResponse:
    """422 for a request with fields that are wrong."""
    detail = "; ".join(map(str, issues[:3])) + (f"; and {len(issues) - 3} more" if len(issues) > 3 else "")
    return problem(scope, 422, "invalid_request", detail, issues=issues)


def refused(scope: Scope, error: ServiceError) -> ProblemResponse:
    """The document for a refusal of the service's own tree."""
    headers: dict[str, str] = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (409, 503):
        # OpenAI's clients repeat both unless they are told that it is of no use.
        headers["x-should-retry"] = "true" if error.retryable else "false"
    if error.retryable:
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return problem(scope, error.status, error.code, error.detail, issues=error.issues, headers=headers)


def install(app: FastAPI) -> None:
    """Answer every exception an endpoint may raise with a problem document."""
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(SpecError, _on_spec_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return refused(request.scope, error)


async def _on_spec_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SpecError)
    return invalid(request.scope, error.issues)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    content_type = request.headers.get("content-type")
    found: dict[Loc, Mapping[str, Any]] = {}
    for detail in error.errors():
        found.setdefault(_place(detail), detail)
    issues = (Issue(loc=loc, msg=_told(loc, detail, content_type)) for loc, detail in found.items())
    return invalid(request.scope, shortened(issues, len(found)))


def _place(detail: Mapping[str, Any]) -> Loc:
    """The path of a field. Where it came from (body, query, path) is no part of it; "[key]" is pydantic's."""
    if detail["type"] == "json_invalid":
        return ("body",)
    return tuple(part for part in detail["loc"][1:] if part != "[key]") or ("body",)


def _told(loc: Loc, detail: Mapping[str, Any], content_type: str | None) -> str:
    """One of FastAPI's findings in the words of `ppo_engine.spec`, but for those that only requests have."""
    kind, given = detail["type"], detail.get("input")
    if kind == "json_invalid":
        error, position = detail["ctx"]["error"], detail["loc"][-1]
        return f"No JSON given: {error} at character {position}; correct it there."
    if loc == ("body",) and isinstance(given, bytes):
        return f"Content-Type {shown(content_type)} given; send JSON, with Content-Type application/json."
    if loc == ("Idempotency-Key",):
        return (
            f"{shown(given)} given; a key is 1 to 255 visible ASCII characters without spaces: give a UUID."
        )
    if isinstance(given, UploadFile):
        return f"a file {shown(given.filename)} given for an unknown field; remove it, or correct its name."
    if kind == "value_error" and isinstance(given, str):
        # Pydantic meets no other value error here: parts without a filename are text.
        return f"{shown(given)} given as text; a file is sent as a part with a filename: add one."
    return told({**detail, "input": given})


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What routing and the reading of bodies refuse."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.scope['path']}"
    detail, headers = str(error.detail), dict(error.headers or {})
    issues: list[Issue] = []
    if isinstance(error.__cause__, BadJson):
        return invalid(request.scope, [_of_body(issue) for issue in error.__cause__.issues])
    if error.status_code == 400:
        rule = "a form has few parts, a text each or a file, with short names, in UTF-8: correct it"
        issues = [
            Issue(loc=("body",), msg=f"A body given that cannot be read ({detail.rstrip('.')}); {rule}.")
        ]
        detail = issues[0].msg
    elif error.status_code == 413:
        issues = [Issue(loc=("body",), msg=detail)]
    elif error.status_code == 404:
        detail = f"There is no {asked}; /docs lists what there is."
    elif error.status_code == 405:
        headers["Allow"] = ", ".join(_methods(request))
        detail = f"There is no {asked}; this path knows {headers['Allow']}."
    code = _HTTP_CODES.get(error.status_code, "http_error")
    return problem(request.scope, error.status_code, code, detail, issues=issues, headers=headers)


def _of_body(issue: Issue) -> Issue:
    return Issue(loc=issue.loc or ("body",), msg=issue.msg)


def _methods(request: Request) -> list[str]:
    """The methods of all routes of the path; Starlette names those of the first one only."""
    methods: set[str] = set()
    for route in iter_route_contexts(request.app.routes):
        if route.path is not None and compile_path(route.path)[0].match(request.scope["path"]):
            methods |= route.methods or set()
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))
