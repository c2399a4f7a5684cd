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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from ppo_engine.draws import Purpose, stream
from ppo_engine.issues import Issue, Loc, SpecError, shown
from ppo_engine.spec import PromptLengths

DataCollator: TypeAlias = Callable[..., Mapping[str, Any]]

_MAX_ID = 2**31  # tokenizers refuse larger ones with an exception of their own
_MAX_ISSUES = 10  # rows that are named; the others are counted


@dataclass(frozen=True)
class Prompt:
    """One row. columns: all that the row holds beside its prompt; of a chat, `messages` too."""

    text: str
    ids: list[int]
    columns: dict[str, Any]


_AS_LONG_AS_THERE_IS_ROOM = PromptLengths()


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a data set that are kept, in order, and what became of those that were too long."""

    prompts: list[Prompt]
    dropped: int
    truncated: int

    @property
    def rows(self) -> int:
        """As given."""
        return len(self.prompts) + self.dropped

    def counts(self) -> dict[str, int]:
        return {
            "rows": self.rows,
            "kept": len(self.prompts),
            "dropped": self.dropped,
            "truncated": self.truncated,
        }


@dataclass(frozen=True)
class Limit:
    """How long prompts may be, and what becomes of longer ones.

    room: tokens that the model's context less response_length leaves; None: not known. names: what messages
    call the fields of `lengths`: overlong, max_length.
    """

    room: int | None = None
    lengths: PromptLengths = _AS_LONG_AS_THERE_IS_ROOM
    names: tuple[str, str] = ("overlong_prompts", "max_prompt_length")

    @property
    def tokens(self) -> int | None:
        """Most of a prompt; None: without limit."""
        bounds = [bound for bound in (self.room, self.lengths.max_length) if bound is not None]
        return min(bounds, default=None)

    def told(self) -> tuple[str, str]:
        """What sets the limit, and how to move it."""
        if self.room == self.tokens:
            room = max(self.room or 0, 0)
            return f"the model's context less response_length leaves room for {room}", "lower response_length"
        return f"{self.names[1]} is {self.tokens}", f"raise {self.names[1]}"


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
    limit: Limit,
    data_collator: DataCollator | None = None,
    *,
    vocab_size: int | None = None,
    loc: Loc = ("train_dataset",),
) -> PromptSet:
    """Make every row a prompt.

    rows: dicts, such as a `datasets.Dataset` or `read_jsonl` gives. Of `input_ids`, `messages`, and
        `prompt` the first that a row has is its prompt.
    limit: longer prompts are refused, left out, or lose their first tokens; the text is then that of the
        tokens which are left, while columns stay as they are.
    data_collator: is given the `input_ids` of each row that has them as a batch of one, and may change
        them; padding is taken away by the attention mask it returns.
    vocab_size: of the model's embedding. loc: what messages call the data set.

    Raises:
        SpecError: there are no rows, or some have no prompt, an empty one, one the chat template refuses,
            ids the model lacks, or one that is too long and to be refused; or none is left.
    """
    prompts: list[Prompt] = []
    problems: list[str] = []
    dropped = truncated = 0
    for number, row in enumerate(rows, 1):  # as lines of a file are counted
        try:
            prompt = _prompt(row, tokenizer, data_collator)
            _check_ids(prompt.ids, vocab_size)
            if limit.tokens is None or len(prompt.ids) <= limit.tokens:
                prompts.append(prompt)
            elif limit.lengths.overlong == "drop":
                dropped += 1
            elif limit.lengths.overlong == "truncate":
                truncated += 1
                prompts.append(_end_of(prompt, limit.tokens, tokenizer, row))
            else:
                raise _too_long(prompt, limit)
        except _BadRow as problem:
            problems.append(f"Row {number} {problem}")
    if not prompts and not problems and dropped:
        problems.append(_none_left(dropped, limit))
    elif not prompts and not problems:
        problems.append("No rows given; give at least one prompt.")
    if problems:
        raise SpecError([Issue(loc=loc, msg=msg) for msg in _first(problems)])
    return PromptSet(prompts, dropped, truncated)


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


def _end_of(prompt: Prompt, tokens: int, tokenizer: Any, row: Mapping[str, Any]) -> Prompt:
    """Its last tokens, with their text. Special tokens stand in it where they stood in the row's."""
    assert tokens > 0, "the rules leave room for a prompt"
    ids = prompt.ids[-tokens:]
    is_decoded = row.get("input_ids") is not None
    return replace(prompt, text=tokenizer.decode(ids, skip_special_tokens=is_decoded), ids=ids)


def _too_long(prompt: Prompt, limit: Limit) -> _BadRow:
    rule, fix = limit.told()
    return _BadRow(
        f"has a prompt of {len(prompt.ids)} tokens; {rule}: shorten the prompt, {fix}, or have such prompts "
        f"dropped or truncated by {limit.names[0]}."
    )


def _none_left(dropped: int, limit: Limit) -> str:
    rule, fix = limit.told()
    return (
        f"{dropped} of {dropped} prompts are dropped, since {rule}, and none is left: shorten the prompts, "
        f'{fix}, or give {limit.names[0]} "truncate".'
    )


def _check_ids(ids: Sequence[int], vocab_size: int | None) -> None:
    if not ids:
        raise _BadRow("has an empty prompt; a prompt needs at least one token.")
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
