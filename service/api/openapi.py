"""What the documentation says beyond the routes' own words: one document of refusals, at every route that may
give it, and an example of every answer.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from ppo_engine.issues import Issue
from service.api import examples
from service.api.problems import MEDIA_TYPE

_REFUSALS = {
    400: "The body cannot be read, or a cursor names nothing in the list.",
    401: "The API key is missing, malformed, unknown, or revoked.",
    404: "There is no such thing in the project.",
    406: "None of the forms of this answer is accepted.",
    409: "The request contradicts the state of things; `x-should-retry` says whether to send it again.",
    412: "The content is not what If-Match names.",
    413: "The body is beyond the limit.",
    416: "The content has no such bytes.",
    422: "Fields break a rule: `issues` names each, with what was given, the rule, and the fix.",
    500: "The server failed in a way that was not foreseen; its log has the cause under the `request_id`.",
    503: "Something the service stands on does not answer; send it again in a moment.",
}


_EXAMPLE = "spec.ppo.kl_coef: -1 given. Input should be greater than or equal to 0; give 0 or more."


class OpenAIError(BaseModel):
    """The same, as OpenAI's clients read it."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    message: str
    """The `detail` of the problem."""
    type: str
    """The kind of error, such as `invalid_request_error`."""
    param: str | None
    """The first field that is wrong."""
    code: str
    """The reason, as a word for programs."""


class Problem(BaseModel):
    """Why a request was refused (RFC 9457)."""

    model_config = ConfigDict(
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:proxima:problem:invalid_request",
                    "title": "Unprocessable Content",
                    "status": 422,
                    "detail": _EXAMPLE,
                    "instance": "/v1/jobs",
                    "request_id": "req_5d41402abc4b2a76b9719d91",
                    "error": {
                        "message": _EXAMPLE,
                        "type": "invalid_request_error",
                        "param": "spec.ppo.kl_coef",
                        "code": "invalid_request",
                    },
                    "issues": [
                        {
                            "loc": ["spec", "ppo", "kl_coef"],
                            "msg": "-1 given. Input should be greater than or equal to 0; give 0 or more.",
                        }
                    ],
                }
            ]
        },
    )

    type: str
    """`urn:proxima:problem:` and the code."""
    title: str
    """The name of the status."""
    status: int
    """The status of the answer."""
    detail: str
    """What was given, the rule, and the fix."""
    instance: str
    """The path that was asked for."""
    request_id: str
    """Names this request in the operator's log."""
    error: OpenAIError
    """The same for OpenAI's clients."""
    issues: list[Issue] = Field(default_factory=list)
    """The fields that are wrong, where it is about fields."""


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The documentation of refusals, for the `responses` of a route that asks for a key."""
    return open_refusals(401, 500, 503, *statuses)


def open_refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The same for a route that is open to everybody: none but these."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"description": _REFUSALS[status], "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in sorted(statuses)
    }


def _drop_validation_errors(document: dict[str, Any]) -> None:
    """Take out the 422 that FastAPI adds to routes that do not name theirs, in a form that is never sent."""
    for path in document["paths"].values():
        for operation in path.values():
            if MEDIA_TYPE not in operation["responses"].get("422", {}).get("content", {MEDIA_TYPE: {}}):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def install(app: FastAPI) -> None:
    """Add the document of refusals, and examples, to the schemas that the routes' answers bring in."""
    build = app.openapi

    def completed() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = build()
            schemas = document["components"]["schemas"]
            _drop_validation_errors(document)
            problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(problem.pop("$defs"))
            schemas["Problem"] = problem
            schemas["JsonValue"]["description"] = "Any JSON."
            for name, example in examples.BY_SCHEMA.items():
                schemas[name]["examples"] = [example]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = completed  # type: ignore[method-assign]  # FastAPI's documented way to extend it
