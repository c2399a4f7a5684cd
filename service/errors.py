"""One tree of refusals: what a request, or a move in the store, may not do, and the status that tells it.

A message says what was given, the rule, and the fix; it is shown to users as it stands. This module knows
status codes as numbers only, and no framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ppo_engine.issues import Issue, shown


class ServiceError(Exception):
    """Base of all refusals.

    status: of the HTTP answer. code: the reason as a word for programs, stable.
    retryable: whether the same request may succeed when it is sent again unchanged.
    detail: for people. issues: the fields that are wrong, where it is about fields.
    """

    status: ClassVar[int] = 400
    code: ClassVar[str] = "bad_request"
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str, issues: Sequence[Issue] = ()) -> None:
        super().__init__(detail)
        self.detail = detail
        self.issues = tuple(issues)


class UnknownCursor(ServiceError):
    """`after` names nothing in this list."""

    code = "unknown_cursor"

    def __init__(self, after: str, of: str) -> None:
        msg = f"{after!r} is no id in this list of {of}; give the id of the last item you have of it."
        super().__init__(msg, [Issue(loc=("after",), msg=msg)])


class Unauthenticated(ServiceError):
    """The request has no key that opens anything. What was given is never shown: it may be a secret."""

    status = 401
    code = "unauthenticated"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, [Issue(loc=("Authorization",), msg=detail)])


class MissingKey(Unauthenticated):
    code = "missing_api_key"

    def __init__(self) -> None:
        super().__init__("No API key was given; send the header 'Authorization: Bearer pxm_…'.")


class MalformedKey(Unauthenticated):
    """What was given cannot be a key, by its form or its checksum."""

    code = "malformed_api_key"

    def __init__(self) -> None:
        super().__init__(
            "What was given is not an API key: a key begins with 'pxm_', and ends with a checksum; copy all "
            "of it, and send it as 'Authorization: Bearer pxm_…'."
        )


class UnknownKey(Unauthenticated):
    code = "unknown_api_key"

    def __init__(self) -> None:
        super().__init__(
            "The API key that was given is not known here; send one of this installation, or have its "
            "operator make one."
        )


class RevokedKey(Unauthenticated):
    code = "revoked_api_key"

    def __init__(self) -> None:
        super().__init__("The API key that was given was revoked; ask the operator for a new one.")


_WHERE = {
    "job": ("job_id", "list them with GET /v1/jobs"),
    "file": ("file_id", "list them with GET /v1/files"),
    "checkpoint": ("update", "list them with GET /v1/jobs/{job_id}/checkpoints"),
    "checkpoint file": ("name", "list them with GET /v1/jobs/{job_id}/checkpoints/{update}"),
    "adapter": ("job_id", "what it has exported is listed by GET /v1/jobs/{job_id}/checkpoints"),
    "key": ("key_id", "list them with 'python -m service.admin list-keys'"),
}
"""Of each kind of thing: the field that names it, and how to learn which there are."""


class NotFound(ServiceError):
    """Nothing by this id in the caller's project. kind: `job`, `file`, `checkpoint`, … why: what there is."""

    status = 404
    code = "not_found"

    def __init__(self, kind: str, id: str, why: str = "") -> None:
        field, fix = _WHERE[kind]
        rest = f"{f': {why}' if why else ''}; {fix}."
        issue = Issue(loc=(field,), msg=f"{shown(id)} given; there is no such {kind} in this project{rest}")
        super().__init__(f"There is no {kind} {id!r} in this project{rest}", [issue])
        self.kind = kind
        self.id = id


class Conflict(ServiceError):
    """The request contradicts the state of things."""

    status = 409
    code = "conflict"


class WrongState(Conflict):
    """A job is not in a state in which this can be done."""

    code = "wrong_state"

    def __init__(self, job_id: str, state: str, action: str, rule: str) -> None:
        super().__init__(f"Job {job_id} is {state} and cannot be {action}: {rule}.")


class FileInUse(Conflict):
    """A file of prompts that a job will still read."""

    code = "file_in_use"

    def __init__(self, file_id: str, job_ids: Sequence[str]) -> None:
        jobs = ", ".join(job_ids)
        super().__init__(f"File {file_id} is used by {jobs}; cancel these jobs, or wait for their end.")


class RequestInFlight(Conflict):
    """The first request with this idempotency key has not been answered yet."""

    code = "idempotency_in_flight"
    retryable = True

    def __init__(self, key: str) -> None:
        super().__init__(f"A request with Idempotency-Key {key!r} is being answered; repeat it in a moment.")


class Invalid(ServiceError):
    """Fields that break a rule."""

    status = 422
    code = "invalid_request"


class KeyReused(Invalid):
    """An idempotency key that was sent with another body before."""

    code = "idempotency_key_reused"

    def __init__(self, key: str) -> None:
        msg = f"{key!r} was sent with another body in the last 24 hours; give every new request a new key."
        super().__init__(f"Idempotency-Key {msg}", [Issue(loc=("Idempotency-Key",), msg=msg)])


class Unavailable(ServiceError):
    """Something the service stands on does not answer."""

    status = 503
    code = "unavailable"
    retryable = True


class ContentLost(ServiceError):
    """A file is known, and its bytes are not where they were put. Only the operator can help."""

    status = 503
    code = "content_lost"

    def __init__(self, name: str) -> None:
        super().__init__(f"The content of {name!r} is missing from storage; ask the operator to restore it.")
