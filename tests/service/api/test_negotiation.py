"""Which form of an answer is chosen."""

from __future__ import annotations

import pytest
from starlette.exceptions import HTTPException

from service.api.negotiation import chosen

OFFERED = ("application/json", "text/event-stream")


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, "application/json"),
        ("", "application/json"),
        ("*/*", "application/json"),
        ("text/event-stream", "text/event-stream"),
        ("TEXT/Event-Stream", "text/event-stream"),
        ("text/*", "text/event-stream"),
        ("application/json;q=0.5, text/event-stream", "text/event-stream"),
        ("text/event-stream;q=0.1, */*;q=0.2", "application/json"),
        ("text/event-stream;q=nonsense", "text/event-stream"),
        ("text/html, */*;q=0.8", "application/json"),
    ],
)
def test_the_form_is_the_one_asked_for(accept: str | None, expected: str):
    assert chosen(accept, OFFERED) == expected


@pytest.mark.parametrize("accept", ["text/html", "application/json;q=0, text/event-stream;q=0"])
def test_a_form_nobody_has_is_refused_with_the_ones_there_are(accept: str):
    with pytest.raises(HTTPException) as caught:
        chosen(accept, OFFERED)
    assert caught.value.status_code == 406
    assert "application/json, text/event-stream" in caught.value.detail
