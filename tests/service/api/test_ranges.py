"""The decision about conditional and range requests, against the examples and rules of RFC 9110."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.ranges import Span, Verdict, entity_tag, judge, repr_digest

DIGEST = hashlib.sha256(b"content").hexdigest()
TAG = f'"{DIGEST}"'


def answer(size: int = 10_000, **headers: str) -> Verdict:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return judge(named, DIGEST, size)


@pytest.mark.parametrize(
    ("header", "span"),
    [
        ("bytes=0-499", Span(0, 500)),
        ("bytes=500-999", Span(500, 1000)),
        ("bytes=-500", Span(9500, 10_000)),
        ("bytes=9500-", Span(9500, 10_000)),
        ("bytes=0-0", Span(0, 1)),
        ("bytes=-20000", Span(0, 10_000)),
        ("bytes=0-99999", Span(0, 10_000)),
        ("Bytes = 1-1 ", Span(1, 2)),
    ],
)
def test_a_range_is_honoured(header: str, span: Span):
    assert answer(range=header) == Verdict(206, span)


@pytest.mark.parametrize("header", ["bytes=10000-", "bytes=10000-10001", "bytes=-0", "bytes=99999-"])
def test_a_range_beyond_the_end_is_not_satisfiable(header: str):
    assert answer(range=header).status == 416


def test_nothing_of_an_empty_representation_is_satisfiable():
    assert answer(size=0, range="bytes=0-").status == 416
    assert answer(size=0, range="bytes=-5").status == 416
    assert answer(size=0).status == 200


@pytest.mark.parametrize(
    "header",
    ["bytes=0-1,5-6", "lines=0-1", "bytes=a-b", "bytes=-", "bytes=5-4", "", "bytes=" + "1" * 5000 + "-"],
)
def test_a_range_that_cannot_be_honoured_is_answered_whole(header: str):
    assert answer(range=header) == Verdict(200, Span(0, 10_000))


@pytest.mark.parametrize(
    ("condition", "status"),
    [(TAG, 206), (f"W/{TAG}", 200), ('"other"', 200), ("Wed, 21 Oct 2026 07:28:00 GMT", 200)],
)
def test_if_range_compares_strongly(condition: str, status: int):
    assert answer(range="bytes=0-1", if_range=condition).status == status


@pytest.mark.parametrize(
    ("known", "status"),
    [(TAG, 304), (f"W/{TAG}", 304), ("*", 304), (f'"other", {TAG}', 304), ('"other"', 206)],
)
def test_if_none_match_compares_weakly_and_comes_before_range(known: str, status: int):
    assert answer(range="bytes=0-1", if_none_match=known).status == status


@pytest.mark.parametrize(("wanted", "status"), [(TAG, 200), ("*", 200), (f"W/{TAG}", 412), ('"other"', 412)])
def test_if_match_compares_strongly(wanted: str, status: int):
    assert answer(if_match=wanted).status == status


@given(st.text(max_size=20), st.integers(0, 50))
def test_every_range_gives_bytes_that_exist(header: str, size: int):
    verdict = answer(size=size, range=f"bytes={header}")
    assert 0 <= verdict.span.start <= verdict.span.stop <= size
    assert verdict.status != 206 or verdict.span.start < verdict.span.stop


def test_names_of_the_content():
    assert entity_tag(DIGEST) == TAG
    # From `printf content | openssl dgst -sha256 -binary | base64`.
    assert repr_digest(DIGEST) == "sha-256=:7XACtDnprIRfIjV9giusFERzD722AW0+yUMil7nsn3M=:"
