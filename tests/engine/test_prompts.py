"""Prompt rows from text, chats, and ids; bad rows; which rows an update takes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorWithPadding

from ppo_engine.issues import SpecError
from ppo_engine.prompts import Limit, Prompt, PromptSet, read_dataset, read_jsonl, rows_of_update
from ppo_engine.spec import PromptLengths
from tests.engine import tiny

CHAT = [{"role": "user", "content": "one two"}]


def read(*rows: dict[str, Any], **options: Any) -> list[Prompt]:
    return read_set(*rows, **options).prompts


def read_set(*rows: dict[str, Any], room: int | None = None, **options: Any) -> PromptSet:
    """All that is no field of a `PromptLengths` goes to `read_dataset`."""
    lengths = PromptLengths(
        **{name: options.pop(name) for name in ("overlong", "max_length") if name in options}
    )
    return read_dataset(rows, tiny.tokenizer(chat=True), Limit(room, lengths), **options)


def refusal(*rows: dict[str, Any], **options: Any) -> str:
    with pytest.raises(SpecError) as caught:
        read(*rows, **options)
    assert {issue.loc for issue in caught.value.issues} == {options.get("loc", ("train_dataset",))}
    return "\n".join(issue.msg for issue in caught.value.issues)


def test_text() -> None:
    assert read({"prompt": "one two", "answer": 3}) == [Prompt("one two", [0, 6, 7], {"answer": 3})]


def test_chat_is_rendered_by_the_template_with_one_bos() -> None:
    (prompt,) = read({"messages": CHAT, "answer": 3})
    assert prompt.text == "<s> user one two assistant"
    assert prompt.ids == [0, 4, 6, 7, 5]
    assert prompt.columns == {"answer": 3, "messages": CHAT}


def test_ids_are_taken_as_they_are() -> None:
    (prompt,) = read({"input_ids": [0, 6, 2], "attention_mask": [1, 1, 1], "answer": 3})
    assert prompt == Prompt("one", [0, 6, 2], {"answer": 3})


def test_ids_come_before_text() -> None:
    assert read({"prompt": "one", "input_ids": [7]}) == [Prompt("two", [7], {"prompt": "one"})]


def test_datasets_and_columns_that_some_rows_lack() -> None:
    dataset = Dataset.from_list([{"prompt": "one", "messages": None}, {"prompt": None, "messages": CHAT}])
    assert [prompt.ids for prompt in read(*dataset)] == [[0, 6], [0, 4, 6, 7, 5]]


def test_a_dataset_of_tensors() -> None:
    dataset = Dataset.from_list([{"input_ids": [6, 7]}]).with_format("torch")
    assert [prompt.ids for prompt in read(*dataset)] == [[6, 7]]


def test_a_collator_may_change_ids_and_its_padding_is_taken_away() -> None:
    collator = DataCollatorWithPadding(tiny.tokenizer(), pad_to_multiple_of=8)
    assert read({"input_ids": [0, 6, 7]}, data_collator=collator) == [Prompt("one two", [0, 6, 7], {})]

    def reverse(rows: list[dict[str, list[int]]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [row["input_ids"][::-1] for row in rows]}

    assert read({"input_ids": [6, 7]}, data_collator=reverse) == [Prompt("two one", [7, 6], {})]


def test_jsonl(tmp_path: Path) -> None:
    rows = [{"prompt": "eins\u2028zwei", "n": 1}, {"prompt": "drei"}]  # a line separator is no line's end
    path = tmp_path / "file.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert list(read_jsonl(path, ("prompts", "train"))) == rows


# Bad rows ------------------------------------------------------------------------------------------------


def test_a_prompt_that_leaves_no_room_is_named_with_length_limit_and_fix() -> None:
    fits = {"prompt": "one two"}
    assert len(read(fits, room=3)) == 1
    message = refusal(fits, {"prompt": "one two three"}, room=3, loc=("prompts", "train"))
    assert message == (
        "Row 2 has a prompt of 4 tokens; the model's context less response_length leaves room for 3: "
        "shorten the prompt, lower response_length, or have such prompts dropped or truncated by "
        "overlong_prompts."
    )


def test_a_prompt_above_the_length_given_is_named_with_that() -> None:
    message = refusal({"prompt": "one two three"}, room=9, max_length=3)
    assert message == (
        "Row 1 has a prompt of 4 tokens; max_prompt_length is 3: shorten the prompt, raise "
        "max_prompt_length, or have such prompts dropped or truncated by overlong_prompts."
    )


def test_many_bad_rows_are_named_up_to_ten_and_counted() -> None:
    message = refusal(*[{"prompt": "one two"}] * 25, room=1)
    assert message.count("has a prompt of 3 tokens") == 10
    assert message.endswith("15 more rows have problems.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "one"}, "columns"),
        ({"prompt": 3}, "give prompt, messages, or input_ids"),
        ({"prompt": None}, "give prompt, messages, or input_ids"),
        ({"input_ids": []}, "empty"),
        ({"input_ids": [3, -1]}, "token id -1"),
        ({"input_ids": [3, 2**40]}, f"token id {2**40}"),
        ({"input_ids": ["one"]}, "whole numbers"),
        ({"input_ids": 3}, "whole numbers"),
        ({"input_ids": [3, 16]}, "token id 16; the model has ids 0 to 15"),
        ({"messages": "one"}, "chat template refuses"),
    ],
)
def test_bad_rows(row: dict[str, Any], message: str) -> None:
    assert message in refusal(row, vocab_size=16)


def test_an_empty_text_is_refused_where_the_tokenizer_adds_nothing() -> None:
    with pytest.raises(SpecError, match="Row 1 has an empty prompt"):
        read_dataset([{"prompt": ""}], tiny.tokenizer(bos=False), Limit())


def test_a_chat_needs_a_template() -> None:
    with pytest.raises(SpecError, match="Row 1 is a chat, and the model's tokenizer has no chat template"):
        read_dataset([{"messages": CHAT}], tiny.tokenizer(), Limit())


def test_no_rows() -> None:
    assert refusal() == "No rows given; give at least one prompt."


# Prompts that are too long, and are not refused -------------------------------------------------------------

LONG = {"prompt": "one two three four", "answer": 3}
SHORT = {"prompt": "five"}
IDS = {"input_ids": [0, 6, 2, 7, 8]}  # with a pad token, which no text shows
TALK = {"messages": [{"role": "user", "content": "one two three"}], "answer": 4}


def test_long_prompts_are_dropped_and_counted() -> None:
    read = read_set(LONG, SHORT, IDS, TALK, room=9, max_length=4, overlong="drop")

    assert [prompt.text for prompt in read.prompts] == ["five"]
    assert read.counts() == {"rows": 4, "kept": 1, "dropped": 3, "truncated": 0}


def test_of_long_prompts_the_end_is_kept_with_its_text_and_all_columns() -> None:
    read = read_set(LONG, SHORT, IDS, TALK, room=4, overlong="truncate")

    assert read.prompts == [
        Prompt("one two three four", [6, 7, 8, 9], {"answer": 3}),
        Prompt("five", [0, 10], {}),
        Prompt("one two three", [6, 2, 7, 8], {}),
        Prompt("one two three assistant", [6, 7, 8, 5], {**TALK}),
    ]
    assert read.counts() == {"rows": 4, "kept": 4, "dropped": 0, "truncated": 3}


def test_special_tokens_stay_in_a_text_that_had_them() -> None:
    rows = {"prompt": "three </s> one"}, {"messages": [{"role": "</s>", "content": "one"}]}
    read = read_set(*rows, room=3, overlong="truncate")

    assert [prompt.text for prompt in read.prompts] == ["three </s> one", "</s> one assistant"]


@given(
    st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=9), min_size=1, max_size=9),
    st.integers(1, 9),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_what_is_kept_fits_is_the_end_and_is_counted(
    rows: list[list[int]], room: int, max_length: int | None
) -> None:
    most = min(room, max_length or room)
    data = [{"input_ids": ids} for ids in rows]
    read = read_set(*data, room=room, max_length=max_length, overlong="truncate")

    assert [prompt.ids for prompt in read.prompts] == [ids[-most:] for ids in rows]
    assert read.truncated == sum(len(ids) > most for ids in rows)
    if kept := [ids for ids in rows if len(ids) <= most]:
        read = read_set(*data, room=room, max_length=max_length, overlong="drop")
        assert [prompt.ids for prompt in read.prompts] == kept
        assert read.dropped == len(rows) - len(kept)
        assert read.rows == len(rows)


def test_where_none_is_left_the_numbers_and_the_fix_are_told() -> None:
    assert refusal(LONG, LONG, room=3, overlong="drop") == (
        "2 of 2 prompts are dropped, since the model's context less response_length leaves room for 3, and "
        'none is left: shorten the prompts, lower response_length, or give overlong_prompts "truncate".'
    )


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_what_is_wrong_with_a_row_is_told_however_long_it_is(overlong: str) -> None:
    assert "token id 99" in refusal({"input_ids": [99, 3, 3, 3]}, vocab_size=16, room=2, overlong=overlong)


# Order ---------------------------------------------------------------------------------------------------

Sizes = st.integers(1, 12)
Seeds = st.integers(0, 2**31 - 1)


@given(Sizes, Sizes, Seeds, st.integers(1, 12))
def test_every_pass_takes_every_prompt_once(batch_size: int, n: int, seed: int, updates: int) -> None:
    taken = [row for update in range(updates) for row in rows_of_update(update, batch_size, n, seed)]
    assert len(taken) == updates * batch_size
    for start in range(0, len(taken) - n + 1, n):
        assert sorted(taken[start : start + n]) == list(range(n))
    rest = Counter(taken[len(taken) // n * n :])
    assert max(rest.values(), default=1) == 1


@given(Sizes, Sizes, Seeds, st.integers(0, 1000))
def test_an_update_needs_no_history(batch_size: int, n: int, seed: int, update: int) -> None:
    halves = [rows_of_update(2 * update + half, batch_size, n, seed) for half in (0, 1)]
    assert rows_of_update(update, 2 * batch_size, n, seed) == halves[0] + halves[1]


def test_passes_and_seeds_have_their_own_order() -> None:
    orders = {tuple(rows_of_update(update, 20, 20, seed)) for update in range(4) for seed in range(4)}
    assert len(orders) == 16
