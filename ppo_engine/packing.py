"""Rows without their padding: a trunk reads the tokens of all rows in one line, and attends row by row.

Everything a trunk does but attention is done token by token, so rows of any lengths can lie one behind the
other; attention takes them apart again, a group of rows of like length at a time. This goes through
transformers' own way to register an attention, which a model is switched to; whether the model then still
computes the same is tried. This module knows no policy, no losses, and no processes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ppo_engine.batch import rectangles

_LOGGER = logging.getLogger(__name__)

ATTENTION = "proxima_packed"
"""What transformers calls this attention: PyTorch's own, group by group where there are groups."""

_KINDS = {"full_attention", "sliding_attention"}  # of layers, that `grouped_attention` computes
_TRIED = (3, 24, 5, 1)  # tokens of the rows that are tried: of unlike length, so that there are two groups
_TOLERANCE = 1e-4  # of hidden states in fp32, of their norm; rounding comes to a hundredth of it
_HALF_TOLERANCE = 3e-2


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    groups: Sequence[tuple[int, int]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within rows. query, key, value: [1, heads, N, width]; returns [1, N, heads, width].

    groups: of the N tokens, in order, (rows, tokens of each). None: attention as PyTorch's, of [B, heads, T,
    width] under the mask given. What pads a row stands at its end, where no token of the row looks.
    """
    if groups is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    _require_known(module, attention_mask, kwargs)
    sizes = [rows * tokens for rows, tokens in groups]
    parts = zip(groups, *(torch.split(states, sizes, dim=2) for states in (query, key, value)), strict=True)
    attended = []
    for shape, *states in parts:
        q, k, v = (part[0].unflatten(1, shape).transpose(0, 1) for part in states)
        mask = _window_mask(shape[1], kwargs.get("sliding_window"), query.device)
        attended.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0].flatten(0, 1))
    return torch.cat(attended)[None], None


def _require_known(module: nn.Module, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raises NotImplementedError where a layer means more by its mask than is done without it."""
    has_window = bool(getattr(getattr(module, "config", None), "sliding_window", None))
    if (
        attention_mask is None
        or attention_mask.numel() != 1
        or (has_window and "sliding_window" not in kwargs)
    ):
        raise NotImplementedError(f"{type(module).__name__} has a mask of its own; it reads padded rows.")


def _window_mask(tokens: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which tokens each token looks at, [1, 1, T, T], where it does not see all before it; else None."""
    if window is None or tokens <= window:
        return None
    token_T = torch.arange(tokens, device=device)
    ago_TT = token_T[:, None] - token_T
    return ((ago_TT >= 0) & (ago_TT < window))[None, None]


AttentionInterface.register(ATTENTION, grouped_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@dataclass(frozen=True)
class Packed:
    """Right-padded rows [B, T] as one line of N tokens.

    input_ids_1N, position_ids_1N: int64. groups: as `grouped_attention` wants them. place_BT: where in the
    line each token stands; beyond its row's length, anywhere.
    """

    input_ids_1N: Tensor
    position_ids_1N: Tensor
    groups: tuple[tuple[int, int], ...]
    place_BT: Tensor

    @classmethod
    def of(cls, input_ids_BT: Tensor, lengths: Sequence[int]) -> Packed:
        """lengths: of each row, in tokens."""
        device, width = input_ids_BT.device, input_ids_BT.shape[1]
        groups: list[tuple[int, int]] = []
        rows, positions, starts = [], [], torch.zeros(len(lengths), dtype=torch.long)
        line = 0
        for group in rectangles(lengths):
            tokens = lengths[group[0]]  # its longest row stands first
            starts[group] = line + tokens * torch.arange(len(group))
            rows.append(torch.tensor(group).repeat_interleave(tokens))
            positions.append(torch.arange(tokens).repeat(len(group)))
            groups.append((len(group), tokens))
            line += len(group) * tokens
        row_N, position_N = torch.cat(rows).to(device), torch.cat(positions).to(device)
        place_BT = starts.to(device)[:, None] + torch.arange(width, device=device)
        return cls(input_ids_BT[row_N, position_N][None], position_N[None], tuple(groups), place_BT)

    def read(self, trunk: Any, wanted_BT: Tensor) -> Tensor:
        """The trunk's hidden states [N, D] at the tokens wanted, row by row."""
        output = trunk(
            input_ids=self.input_ids_1N,
            position_ids=self.position_ids_1N,
            attention_mask=self._given_mask(),
            use_cache=False,
            groups=self.groups,
        )
        return output.last_hidden_state[0].index_select(0, self.place_BT[wanted_BT])  # type: ignore[no-any-return]

    def _given_mask(self) -> Tensor:
        """With four dimensions: so it is passed on as it is, and none is made. Nothing is read from it."""
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.input_ids_1N.device)


@dataclass(frozen=True)
class Padded:
    """Right-padded rows [B, T], read as they are."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor

    def read(self, trunk: Any, wanted_BT: Tensor) -> Tensor:
        """The trunk's hidden states [N, D] at the tokens wanted, row by row."""
        output = trunk(input_ids=self.input_ids_BT, attention_mask=self.attention_mask_BT, use_cache=False)
        return output.last_hidden_state[wanted_BT]  # type: ignore[no-any-return]


@torch.no_grad()
def pack(model: Any) -> bool:
    """Switch a transformers model to `ATTENTION`, if it then reads packed rows as it reads padded ones.

    Returns whether it does; where it does not, nothing has changed. The model is left in evaluation mode. A
    config may belong to several models, and be switched already.
    """
    config = model.config.get_text_config()
    kinds, before = set(getattr(config, "layer_types", None) or ()), config._attn_implementation
    if before not in ("sdpa", ATTENTION) or not model._can_set_attn_implementation() or kinds - _KINDS:
        return False
    model.eval().set_attn_implementation(ATTENTION)
    if reads_packed(model):
        return True
    model.set_attn_implementation(before)
    return False


def reads_packed(model: Any) -> bool:
    """Try it, on a few tokens: the same as padded, and what a row says does not depend on its neighbours."""
    trunk, device = getattr(model, model.base_model_prefix), model.device
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or max(_TRIED)
    lengths = [min(length, context) for length in _TRIED]
    width = max(lengths)
    ids_BT = torch.arange(len(lengths) * width, device=device).view(-1, width) % min(7, config.vocab_size - 1)
    mask_BT = torch.arange(width, device=device) < torch.tensor(lengths, device=device)[:, None]
    own_BT = mask_BT.clone()
    own_BT[0] = False
    others_BT = ids_BT.clone()
    others_BT[0] += 1  # the neighbour, which must not matter
    try:
        packed, beside_others = (Packed.of(ids, lengths).read(trunk, own_BT) for ids in (ids_BT, others_BT))
    except Exception as error:  # a model that does not know what it is given may fail in any way of its own
        _LOGGER.info("%s reads padded rows: %s: %s", type(model).__name__, type(error).__name__, error)
        return False
    padded = Padded(ids_BT, mask_BT.long()).read(trunk, own_BT)
    tolerance = _TOLERANCE if padded.dtype == torch.float32 else _HALF_TOLERANCE
    distances = [(packed - other).float().norm() for other in (padded, beside_others)]
    return bool(max(distances) <= tolerance * padded.float().norm())
