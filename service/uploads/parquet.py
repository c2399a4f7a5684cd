"""The Parquet reader: rows of a column file, or of tables, a few at a time, in constant memory.

A small file may unpack to a huge one: a value is stored once, and named again and again. So the sizes that
the file declares are checked before anything is unpacked, text stays as the dictionary that it is stored as,
and what a row would take is worked out from that before the row is made. Rows are numbered from 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ppo_engine.issues import shown
from service import strict_json
from service.strict_json import BadJson
from service.uploads.lines import MAX_COLUMNS, MAX_LINE_BYTES, Numbered, Unreadable, bad_file, unreadable
from service.uploads.rows import PROMPT_COLUMNS

MAX_ROW_GROUPS = 10_000
MAX_ROW_GROUP_BYTES = 256 * 1024 * 1024
MAX_ROW_GROUP_VALUES = 16 * 1024 * 1024
"""In lists: those of a batch of rows are held in memory together."""
_BATCH_ROWS = 1024
_BUFFER_BYTES = 1024 * 1024
_MAGIC = b"PAR1"
_ENCODINGS = frozenset({"PLAIN", "PLAIN_DICTIONARY", "RLE", "RLE_DICTIONARY", "BIT_PACKED"})
"""Of text: those that can be read as a dictionary."""


def read_parquet(file: BinaryIO) -> Iterator[Numbered]:
    """The rows of a Parquet file, row group by row group."""
    _check_ends(file)
    number = 0
    try:
        metadata = pq.read_metadata(file)
        _check_schema(metadata.schema.to_arrow_schema())
        texts = _check_sizes(metadata)
        opened = pq.ParquetFile(
            file, metadata=metadata, read_dictionary=texts, pre_buffer=False, buffer_size=_BUFFER_BYTES
        )
        for group in range(metadata.num_row_groups):  # each has dictionaries of its own
            for batch in opened.iter_batches(_BATCH_ROWS, row_groups=[group], use_threads=False):
                for row in _rows(batch):
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        raise bad_file(
            f"a file that cannot be read after row {number} given ({error}); write it again, and upload it "
            "whole."
        ) from None


def read_tables(tables: Iterable[pa.Table]) -> Iterator[Numbered]:
    """The rows of tables that somebody else has read; columns that have no form in JSON are left out."""
    number = 0
    for table in tables:
        kept = table.select([field.name for field in table.schema if _has_json_form(field.type)])
        _check_schema(kept.schema)
        for batch in kept.to_batches(_BATCH_ROWS):
            for row in _rows(batch):
                number += 1
                yield number, row


def _rows(batch: pa.RecordBatch) -> Iterator[object | Unreadable]:
    """Each row, or what is wrong with it; made a few at a time, of no more bytes than one may have."""
    sizes = _row_sizes(batch)
    start = 0
    while start < len(sizes):
        stop, total = start + 1, sizes[start]
        while stop < len(sizes) and (total := total + sizes[stop]) <= MAX_LINE_BYTES:
            stop += 1
        if sizes[start] <= MAX_LINE_BYTES:
            yield from _made(batch.slice(start, stop - start))
        else:
            yield unreadable(
                f"a row of {sizes[start]} bytes or more given; {MAX_LINE_BYTES} are the most: shorten it."
            )
        start = stop


def _made(rows: pa.RecordBatch) -> list[object | Unreadable]:
    try:
        made: list[object | Unreadable] = rows.to_pylist()
    except UnicodeDecodeError:
        if len(rows) == 1:
            return [unreadable("text given that is not UTF-8; write the column again as UTF-8.")]
        half = len(rows) // 2
        return _made(rows.slice(0, half)) + _made(rows.slice(half))
    if any(_holds_json(field.type) for field in rows.schema):
        return [_unpacked(row, pa.struct(rows.schema)) for row in made]
    return made


def _unpacked(row: object, kind: pa.DataType) -> object | Unreadable:
    try:
        unpacked: object = _with_json(row, kind)
        return unpacked
    except (BadJson, json.JSONDecodeError) as error:
        return unreadable(
            f"text given in a column of JSON that is not JSON: {error}; write the column again."
        )


def _with_json(value: Any, kind: pa.DataType) -> Any:
    """A value in which texts of JSON have become what they say."""
    if value is None or not _holds_json(kind):
        return value
    if isinstance(kind, pa.JsonType):
        return strict_json.loads(value)
    if pa.types.is_struct(kind):
        return {field.name: _with_json(value[field.name], field.type) for field in kind}
    return [_with_json(part, kind.value_type) for part in value]


def _holds_json(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_holds_json(field.type) for field in kind)
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return _holds_json(kind.value_type) if is_list else isinstance(kind, pa.JsonType)


def _row_sizes(batch: pa.RecordBatch) -> list[int]:
    """The bytes that each row takes as JSON, or fewer."""
    sizes: list[int] = _sizes(batch.to_struct_array()).to_pylist()
    return sizes


def _sizes(array: pa.Array) -> pa.Array:
    """The bytes that each value takes as JSON, or fewer, worked out without making any of them."""
    kind = array.type
    if isinstance(kind, pa.JsonType):
        return _sizes(array.storage)
    if pa.types.is_dictionary(kind):
        sizes = _sizes(array.dictionary).take(array.indices)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        sizes = pc.add(pc.cast(pc.binary_length(array), pa.int64()), len('""'))
    elif pa.types.is_fixed_size_list(kind):
        return _sizes(array.cast(pa.list_(kind.value_type)))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        sums = pa.concat_arrays([_constant(0, 1), pc.cumulative_sum(pc.add(_sizes(array.values), len(",")))])
        sizes = pc.add(pc.subtract(sums.take(array.offsets[1:]), sums.take(array.offsets[:-1])), len("]"))
    elif pa.types.is_struct(kind):
        sizes = _constant(len("}"), len(array))
        for index, field in enumerate(kind):
            named = len(field.name) + len('"":,')
            sizes = pc.add(sizes, pc.add(_sizes(array.field(index)), named))
    else:
        sizes = _constant(1, len(array))
    return pc.if_else(array.is_valid(), sizes, pa.scalar(1, pa.int64()))


def _constant(value: int, length: int) -> pa.Array:
    return pa.repeat(pa.scalar(value, pa.int64()), length)


def _check_ends(file: BinaryIO) -> None:
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
    if isinstance(kind, pa.JsonType):
        return True
    plain = (pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating)
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in plain + text)


def _check_sizes(metadata: pq.FileMetaData) -> list[str]:
    """The paths of the columns of text, when all that the row groups declare is within the limits."""
    if metadata.num_row_groups > MAX_ROW_GROUPS:
        raise bad_file(
            f"{metadata.num_row_groups} row groups given; {MAX_ROW_GROUPS} are the most: write the file with "
            "larger ones."
        )
    columns = [metadata.schema.column(index) for index in range(metadata.num_columns)]
    for index in range(metadata.num_row_groups):
        _check_row_group(metadata.row_group(index), index, columns)
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def _check_row_group(group: pq.RowGroupMetaData, index: int, columns: list[Any]) -> None:
    if group.total_byte_size > MAX_ROW_GROUP_BYTES:
        raise bad_file(
            f"row group {index} of {group.total_byte_size} bytes given; {MAX_ROW_GROUP_BYTES} are the most: "
            "write the file with smaller row groups."
        )
    chunks = [group.column(number) for number in range(group.num_columns)]
    listed = sum(
        chunk.num_values for chunk, column in zip(chunks, columns, strict=True) if column.max_repetition_level
    )
    if listed > MAX_ROW_GROUP_VALUES:
        raise bad_file(
            f"row group {index} with {listed} values in lists given; {MAX_ROW_GROUP_VALUES} are the most: "
            "write the file with smaller row groups."
        )
    widest = max(chunk.total_uncompressed_size for chunk in chunks)
    if group.num_rows and widest / group.num_rows > MAX_LINE_BYTES:
        raise bad_file(
            f"row group {index} with values of {widest // group.num_rows} bytes given; {MAX_LINE_BYTES} are "
            "the most: shorten them."
        )
    for chunk, column in zip(chunks, columns, strict=True):
        if column.physical_type == "BYTE_ARRAY" and not _ENCODINGS.issuperset(chunk.encodings):
            raise bad_file(
                f"column {shown(column.path)} in the encodings {shown(sorted(chunk.encodings))} given; text "
                f"is read from {shown(sorted(_ENCODINGS))}: write it with a dictionary, or plain."
            )
