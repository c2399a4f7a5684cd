"""The random-walks policy: its tokenizer, and the fit."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from randomwalks.graph import LETTERS, random_walks
from randomwalks.policy import _batches, fit, make_tokenizer
from randomwalks.sampling import sample
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_each_node_is_one_token_and_text_survives_the_way_there_and_back() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer(LETTERS).input_ids
    assert len(tokenizer) == 23
    assert len(set(ids)) == len(LETTERS)
    assert tokenizer.decode(ids) == LETTERS


def test_padding_and_the_end_are_tokens_of_their_own() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (
        tokenizer.decode([tokenizer.eos_token_id, 5, tokenizer.pad_token_id], skip_special_tokens=True) == "d"
    )


def test_a_letter_that_is_no_node_is_an_error() -> None:
    with pytest.raises(Exception, match="WordLevel"):
        make_tokenizer()("xyz")


def test_a_fit_saves_what_transformers_loads(tmp_path: Path) -> None:
    graph, walks = random_walks(100)
    losses = list(fit(walks, tmp_path, steps=6))
    assert losses[-1] < losses[0]
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<end>"
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 23
    first, second = (sample(graph, tmp_path, per_start=2) for _ in range(2))
    assert first == second
    assert [walk[0] for walk in first.walks] == graph.starts * 2


def test_a_fit_that_is_broken_off_saves_nothing(tmp_path: Path) -> None:
    _, walks = random_walks(100)
    steps = fit(walks, tmp_path / "model", steps=3)
    next(steps)
    steps.close()
    assert not (tmp_path / "model").exists()


def test_a_pass_takes_every_walk_once_in_full_batches_and_a_rest() -> None:
    batches = list(islice(_batches(1000), 32))
    assert [len(batch) for batch in batches] == [32] * 31 + [8]
    assert torch.cat(batches).sort().values.tolist() == list(range(1000))
