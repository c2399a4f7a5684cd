"""What an upload becomes, and what is said about one that cannot become anything."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.strict_json import MAX_DEPTH
from service.uploads.convert import MAX_ISSUES, Canonical, convert
from service.uploads.lines import MAX_LINE_BYTES, BadFile

ROOM = 10 * MAX_LINE_BYTES


def converted(content: bytes, filename: str, room: int = ROOM) -> tuple[Canonical, list[dict[str, Any]]]:
    target = io.BytesIO()
    summary = convert(io.BytesIO(content), filename, target, room)
    written = target.getvalue()
    assert (summary.bytes, summary.sha256) == (len(written), hashlib.sha256(written).hexdigest())
    return summary, [json.loads(line) for line in written.splitlines()]


def refusal(content: bytes, filename: str, room: int = ROOM) -> list[tuple[tuple[str | int, ...], str]]:
    with pytest.raises(BadFile) as caught:
        converted(content, filename, room)
    return [(issue.loc, issue.msg) for issue in caught.value.issues]


def jsonl(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(rows: Sequence[dict[str, Any]], **options: Any) -> bytes:
    target = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), target, **options)
    return target.getvalue()


ROWS = [
    {"prompt": "Once upon a time", "label": "ünïcode", "score": 1.5},
    {"prompt": "Two", "label": None, "score": 2.0},
]


def test_jsonl_keeps_every_further_column_and_their_order():
    summary, rows = converted(jsonl(*ROWS), "prompts.jsonl")
    assert rows == ROWS
    assert (summary.rows, summary.columns, summary.format) == (2, ["prompt", "label", "score"], "jsonl")


def test_jsonl_without_a_last_newline_with_blank_lines_and_a_byte_order_mark():
    content = b'\xef\xbb\xbf{"prompt":"a"}\r\n\n  \n{"prompt":"b"}'
    assert converted(content, "p.ndjson")[1] == [{"prompt": "a"}, {"prompt": "b"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]},
        {"input_ids": [0, 5, 2**31 - 1]},
    ],
)
def test_chat_and_token_rows(row: dict[str, Any]):
    assert converted(jsonl(row), "p.jsonl")[1] == [row]


def test_csv_quoting_line_breaks_and_further_columns():
    content = b'prompt,label\r\n"a, ""b""\nc",7\r\nplain,\r\n'
    summary, rows = converted(content, "P.CSV")
    assert rows == [{"prompt": 'a, "b"\nc', "label": "7"}, {"prompt": "plain", "label": ""}]
    assert summary.columns == ["prompt", "label"]


def test_csv_holds_chat_messages_as_json():
    content = b'messages,k\n"[{""role"":""user"",""content"":""Hi""}]",1\n'
    assert converted(content, "p.csv")[1] == [{"messages": [{"role": "user", "content": "Hi"}], "k": "1"}]


def test_parquet_over_several_row_groups():
    rows = [{"prompt": f"p{i}", "tags": ["a", "b"], "more": {"x": i}} for i in range(200)]
    summary, found = converted(parquet(rows, row_group_size=70), "p.parquet")
    assert found == rows
    assert summary.rows == 200


def test_parquet_columns_of_json_are_what_they_say():
    chat, junk = [{"role": "user", "content": "Hi", "n": [1, None]}], '{"a": 1, "a": 2}'

    def content(more: str) -> bytes:
        more_json = pa.array(["{}", more], pa.json_())
        table = pa.table({"messages": pa.array([json.dumps(chat)] * 2, pa.json_()), "more": more_json})
        pq.write_table(table, file := io.BytesIO())
        return file.getvalue()

    assert converted(content("[1]"), "p.parquet")[1] == [
        {"messages": chat, "more": {}},
        {"messages": chat, "more": [1]},
    ]
    [(loc, msg)] = refusal(content(junk), "p.parquet")
    assert loc == ("file", 2)
    assert "in a column of JSON that is not JSON" in msg


def test_parquet_null_prompt_columns_do_not_count_as_given():
    rows = [{"prompt": "a", "input_ids": None}, {"prompt": None, "input_ids": [1]}]
    assert converted(parquet(rows), "p.parquet")[1] == [{"prompt": "a"}, {"input_ids": [1]}]


@given(
    st.lists(
        st.fixed_dictionaries(
            {"prompt": st.text(st.characters(codec="utf-8"), min_size=1)},
            optional={"n": st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.none()},
        ),
        min_size=1,
        max_size=5,
    )
)
def test_whatever_json_can_say_comes_back(rows: list[dict[str, Any]]):
    assert converted(jsonl(*rows), "p.jsonl")[1] == rows


BAD_ROWS: list[tuple[object, tuple[str | int, ...], list[str]]] = [
    ({"text": "a"}, (), ["no prompt given", "text", "give exactly one"]),
    ({"prompt": "a", "input_ids": [1]}, (), ["prompt and input_ids given", "exactly one"]),
    ({"prompt": ""}, ("prompt",), ['""', "not empty"]),
    ({"prompt": 7}, ("prompt",), ["7 given", "text"]),
    ([1], (), ["[1] given", "object"]),
    ({"messages": []}, ("messages",), ["[] given", "list of"]),
    ({"messages": "hi"}, ("messages",), ['"hi" given', "list of"]),
    ({"messages": ["hi"]}, ("messages", 0), ['"hi" given', "object"]),
    ({"messages": [{"role": "bot", "content": "x"}]}, ("messages", 0, "role"), ['"bot"', "one of", "user"]),
    ({"messages": [{"role": "user"}]}, ("messages", 0, "content"), ["null given", "text"]),
    (
        {"messages": [{"role": "assistant", "content": "x"}]},
        ("messages", 0, "role"),
        ["assistant", "end with"],
    ),
    ({"messages": [{"role": "user", "content": ""}]}, ("messages", 0, "content"), ['""', "give the text"]),
    ({"input_ids": []}, ("input_ids",), ["[] given", "not empty"]),
    ({"input_ids": [1, -1]}, ("input_ids", 1), ["-1 given", "whole number from 0"]),
    ({"input_ids": [True]}, ("input_ids", 0), ["true given"]),
    ({"input_ids": [2**31]}, ("input_ids", 0), ["2147483648 given"]),
]


@pytest.mark.parametrize(("row", "loc", "words"), BAD_ROWS)
def test_a_bad_row_is_named_by_line_value_and_rule(row: object, loc: tuple[str | int, ...], words: list[str]):
    [(found, msg)] = refusal(jsonl({"prompt": "fine"}, row), "p.jsonl")
    assert found == ("file", 2, *loc)
    assert msg.startswith("Line 2: ")
    for word in words:
        assert word in msg


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt" "a"}\n', ["not JSON", "column 11", "JSON object"]),
        (b'{"prompt": "a", "x": 1e999}\n', ["NaN or infinite", "null"]),
        (b'{"prompt": "\\ud800"}\n', ["\\ud800 given", "surrogate"]),
        (b'{"prompt": "caf\xe9"}\n', ["0xE9", "position 16", "UTF-8"]),
        (b"[" * 100_000 + b"\n", ["nested more than 64 deep", "flatten"]),
        (b'{"prompt": ' + b"9" * 5000 + b"}\n", ["thousands of digits", "shorten"]),
        (b'{"prompt":"' + b"a" * MAX_LINE_BYTES + b'"}\n', ["more than 1048576 bytes", "shorten"]),
        (b'{"prompt": "cut o', ["ends in the middle", "cut off", "upload it whole"]),
    ],
)
def test_an_unreadable_line(line: bytes, words: list[str]):
    [(loc, msg)] = refusal(jsonl({"prompt": "fine"}) + line, "p.jsonl")
    assert loc == ("file", 2)
    for word in words:
        assert word in msg


@pytest.mark.parametrize(
    ("line", "where", "words"),
    [
        (b'{"prompt": "a", "prompt": "b"}', ("prompt",), ['"prompt" given 2 times', "keep one"]),
        (b'{"prompt": "a", "x": [{"k": 1, "k": 2, "k": 3}]}', ("x", 0, "k"), ['"k" given 3 times']),
        (b'{"prompt": "a", "x": NaN}', ("x",), ["NaN given", "null"]),
    ],
)
def test_a_row_that_readers_would_not_agree_on(line: bytes, where: tuple[str | int, ...], words: list[str]):
    [(loc, msg)] = refusal(line, "p.jsonl")
    assert loc == ("file", 1, *where)
    for word in words:
        assert word in msg


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("place", ["prompt", "messages", "input_ids", "further"])
def test_rows_of_every_depth_are_taken_or_refused(place: str):
    for depth in (*range(1, 70), *range(70, 900, 83), *range(900, 1101, 3)):
        content = f'{{"prompt": "a", "{place}": {nested(depth)}}}'
        if place == "further" and depth < MAX_DEPTH:  # the row is one level by itself
            assert converted(content.encode(), "p.jsonl")[0].rows == 1
        else:
            assert refusal(content.replace("prompt", "_", 1).encode(), "p.jsonl")
        table = f'messages\n"{nested(depth)}"\n'.encode()
        [(loc, msg)] = refusal(table, "p.csv")
        assert loc[:3] == ("file", 2, "messages")
        assert ("nested more than 64 deep" in msg) == (depth > MAX_DEPTH)


def test_reading_goes_on_after_a_line_that_is_too_long():
    content = b"x" * (3 * MAX_LINE_BYTES) + b'\n{"prompt": 1}\n'
    assert [loc for loc, _ in refusal(content, "p.jsonl")] == [("file", 1), ("file", 2, "prompt")]


def test_the_first_bad_lines_are_named_and_no_more():
    content = jsonl({"prompt": "fine"}, *[{"prompt": ""}] * 30)
    assert [loc[1] for loc, _ in refusal(content, "p.jsonl")] == list(range(2, 2 + MAX_ISSUES))


@pytest.mark.parametrize(
    ("content", "filename", "words"),
    [
        (b"", "p.jsonl", ["empty file", "0 bytes"]),
        (b"\n \n", "p.jsonl", ["no rows given"]),
        (b"prompt\n", "p.csv", ["no rows given"]),
        ('{"prompt": "a"}'.encode("utf-16"), "p.jsonl", ["UTF-16", "save it as UTF-8"]),
        (b"\x1f\x8b\x08\x00", "p.jsonl", ["gzip", "unpack"]),
        (parquet(ROWS), "p.jsonl", ["a Parquet file", "name it .parquet"]),
        (b"{}", "p.txt", ['"p.txt"', ".jsonl", ".parquet"]),
        (b"{}", "jsonl", ['"jsonl"', "must end in"]),
        (parquet(ROWS)[:-9], "p.parquet", ["ends with PAR1", "cut off"]),
        (b"PAR1 no parquet PAR1", "p.parquet", ["cannot be read after row 0", "write it again"]),
        (b"{}aaaaaaa", "p.parquet", ["begins with PAR1"]),
        (parquet([{"text": "a"}]), "p.parquet", ['["text"] given', "prompt"]),
        (parquet([{"prompt": "a", "b": b"\x00"}]), "p.parquet", ['"b"', "binary", "no form in JSON"]),
        (b"text,label\na,b\n", "p.csv", ['["text", "label"] given', "prompt"]),
        (b"prompt,prompt\na,b\n", "p.csv", ['"prompt" given twice']),
        (b"prompt,\na,b\n", "p.csv", ["without a name"]),
        (b'prompt\n"cut off', "p.csv", ["ends inside the quoted field", "line 2", "upload it whole"]),
        (b'prompt\n"a"b\n', "p.csv", ["not CSV", "quote fields"]),
        (b"prompt,b\na,b\xe9\n", "p.csv", ["0xE9", "UTF-8"]),
        (
            b'prompt\n"' + b"a\n" * MAX_LINE_BYTES,
            "p.csv",
            ["more than 1048576 characters", "close the quote"],
        ),
    ],
)
def test_a_file_that_is_no_prompt_file(content: bytes, filename: str, words: list[str]):
    [(loc, msg)] = refusal(content, filename)
    assert loc[0] == "file"
    for word in words:
        assert word in msg


@pytest.mark.parametrize(
    ("content", "filename", "lines", "words"),
    [
        (b'prompt,b\n"",1\nb,2\nc\xe9,3\n', "p.csv", [2, 4], "0xE9"),
        (b'prompt,b\n"",1\nb,2\n"c', "p.csv", [2, 4], "not closed"),
        (b'prompt,b\n"",1\nb,2\n"c"d,3\n', "p.csv", [2, 4], "not CSV"),
    ],
)
def test_bad_lines_are_told_even_where_the_file_breaks_off_behind_them(
    content: bytes, filename: str, lines: list[int], words: str
):
    found = refusal(content, filename)
    assert [loc[1] for loc, _ in found] == lines
    assert [msg.split(":")[0] for _, msg in found] == [f"Line {line}" for line in lines]
    assert words in found[-1][1]


def test_bad_rows_are_told_even_where_a_parquet_file_is_damaged_behind_them():
    rows = [{"prompt": ""}] + [{"prompt": f"{number:05}"} for number in range(5000)]
    whole = parquet(rows, row_group_size=2500, compression="none", use_dictionary=False)
    middle = len(whole) * 3 // 4
    first, last = refusal(whole[:middle] + bytes(2000) + whole[middle + 2000 :], "p.parquet")
    assert first[0] == ("file", 1, "prompt")
    assert "cannot be read after row" in last[1]


def test_csv_row_with_too_few_fields_is_named():
    assert [(loc, msg[:29]) for loc, msg in refusal(b"prompt,b\na,b\nc\n", "p.csv")] == [
        (("file", 3), "Line 3: 1 fields given where ")
    ]


def test_csv_counts_lines_not_records():
    assert refusal(b'prompt\n"a\nb\nc"\n""\n', "p.csv")[0][0] == ("file", 5, "prompt")


def test_parquet_nan_is_named_by_its_row():
    [(loc, msg)] = refusal(
        parquet([{"prompt": "a", "x": 1.0}, {"prompt": "b", "x": float("nan")}]), "p.parquet"
    )
    assert loc == ("file", 2)
    assert "NaN" in msg


def test_a_row_group_that_declares_too_much_is_refused_before_it_is_unpacked():
    bomb = parquet([{"prompt": "a" * 3_000_000}] * 10, use_dictionary=False, compression="zstd")
    assert len(bomb) < 50_000
    [(_, msg)] = refusal(bomb, "p.parquet")
    assert "values of" in msg
    assert "are the most" in msg


def named_again(value: str, times: int) -> pa.Array:
    """One value, stored once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), pa.array([value]))


