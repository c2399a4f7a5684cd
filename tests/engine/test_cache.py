"""The growing cache holds what transformers' own holds, token by token, also when rows leave."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Lfm2Config, Lfm2ForCausalLM, MistralConfig, MistralForCausalLM

from ppo_engine.draws import Purpose
from ppo_engine.rollout.cache import GrowingLayer, growing_cache
from ppo_engine.rollout.generate import Response, generate
from ppo_engine.rollout.sampling import row_uniforms
from tests.engine import tiny


def test_logits_are_those_of_transformers_cache_beyond_its_first_room() -> None:
    model = tiny.policy(max_position_embeddings=256).eval()
    ours, theirs = growing_cache(model.config), DynamicCache(config=model.config)
    torch.manual_seed(0)
    ids = torch.randint(4, 16, (3, 5))
    with torch.no_grad():
        for step in range(150):
            if step == 20:  # a row leaves
                kept = torch.tensor([0, 2])
                ours.reorder_cache(kept)
                theirs.reorder_cache(kept)
                ids = ids[kept]
            own = model(input_ids=ids, past_key_values=ours).logits
            assert torch.equal(own, model(input_ids=ids, past_key_values=theirs).logits)
            ids = own[:, -1:].argmax(-1)

    assert ours.get_seq_length() == theirs.get_seq_length() == 5 + 149
    for layer, plain in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(layer.keys, plain.keys)
        assert torch.equal(layer.values, plain.values)


def test_a_token_is_written_without_moving_the_others() -> None:
    layer = GrowingLayer()
    layer.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))
    place = layer.keys.data_ptr()
    for _ in range(10):
        layer.update(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4))

    assert layer.keys.data_ptr() == place
    assert layer.keys[0, 0, :, 0].tolist() == [0.0] * 3 + [1.0] * 10


def test_layers_of_other_kinds_stay_transformers_own() -> None:
    config = MistralConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=4,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    cache = growing_cache(config)

    assert not any(isinstance(layer, GrowingLayer) for layer in cache.layers)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1]
        model(input_ids=ids[:, :-1], past_key_values=cache)
        stepped = model(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(stepped, whole)


def test_rows_leave_the_state_of_layers_that_are_no_attention() -> None:
    """Responses of a batch from which rows leave, against each row sampled alone."""
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, layer_types=["conv", "full_attention"], pad_token_id=0, eos_token_id=1,
        bos_token_id=2,
    )  # fmt: skip
    model = Lfm2ForCausalLM(config).eval()
    prompts = [[3 + row % 10, 5] for row in range(12)]
    uniforms = row_uniforms(0, 1, range(12), 12, Purpose.ROLLOUT)

    def sampled(rows: list[int]) -> list[Response]:
        return generate(
            model,
            [prompts[row] for row in rows],
            uniforms[rows],
            temperature=1.0,
            stop_token_id=1,
            batch_rows=12,
            device=torch.device("cpu"),
        )

    together = sampled(list(range(12)))
    assert len({len(response.ids) for response in together}) > 3
    for response, alone in zip(together, (sampled([row])[0] for row in range(12)), strict=True):
        assert response.ids == alone.ids
        assert response.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
