"""Attention as one op, and cached attention, which reads earlier keys and values from a cache.

``attention`` attends over a whole sequence. ``cached_attention`` attends from new tokens: each row of a batch has a
number of tokens in the cache and a number of new tokens, padded on the right. ``positions`` returns the positions of a
whole sequence, and ``rows`` gathers tokens of each row. The functions here define the results of the ops; a target
decides how it computes them.
"""

from collections.abc import Container, Sequence
from typing import final

import torch
from torch import Tensor

from lorac.ir.slots.attention import BranchAttention, require_causal

IDS, DECODER_IDS, LOGITS_TO_KEEP = "input_ids", "decoder_input_ids", "logits_to_keep"
"""Inputs of a graph with a cache: token ids, token ids of a decoder that has an encoder, and the indices of the tokens
whose logits are returned."""
PAST_LENGTHS, NEW_LENGTHS = "past_lengths", "new_lengths"
"""Inputs, one number for each row: tokens in the cache, and new tokens."""
WITHOUT_CACHE = "compile with cache=False; target='eager' generates with the model's own cache"
"""Next step for a model that a cache cannot serve."""

_PAST_PREFIX, PRESENT_PREFIX, _ENCODER_PREFIX = "past_key_values.", "present.", "memory."
"""Name prefixes: of cache inputs, of cache outputs, and of encoder outputs that a decoder reads."""
_STATE_SUFFIX = ".state"


def find_token_input(names: Container[str]) -> str:
    """Return the name of the input that takes the token ids of the sequence that grows."""
    return DECODER_IDS if DECODER_IDS in names else IDS


def past_names(layer: int) -> tuple[str, str]:
    """Return the names of the inputs for a layer's keys and values."""
    return f"{_PAST_PREFIX}{layer}.key", f"{_PAST_PREFIX}{layer}.value"


def state_name(number: int) -> str:
    """Return the name of the input for the state of a convolution or a recurrence."""
    return f"{_PAST_PREFIX}{number}{_STATE_SUFFIX}"


def is_past_input(name: str) -> bool:
    """Whether an input is a cache: a layer's keys or values, or a state."""
    return name.startswith(_PAST_PREFIX)


def is_key_or_value(name: str) -> bool:
    """Whether an input or an output is a layer's keys or values."""
    return name.startswith((_PAST_PREFIX, PRESENT_PREFIX)) and not name.endswith(_STATE_SUFFIX)


def encoder_output_name(value: str) -> str:
    """Return the name of an encoder's output that its decoder reads as an input."""
    return f"{_ENCODER_PREFIX}{value}"


def is_encoder_output(name: str) -> bool:
    """Whether an input is an encoder's output."""
    return name.startswith(_ENCODER_PREFIX)


def present_name(past: str) -> str:
    """Return the name of the output for an input that takes keys, values or a state."""
    return f"{PRESENT_PREFIX}{past.removeprefix(_PAST_PREFIX)}"


@torch.library.custom_op("lorac::attention", mutates_args=())
def attention(  # noqa: PLR0913, PLR0917  (an op's operands)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    sinks: Tensor | None,
    blocks: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    module: str,
) -> Tensor:
    """Compute attention over a whole sequence.

    Args:
        q: queries (batch, heads, length, size).
        k, v: keys and values (batch, heads of keys, other length, size); several heads of q may share a head of keys.
        bias: added to the scores; broadcast to (batch, heads, length, other length).
        seen: booleans, true where a score counts; broadcast as ``bias``.
        sinks: (heads,): a further score of each head, whose share of the softmax has no value.
        blocks: (batch, length, 2) or (batch, length, 1): positions of the first and the last token that a token sees
            even where ``causal`` and ``window`` hide them, such as those of its image; of the last alone, the first is
            the token itself.
        scale: factor of the scores.
        causal: whether a token sees no later tokens.
        window: the most tokens that a token sees, itself included; 0 for all; -n for the tokens of its chunk of n
            tokens.
        softcap: soft bound of the scores; 0 for none.
        module: path of the module that attends.

    Returns:
        (batch, length, heads, size)
    """
    queries, keys = torch.arange(q.shape[2], device=q.device), torch.arange(k.shape[2], device=q.device)
    masks = [seen, visible_keys(queries[None], keys, window, blocks) if causal else None]
    return attend_with_masks(q, k, v, masks, bias, sinks, scale, softcap)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