def one_list(values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


BIG = "a" * 900_000
BOMBS = {
    "a value named a thousand times by one row": (
        {"prompt": pa.array(["a"]), "x": one_list(named_again(BIG, 1000))},
        "a row of 900003",
    ),
    "a value named by every row, in every column": (
        {"prompt": pa.array(["a"] * 64), **{f"x{n}": named_again(BIG, 64) for n in range(60)}},
        "a row of 54000",
    ),
    "a long name in each of a thousand structs": (
        {
            "prompt": pa.array(["a"]),
            "x": one_list(pa.StructArray.from_arrays([pa.nulls(1000, pa.int8())], [BIG])),
        },
        "a row of 9000",
    ),
    "a number fifteen million times in one row": (
        {"prompt": pa.array(["a"]), "x": one_list(pa.repeat(pa.scalar(1, pa.int8()), 15_000_000))},
        "a row of 30000",
    ),
    "a number twenty million times": (
        {"prompt": pa.array(["a"]), "x": one_list(pa.repeat(pa.scalar(1, pa.int8()), 20_000_000))},
        "20000000 values in lists given",
    ),
}
MEASURE = """
import io, resource, sys
from service.uploads.convert import convert
from service.uploads.lines import BadFile

resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    convert(io.BytesIO(sys.stdin.buffer.read()), "p.parquet", io.BytesIO(), 2**30)
except BadFile as error:
    print(error.issues[0].msg)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_parquet_file_that_unpacks_to_a_huge_one_takes_no_memory(name: str):
    columns, expected = BOMBS[name]
    target = io.BytesIO()
    pq.write_table(pa.table(columns), target, compression="zstd", store_schema=False)
    bomb = target.getvalue()
    assert len(bomb) < 4_000_000
    run = subprocess.run([sys.executable, "-c", MEASURE], input=bomb, capture_output=True, check=True)
    msg, megabytes = run.stdout.decode().splitlines()
    assert expected in msg
    assert "are the most" in msg
    # A file of text within all limits may take as much as its row groups: this is far below one bomb.
    assert int(megabytes) < 400


def test_parquet_text_is_read_whatever_way_it_is_stored():
    rows = [
        {
            "prompt": f"p{n % 7}",
            "many": [f"{n}-{i}" for i in range(n % 5)],
            "inner": {"a": f"v{n}", "n": n, "q": None if n % 3 else [f"w{n % 4}"]},
        }
        for n in range(3000)
    ]
    for stored in (
        {},
        {"use_dictionary": False},
        {"dictionary_pagesize_limit": 500, "data_page_size": 300, "row_group_size": 900},
        {"data_page_version": "2.0"},
    ):
        assert converted(parquet(rows, **stored), "p.parquet")[1] == rows


def test_parquet_rows_are_as_long_as_lines_may_be():
    long = "a" * (MAX_LINE_BYTES - 100)
    assert converted(parquet([{"prompt": long}] * 4), "p.parquet")[0].rows == 4
    [(loc, msg), *_] = refusal(
        parquet([{"prompt": "a", "x": ""}, {"prompt": long, "x": "a" * 200}]), "p.parquet"
    )
    assert loc == ("file", 2)
    assert msg.startswith("Line 2: a row of ")


def test_text_of_parquet_that_is_not_utf8_is_named_by_its_row():
    plain = parquet([{"prompt": f"caf{n}"} for n in range(8)], use_dictionary=False, compression="none")
    [(loc, msg)] = refusal(plain.replace(b"caf5", b"ca\xff5"), "p.parquet")
    assert loc == ("file", 6)
    assert "not UTF-8" in msg


def test_encodings_that_repeat_text_without_a_dictionary_are_refused():
    encoded = parquet([{"prompt": "a"}], use_dictionary=False, column_encoding={"prompt": "DELTA_BYTE_ARRAY"})
    [(_, msg)] = refusal(encoded, "p.parquet")
    assert '"DELTA_BYTE_ARRAY"' in msg
    assert "write it with a dictionary, or plain" in msg


def test_rows_that_grow_beyond_the_limit_are_refused():
    [(loc, msg)] = refusal(parquet([{"prompt": "a" * 100}] * 1000), "p.parquet", room=5000)
    assert loc == ("file",)
    assert "5000 bytes" in msg
