"""From a data set to prompt rows: token ids, text, and the columns that rewards may read.

A row is text (`prompt`), a chat (`messages`), or ids (`input_ids`), whether it comes from a run
directory's JSONL or from a `datasets.Dataset`. Which rows an update takes is a pure function of the seed
and the update, so a resume needs a counter only. This module does not know models or batches.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ppo_engine.draws import Purpose, stream
from ppo_engine.spec import Issue, Loc, SpecError, shown

DataCollator: TypeAlias = Callable[..., Mapping[str, Any]]

_MAX_ID = 2**31  # tokenizers refuse larger ones with an exception of their own
_MAX_ISSUES = 10  # rows that are named; the others are counted


@dataclass(frozen=True)
class Prompt:
    """One row. columns: all that the row holds beside its prompt; of a chat, `messages` too."""

    text: str
    ids: list[int]
    columns: dict[str, Any]


def read_jsonl(path: Path, loc: Loc) -> Iterator[dict[str, Any]]:
    """The rows of a canonical prompt file, one JSON object per line. loc: what messages call it.

    Raises:
        SpecError: a line is none; the first of them is named.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                raise SpecError([Issue(loc=loc, msg=f"Line {number} is not JSON: {error}.")]) from None
            if not isinstance(row, dict):
                msg = f"Line {number} holds {shown(row)}; each line is a JSON object."
                raise SpecError([Issue(loc=loc, msg=msg)])
            yield row


def read_dataset(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    limit: int | None,
    data_collator: DataCollator | None = None,
    *,
    vocab_size: int | None = None,
    loc: Loc = ("train_dataset",),
) -> list[Prompt]:
    """Make every row a prompt.

    rows: dicts, such as a `datasets.Dataset` or `read_jsonl` gives. Of `input_ids`, `messages`, and
        `prompt` the first that a row has is its prompt.
    limit: most tokens of a prompt: the model's context less response_length. None: without limit.
    data_collator: is given the `input_ids` of each row that has them as a batch of one, and may change
        them; padding is taken away by the attention mask it returns.
    vocab_size: of the model's embedding. loc: what messages call the data set.

    Raises:
        SpecError: there are no rows, or some have no prompt, an empty one, one the chat template refuses,
            ids the model lacks, or one that is too long to leave room for a response.
    """
    prompts: list[Prompt] = []
    problems: list[str] = []
    for number, row in enumerate(rows, 1):  # as lines of a file are counted
        try:
            prompt = _prompt(row, tokenizer, data_collator)
            _check_ids(prompt.ids, limit, vocab_size)
            prompts.append(prompt)
        except _BadRow as problem:
            problems.append(f"Row {number} {problem}")
    if not prompts and not problems:
        problems.append("No rows given; give at least one prompt.")
    if problems:
        raise SpecError([Issue(loc=loc, msg=msg) for msg in _first(problems)])
    return prompts


class _BadRow(ValueError):
    """What is wrong with a row; the message begins with a verb."""


def _prompt(row: Mapping[str, Any], tokenizer: Any, data_collator: DataCollator | None) -> Prompt:
    if row.get("input_ids") is not None:
        ids = _given_ids(row["input_ids"], data_collator)
        return Prompt(tokenizer.decode(ids, skip_special_tokens=True), ids, _columns(row, "input_ids"))
    if row.get("messages") is not None:
        text = _rendered(row["messages"], tokenizer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return Prompt(text, ids, {**_columns(row, "messages"), "messages": row["messages"]})
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        raise _BadRow(f"has the columns {shown(sorted(row))}; give prompt, messages, or input_ids.")
    return Prompt(prompt, tokenizer(prompt)["input_ids"], _columns(row, "prompt"))


def _columns(row: Mapping[str, Any], form: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in (form, "attention_mask")}


def _rendered(messages: Any, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise _BadRow(
            "is a chat, and the model's tokenizer has no chat template; give prompt instead of messages."
        )
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's; it may raise anything
        raise _BadRow(
            f"has messages that the chat template refuses: {type(error).__name__}: {error}"
        ) from error
    return text


def _given_ids(given: Any, data_collator: DataCollator | None) -> list[int]:
    try:
        ids = [operator.index(token) for token in given]
    except TypeError:
        raise _BadRow(f"has the input_ids {shown(given)}; give a list of whole numbers.") from None
    wrong = [token for token in ids if not 0 <= token < _MAX_ID]
    if wrong:
        raise _BadRow(f"has the token id {wrong[0]}; ids go from 0 to the model's vocabulary.")
    return ids if data_collator is None else _collated(ids, data_collator)


def _collated(ids: list[int], data_collator: DataCollator) -> list[int]:
    batch = data_collator([{"input_ids": ids}])
    collated = [int(token) for token in batch["input_ids"][0]]
    mask = batch.get("attention_mask")
    if mask is None:
        return collated
    return [token for token, is_text in zip(collated, mask[0], strict=True) if is_text]


def _check_ids(ids: Sequence[int], limit: int | None, vocab_size: int | None) -> None:
    if not ids:
        raise _BadRow("has an empty prompt; a prompt needs at least one token.")
    if limit is not None and len(ids) > limit:
        raise _BadRow(
            f"has a prompt of {len(ids)} tokens; the model's context less response_length leaves room for "
            f"{max(limit, 0)}: shorten the prompt, or lower response_length."
        )
    if vocab_size is not None and max(ids) >= vocab_size:
        raise _BadRow(f"has the token id {max(ids)}; the model has ids 0 to {vocab_size - 1}.")


def _first(problems: Sequence[str]) -> list[str]:
    more = len(problems) - _MAX_ISSUES
    return [*problems[:_MAX_ISSUES], *([f"{more} more rows have problems."] if more > 0 else [])]


def digest(prompts: Sequence[Prompt]) -> str:
    """Tells data sets apart by the ids of their prompts, in order."""
    return hashlib.sha256(json.dumps([prompt.ids for prompt in prompts]).encode()).hexdigest()


def rows_of_update(update: int, batch_size: int, n: int, seed: int) -> list[int]:
    """Which of the n prompts an update takes, over all processes, in order. update: how many came before.

    Prompts come in passes, each in an order of its own; a batch may span passes, and every prompt comes
    once per pass.
    """
    first = update * batch_size
    passes = range(first // n, (first + batch_size - 1) // n + 1)
    orders = {number: stream(seed, Purpose.PROMPT_ORDER, number).permutation(n) for number in passes}
    return [int(orders[position // n][position % n]) for position in range(first, first + batch_size)]
