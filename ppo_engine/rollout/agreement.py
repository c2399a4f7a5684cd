"""Whether sampling computes what training computes: a cached forward, token by token, against a whole one.

Where the two agree but for the rounding of fp32, log-probabilities and values of a rollout need no forward
of their own: sampling has them. In half precision they differ by far more, and a ratio would not begin at 1.
This module knows no processes and no training.
"""

from __future__ import annotations

from itertools import chain

import torch

from ppo_engine.actor_critic import ActorCritic, TokenOutputs, causal_lm
from ppo_engine.batch import collate
from ppo_engine.draws import Purpose
from ppo_engine.rollout.generate import Response, generate
from ppo_engine.rollout.sampling import row_uniforms

_PROMPTS = [[0], [2, 1]]  # of different lengths, so that one of them is padded
_TOKENS = 2
_TOLERANCE = 1e-4  # of a log-probability, in nats; fp32 rounds a hundredth of it


@torch.no_grad()
def samples_as_it_trains(actor_critic: ActorCritic) -> bool:
    """Try it, on a few tokens. The module is left in evaluation mode; False for weights that are not fp32."""
    policy = causal_lm(actor_critic.policy.eval())
    if any(weight.dtype != torch.float32 for weight in policy.parameters()):
        return False
    sampled = generate(
        policy,
        _PROMPTS,
        row_uniforms(0, 0, range(len(_PROMPTS)), _TOKENS, Purpose.ROLLOUT),
        temperature=1.0,
        stop_token_id=None,
        batch_rows=len(_PROMPTS),
        device=policy.device,
    )
    trained = _outputs(actor_critic, sampled)
    logprobs = torch.tensor(list(chain.from_iterable(row.logprobs for row in sampled)))
    return torch.allclose(logprobs, trained.logprobs_N.cpu(), rtol=_TOLERANCE, atol=_TOLERANCE)


def _outputs(actor_critic: ActorCritic, sampled: list[Response]) -> TokenOutputs:
    device = causal_lm(actor_critic.policy).device
    batch = collate(_PROMPTS, [response.ids for response in sampled], range(len(_PROMPTS)), 0, device)
    return actor_critic.token_outputs(
        batch.input_ids_BT,
        batch.attention_mask_BT,
        batch.prompt_lengths_B,
        batch.response_lengths_B,
        temperature=1.0,
        with_value=False,
    )
