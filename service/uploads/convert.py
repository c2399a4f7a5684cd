"""An uploaded file → canonical JSONL, checked row by row in constant memory.

Only the canonical form is kept: it is what a run reads, and what its size and digest describe. Rows that come
from elsewhere are held to the same (`write_rows`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Literal

from ppo_engine.issues import Issue, shown
from service.uploads.lines import (
    MAX_COLUMNS,
    MAX_LINE_BYTES,
    BadFile,
    Numbered,
    Unreadable,
    bad_file,
    bad_line,
    of_line,
    read_csv,
    read_jsonl,
)
from service.uploads.parquet import read_parquet
from service.uploads.rows import canonical, check_row

Format = Literal["jsonl", "csv", "parquet"]

MAX_ISSUES = 10

_FORMATS: Mapping[str, Format] = {"jsonl": "jsonl", "ndjson": "jsonl", "csv": "csv", "parquet": "parquet"}
_READERS: Mapping[Format, Callable[[BinaryIO], Iterator[Numbered]]] = {
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
}
_SIGNATURES = {
    b"\xff\xfe": "text in the encoding UTF-16; save it as UTF-8",
    b"\xfe\xff": "text in the encoding UTF-16; save it as UTF-8",
    b"\x1f\x8b": "compressed with gzip; unpack it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstandard; unpack it",
    b"PAR1": "a Parquet file; name it .parquet",
}


@dataclass(frozen=True)
class Written:
    """What was written: size in bytes, hexadecimal sha256, number of rows, columns in order of appearance."""

    bytes: int
    sha256: str
    rows: int
    columns: list[str]


@dataclass(frozen=True)
class Canonical(Written):
    """What was written of a file. format: what the file was."""

    format: Format


def convert(source: BinaryIO, filename: str, target: BinaryIO, max_bytes: int) -> Canonical:
    """Read a prompt file and write it as canonical JSONL, `max_bytes` at most.

    Raises:
        BadFile: with up to `MAX_ISSUES` issues, each naming its line, what was given, and the rule.
    """
    kind = _format_of(filename)
    _check_content(source, kind)
    return Canonical(**vars(write_rows(_READERS[kind](source), target, max_bytes)), format=kind)


def write_rows(rows: Iterable[Numbered], target: BinaryIO, max_bytes: int, unit: str = "Line") -> Written:
    """Write rows as canonical JSONL, `max_bytes` at most. unit: what messages call that which is numbered.

    Raises:
        BadFile: as `convert`.
    """
    writer = _Writer(target, max_bytes, unit)
    issues: list[Issue] = []
    try:
        for number, row in rows:
            found = row.issues if isinstance(row, Unreadable) else check_row(row)
            issues += [of_line(number, issue, unit) for issue in found]
            if len(issues) >= MAX_ISSUES:
                break
            # Once a row is bad, nothing will be kept: the rest is only read to name further bad rows.
            if not issues:
                issues += writer.write(number, row)
    except BadFile as error:
        issues += error.issues  # behind those of the rows before it
    if issues:
        raise BadFile(*issues[:MAX_ISSUES])
    if not writer.rows:
        raise bad_file("no rows given; give at least one row with a prompt.")
    return Written(writer.bytes, writer.digest.hexdigest(), writer.rows, list(writer.columns))


def _format_of(filename: str) -> Format:
    suffix = filename.rpartition(".")[2].lower() if "." in filename else ""
    if suffix not in _FORMATS:
        raise bad_file(
            f"a file named {shown(filename)} given; its name says the format: "
            f"it must end in {', '.join(f'.{name}' for name in _FORMATS)}."
        )
    return _FORMATS[suffix]


def _check_content(source: BinaryIO, kind: Format) -> None:
    head = source.read(4)
    source.seek(0)
    if not head:
        raise bad_file("an empty file (0 bytes) given; give at least one row with a prompt.")
    for signature, what in _SIGNATURES.items():
        if head.startswith(signature) and not (signature == b"PAR1" and kind == "parquet"):
            raise bad_file(f"the file's first bytes are {shown(head.hex())}: it is {what}.")


class _Writer:
    """Appends rows to the canonical file, and counts what stands in it."""

    def __init__(self, target: BinaryIO, max_bytes: int, unit: str) -> None:
        self._target = target
        self._max_bytes = max_bytes
        self._unit = unit
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.rows = 0
        self.columns: dict[str, None] = {}

    def write(self, number: int, row: object) -> Iterator[Issue]:
        """Append a row that `check_row` found nothing wrong with; what only now shows is returned."""
        assert isinstance(row, dict)
        try:
            line = canonical(row)
        except ValueError as error:
            yield of_line(number, Issue(loc=(), msg=f"{error}."), self._unit)
            return
        self.columns.update(dict.fromkeys(row))
        self._check_sizes(len(line), number)
        self._target.write(line)
        self.digest.update(line)
        self.bytes += len(line)
        self.rows += 1

    def _check_sizes(self, added: int, number: int) -> None:
        if added > MAX_LINE_BYTES:
            raise bad_line(
                number,
                f"a row of {added} bytes as JSON given; {MAX_LINE_BYTES} are the most: shorten it.",
                self._unit,
            )
        if self.bytes + added > self._max_bytes:
            raise bad_file(
                f"the rows up to {self._unit.lower()} {number} take more than {self._max_bytes} bytes as "
                "JSONL, which is the most; give fewer rows."
            )
        if len(self.columns) > MAX_COLUMNS:
            raise bad_line(
                number,
                f"{len(self.columns)} columns given; {MAX_COLUMNS} are the most: leave some out.",
                self._unit,
            )
