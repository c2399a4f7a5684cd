"""Whether sampling computes what training computes: a cached forward, token by token, against a whole one.

Where the two agree but for the rounding of fp32, log-probabilities and values of a rollout need no forward
of their own: sampling has them. In half precision they differ by far more, and a ratio would not begin at 1.
This module knows no processes and no training.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from ppo_engine.actor_critic import ActorCritic, TokenOutputs, causal_lm
from ppo_engine.batch import collate
from ppo_engine.draws import Purpose
from ppo_engine.rollout.generate import Response, generate
from ppo_engine.rollout.sampling import row_uniforms

_TOKENS = 8  # of a response, and of the longer prompt: the other one is padded; fewer in a short context
_TOLERANCE = 1e-4  # of a log-probability, in nats; fp32 rounds a hundredth of it
_OF_LENGTH = ("dynamic", "longrope")  # rotations that change with the length: cached keys keep their old ones


@torch.no_grad()
def samples_as_it_trains(actor_critic: ActorCritic) -> bool:
    """Try it, on a few tokens. The module is left in evaluation mode.

    False for weights that are not fp32, and for positions whose meaning depends on how long a text becomes.
    """
    policy = causal_lm(actor_critic.policy.eval())
    config = policy.config.get_text_config()
    if any(weight.dtype != torch.float32 for weight in policy.parameters()) or _turns_with_length(config):
        return False
    tokens = max(1, min(_TOKENS, (getattr(config, "max_position_embeddings", None) or 2 * _TOKENS) // 2))
    prompts = [[0], [token % config.vocab_size for token in range(tokens)]]
    sampled = generate(
        policy,
        prompts,
        row_uniforms(0, 0, range(len(prompts)), tokens, Purpose.ROLLOUT),
        temperature=1.0,
        stop_token_id=None,
        batch_rows=len(prompts),
        device=policy.device,
    )
    trained = _outputs(actor_critic, prompts, sampled)
    logprobs = torch.tensor(list(chain.from_iterable(row.logprobs for row in sampled)))
    return torch.allclose(logprobs, trained.logprobs_N.cpu(), rtol=0.0, atol=_TOLERANCE)


def _turns_with_length(config: Any) -> bool:
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [
        given,
        *(part for part in given.values() if isinstance(part, dict)),
    ]  # or one of each kind of layer
    return any(kind.get("rope_type") in _OF_LENGTH for kind in kinds)


def _outputs(actor_critic: ActorCritic, prompts: list[list[int]], sampled: list[Response]) -> TokenOutputs:
    device = causal_lm(actor_critic.policy).device
    batch = collate(prompts, [response.ids for response in sampled], range(len(prompts)), 0, device)
    return actor_critic.token_outputs(*batch.tensors, temperature=1.0, with_value=False)
