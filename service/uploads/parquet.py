"""The Parquet reader: rows of a column file, a few at a time.

Sizes that the file declares are checked before anything is unpacked, since a small file may unpack to a
huge one. Rows are numbered from 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ppo_engine.spec import shown
from service.uploads.lines import MAX_COLUMNS, MAX_LINE_BYTES, Numbered, Unreadable, bad_file
from service.uploads.rows import PROMPT_COLUMNS

MAX_ROW_GROUP_BYTES = 256 * 1024 * 1024
_BATCH_ROWS = 64
_BUFFER_BYTES = 1024 * 1024
_MAGIC = b"PAR1"


def read_parquet(file: BinaryIO) -> Iterator[Numbered]:
    """The rows of a Parquet file, row group by row group."""
    opened = _open(file)
    _check_schema(opened.schema_arrow)
    for group in range(opened.num_row_groups):
        _check_row_group(opened.metadata.row_group(group), group)
    number = 0
    try:
        for batch in opened.iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except UnicodeDecodeError:
        yield number + 1, Unreadable("text given that is not UTF-8; write the column again as UTF-8.")
    except (pa.ArrowException, OSError) as error:
        raise bad_file(
            f"damaged after row {number} ({error}); write it again, and upload it whole."
        ) from None


def _open(file: BinaryIO) -> pq.ParquetFile:
    head = file.read(len(_MAGIC))
    file.seek(-min(len(_MAGIC), file.seek(0, 2)), 2)
    tail = file.read(len(_MAGIC))
    file.seek(0)
    if head != _MAGIC:
        raise bad_file(f"{shown(head.hex())} given as its first bytes; a Parquet file begins with PAR1.")
    if tail != _MAGIC:
        raise bad_file(
            f"{shown(tail.hex())} given as its last bytes; a Parquet file ends with PAR1: it was cut off, "
            "upload it whole."
        )
    try:
        return pq.ParquetFile(
            file,
            buffer_size=_BUFFER_BYTES,
            thrift_string_size_limit=MAX_ROW_GROUP_BYTES,
            thrift_container_size_limit=1_000_000,
        )
    except (pa.ArrowException, OSError) as error:
        raise bad_file(f"no readable Parquet file ({error}); write it again.") from None


def _check_schema(schema: pa.Schema) -> None:
    if len(schema.names) > MAX_COLUMNS:
        raise bad_file(f"{len(schema.names)} columns given; {MAX_COLUMNS} are the most.")
    if not set(PROMPT_COLUMNS) & set(schema.names):
        raise bad_file(f"the columns {shown(schema.names)} given; one must be of {shown(PROMPT_COLUMNS)}.")
    for field in schema:
        if not _has_json_form(field.type):
            raise bad_file(
                f"column {shown(field.name)} of type {field.type} given, which has no form in JSON; "
                "make it text or a number, or leave it out.",
                field.name,
            )


def _has_json_form(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _has_json_form(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _has_json_form(kind.value_type)
    if pa.types.is_struct(kind):
        return all(_has_json_form(part.type) for part in kind)
    plain = (pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating)
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in plain + text)


def _check_row_group(group: pq.RowGroupMetaData, index: int) -> None:
    if group.total_byte_size > MAX_ROW_GROUP_BYTES:
        raise bad_file(
            f"row group {index} unpacks to {group.total_byte_size} bytes; {MAX_ROW_GROUP_BYTES} are the "
            "most: write the file with smaller row groups."
        )
    widest = max(group.column(column).total_uncompressed_size for column in range(group.num_columns))
    if group.num_rows and widest / group.num_rows > MAX_LINE_BYTES:
        raise bad_file(
            f"row group {index} has values of {widest // group.num_rows} bytes; {MAX_LINE_BYTES} are the "
            "most."
        )
