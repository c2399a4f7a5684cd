"""Bytes → numbered lines of text, and lines → rows: the JSONL and CSV readers.

A reader yields `(line number, row)`, or `(line number, Unreadable)` for a line it can say something about
and go on after, and raises `BadFile` where nothing after it would make sense. No line is held that is longer
than `MAX_LINE_BYTES`, so memory is bounded whatever comes in.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from ppo_engine.issues import Issue, shown
from service import strict_json
from service.strict_json import BadJson, not_utf8
from service.uploads.rows import PROMPT_COLUMNS

MAX_LINE_BYTES = 1024 * 1024
MAX_COLUMNS = 256

csv.field_size_limit(MAX_LINE_BYTES)  # the module's only knob is global; its default is an eighth of this


@dataclass(frozen=True)
class Unreadable:
    """A line that is no row. issues: why; their locs start at the line."""

    issues: tuple[Issue, ...]


def unreadable(msg: str, *where: str | int) -> Unreadable:
    return Unreadable((Issue(loc=where, msg=msg),))


Numbered = tuple[int, object | Unreadable]


class BadFile(ValueError):
    """A file that cannot be a prompt file; issues say where and why, locs from the form field."""

    def __init__(self, *issues: Issue) -> None:
        self.issues = list(issues)
        super().__init__("\n".join(map(str, issues)))


def bad_file(msg: str, *where: str) -> BadFile:
    return BadFile(Issue(loc=("file", *where), msg=msg))


def bad_line(number: int, msg: str, unit: str = "Line") -> BadFile:
    return BadFile(of_line(number, Issue(loc=(), msg=msg), unit))


def of_line(number: int, issue: Issue, unit: str = "Line") -> Issue:
    """An issue of a line, whose loc starts there, as one of the form's field."""
    return Issue(loc=("file", number, *issue.loc), msg=f"{unit} {number}: {issue.msg}")


def read_jsonl(file: BinaryIO) -> Iterator[Numbered]:
    """The rows of a JSONL file; blank lines are skipped."""
    for number, line, is_whole in _text_lines(file):
        if isinstance(line, Unreadable):
            yield number, line
        elif line.strip():
            yield number, _parse(line, is_whole)


def _text_lines(file: BinaryIO) -> Iterator[tuple[int, str | Unreadable, bool]]:
    """Line number, the line or what is wrong with it, and whether it ends with its newline."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            _skip_line(file)
            msg = f"a line of more than {MAX_LINE_BYTES} bytes given, which is the most; shorten the row."
            yield number, unreadable(msg), True
            continue
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        yield number, _decode(raw), raw.endswith(b"\n")


def _skip_line(file: BinaryIO) -> None:
    while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
        pass


def _decode(raw: bytes) -> str | Unreadable:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return unreadable(not_utf8(error, "save the file in the encoding UTF-8"))


def _parse(line: str, is_whole: bool) -> object | Unreadable:
    try:
        row: object = strict_json.loads(line)
        return row
    except json.JSONDecodeError as error:
        if not is_whole:
            return unreadable(
                f"the file ends in the middle of this line, with {shown(line[-40:])}; it was cut off: "
                "upload it whole."
            )
        near = shown(line[max(error.pos - 20, 0) : error.pos + 20])
        return unreadable(
            f"not JSON: {error.msg} at column {error.colno}, near {near}; each line is one JSON object."
        )
    except BadJson as error:
        return Unreadable(tuple(error.issues))


def read_csv(file: BinaryIO) -> Iterator[Numbered]:
    """The rows of a CSV file (RFC 4180, a header, commas): text, but JSON in `messages` and `input_ids`."""
    feed = _CsvFeed(file)
    reader = csv.reader(feed, strict=True)
    header: list[str] | None = None
    while True:
        first = feed.number + 1
        feed.record_bytes = 0
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise bad_line(first, _csv_problem(error, first)) from None
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = _checked_header(cells)
        else:
            yield first, _csv_row(header, cells)


class _CsvFeed(Iterator[str]):
    """Feeds lines to the csv module, counting them and the bytes of the record being read."""

    def __init__(self, file: BinaryIO) -> None:
        self._lines = _text_lines(file)
        self.number = 0
        self.record_bytes = 0

    def __next__(self) -> str:
        self.number, line, _ = next(self._lines)
        if isinstance(line, Unreadable):
            raise BadFile(*(of_line(self.number, issue) for issue in line.issues))
        self.record_bytes += len(line)
        if self.record_bytes > MAX_LINE_BYTES:
            raise bad_line(
                self.number,
                f"a record of more than {MAX_LINE_BYTES} characters given, which is the most; "
                "close the quote that begins it, or shorten the row.",
            )
        return line


def _csv_problem(error: csv.Error, line: int) -> str:
    if "unexpected end of data" in str(error):
        return (
            f"the file ends inside the quoted field of the record that begins at line {line}; it was cut "
            "off, or a quote is not closed: upload it whole."
        )
    return (
        f"not CSV: {error}; quote fields that contain commas, quotes, or line breaks, and double the quotes."
    )


def _checked_header(names: list[str]) -> list[str]:
    if len(names) > MAX_COLUMNS:
        raise bad_line(1, f"{len(names)} columns given; {MAX_COLUMNS} are the most: leave some out.")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or "" in names:
        given = f"{shown(repeated[0])} given twice" if repeated else "a column without a name given"
        raise bad_line(1, f"{given}; each column of the header needs a name of its own.")
    if not set(PROMPT_COLUMNS) & set(names):
        raise bad_line(
            1,
            f"the columns {shown(names)} given; the first line names the columns, separated by commas, one "
            f"of them {shown(PROMPT_COLUMNS)}.",
        )
    return names


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Any] | Unreadable:
    if len(cells) != len(header):
        return unreadable(
            f"{len(cells)} fields given where the header names {len(header)}; quote fields that contain "
            "commas, and upload the file whole."
        )
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    for name in ("messages", "input_ids"):
        if name in row:
            # An empty cell is how a table says that the row has its prompt in another column.
            value = _parse(row[name], is_whole=True) if row[name] else None
            if isinstance(value, Unreadable):
                return Unreadable(
                    tuple(Issue(loc=(name, *issue.loc), msg=issue.msg) for issue in value.issues)
                )
            row[name] = value
    if "prompt" in row and not row["prompt"] and any(row.get(name) for name in ("messages", "input_ids")):
        row["prompt"] = None
    return row
