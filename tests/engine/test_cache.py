"""The growing cache holds what transformers' own holds, token by token, also when rows leave."""

from __future__ import annotations

import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from ppo_engine.rollout.cache import GrowingLayer, growing_cache
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
                ours.batch_select_indices(kept)
                theirs.batch_select_indices(kept)
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