@torch.library.custom_op("lorac::cached_attention", mutates_args=())
def cached_attention(  # noqa: PLR0913, PLR0917  (an op's operands)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    past: Tensor,
    new: Tensor,
    places: Tensor,
    sinks: Tensor | None,
    distances: Tensor | None,
    blocks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    module: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute causal attention from new tokens to the new tokens and to the tokens in a cache.

    Args:
        q, k, v: of the new tokens, as in ``attention``; padded on the right to one length.
        past_k, past_v: the cache (batch, heads of keys, capacity, size), each row filled from its beginning.
        past: (batch,): number of tokens of each row in the cache.
        new: (batch,): number of new tokens. ``past + new`` is at most the capacity.
        places: (batch, length): the positions of the new tokens, from ``past`` on.
        distances: (heads, capacity): bias of a score, by the number of tokens between key and query.
        sinks, blocks, scale, window, softcap, module: as in ``attention``.

    Returns:
        (batch, length, heads, size), with arbitrary values at padding; and the cache with the new tokens in it.
    """
    held_k, held_v = past_k.clone(), past_v.clone()
    for row, (begin, count) in enumerate(zip(past.tolist(), new.tolist(), strict=True)):
        held_k[row, :, begin : begin + count] = k[row, :, :count]
        held_v[row, :, begin : begin + count] = v[row, :, :count]
    keys = torch.arange(past_k.shape[2], device=q.device)
    bias = None
    if distances is not None:  # padding may be farther from a key than the cache is long
        apart = (places[:, :, None] - keys).clamp(min=0, max=distances.shape[1] - 1)
        bias = distances[:, apart].transpose(0, 1)
    seen = visible_keys(places, keys, window, blocks)
    return attend_with_masks(q, held_k, held_v, [seen], bias, sinks, scale, softcap), held_k, held_v


@cached_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))
    return out, torch.empty_like(past_k), torch.empty_like(past_v)


@torch.library.custom_op("lorac::positions", mutates_args=())
def positions(ids: Tensor) -> Tensor:
    """Return positions 0, 1, ... of ids (batch, length): (batch, length)."""
    return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape).clone()


@positions.register_fake
def _(ids: Tensor) -> Tensor:
    return ids.new_empty(ids.shape, dtype=torch.int64)


@torch.library.custom_op("lorac::mask", mutates_args=())
def mask(like: Tensor, sizes: Sequence[int], window: int) -> Tensor:
    """Return a causal mask (batch, 1, length, other length) to add to scores; a pass replaces it by ``attention``."""
    batch, queries, keys = sizes
    seen = visible_keys(torch.arange(queries, device=like.device)[None], torch.arange(keys, device=like.device), window)
    return like.new_zeros((batch, 1, queries, keys)).masked_fill(~seen, torch.finfo(like.dtype).min)


@mask.register_fake
def _(like: Tensor, sizes: Sequence[int], window: int) -> Tensor:
    return like.new_empty((sizes[0], 1, *sizes[1:]))


@torch.library.custom_op("lorac::rows", mutates_args=())
def rows(x: Tensor, places: Tensor) -> Tensor:
    """Gather from x (batch, length, features) the tokens at positions ``places`` (batch, k): (batch, k, features)."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], places]


@rows.register_fake
def _(x: Tensor, places: Tensor) -> Tensor:
    return x.new_empty((*places.shape, x.shape[2]))


ATTENTION, CACHED_ATTENTION = attention._opoverload, cached_attention._opoverload
POSITIONS, MASK, ROWS = positions._opoverload, mask._opoverload, rows._opoverload
BIAS_OPERAND, BLOCKS_OPERAND, SCALE_OPERAND, CAUSAL_OPERAND = 3, 6, 7, 8
"""Indices of operands of an attention op: the bias, the blocks, the scale, and ``causal``."""

_BRANCH_SEPARATOR = ":"
"""Separator, in the operand ``module`` of a branch's attention, between the site's path and the attention's number."""


def is_branch_attention(module: str) -> bool:
    """Whether an attention belongs to a branch, by its operand ``module``."""
    return _BRANCH_SEPARATOR in module


@final
class IncrementalAttention(BranchAttention):
    """Attention of branches in a program with a cache: the op, which gets a cache as the model's attention does."""

    def positions(self, x: Tensor) -> Tensor:
        """Return positions 0, 1, ..., which the pass ``cache`` replaces."""
        found: Tensor = torch.ops.lorac.positions(x[..., 0])
        return found

    def attend(
        self, place: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attend with the op; programs with a cache have no padding mask."""
        require_causal(place, causal)
        assert _BRANCH_SEPARATOR in place
        y: Tensor = torch.ops.lorac.attention(q, k, v, None, None, None, None, scale, causal, 0, 0.0, place)
        return y


def visible_keys(queries: Tensor, keys: Tensor, window: int, blocks: Tensor | None = None) -> Tensor:
    """Return a mask, true where a query (batch or 1, length) sees a key (length,): (batch or 1, 1, queries, keys).

    Args:
        queries, keys: positions.
        window, blocks: as ``attention`` takes them.
    """
    ahead = keys[None, None, :] - queries[:, :, None]
    seen = ahead <= 0
    if window > 0:
        seen &= ahead > -window
    elif window:
        seen &= keys[None, None, :] >= (queries - queries % -window)[:, :, None]
    if blocks is not None:
        first = queries[..., None] if blocks.shape[-1] == 1 else blocks[..., :1]
        seen = seen | ((keys >= first) & (keys <= blocks[..., -1:]))
    return seen[:, None]


def attend_with_masks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Sequence[Tensor | None],
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Compute ``attention`` with several masks; a score counts where every mask is true."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = q @ k.transpose(2, 3) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    for seen in masks:
        if seen is not None:
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if sinks is not None:
        extra = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        scores = torch.cat([scores, extra], dim=-1)
    shares = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    return (shares[..., : k.shape[2]] @ v).transpose(1, 2).contiguous()
