"""Virtual tokens for a model that runs itself: its forward gets them before the tokens of a sequence's first call.

Later calls of the sequence, recognised by a cache of transformers, get a mask and positions that count these tokens.
"""

import contextlib
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lorac.errors import Unavailable
from lorac.ir.slots.prefix import IDS, MASK, Prefix, wrong_heads


@contextlib.contextmanager
def stand_before(module: nn.Module, prefix: Prefix | None) -> Iterator[None]:
    """Prepend virtual tokens to the sequences of each call of a model, in this thread and within the block.

    Raises:
        Unavailable: within the block, the model has no cache of keys and values, which a prefix needs.
        AdapterError: the model's layers or heads differ from the prefix's.
    """
    if prefix is None:
        yield
        return
    thread, widths = threading.get_ident(), list[int]()
    signature = inspect.signature(module.forward)
    cache_name = next((name for name in ("cache", "past_key_values") if name in signature.parameters), "")

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if threading.get_ident() != thread:
            return None
        given: dict[str, Any] = dict(signature.bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        cache = given.get(cache_name)
        begins = cache is None or not cache.get_seq_length()
        if begins and not prefix.attends:
            extended = prefix.extend(given)
            widths.append(given[IDS].shape[1])
            return (), extended
        widths.append(0)
        mask = given.get(MASK)
        if mask is not None:
            given[MASK] = torch.cat([mask.new_ones(len(mask), prefix.length), mask], 1)
        given |= prefix.shift_positions(given)
        if begins:
            if not cache_name or getattr(getattr(module, "config", None), "is_encoder_decoder", True):
                raise Unavailable(
                    f"{type(module).__name__} keeps no keys and values, so an adapter cannot put its own before them",
                    next_step="use prompt tuning, whose virtual tokens are embeddings",
                )
            rows = next(len(value) for value in (given.get(IDS), given.get("inputs_embeds")) if value is not None)
            given[cache_name] = _fill(module, prefix, cache, rows)
        return (), given

    def after(_: nn.Module, *rest: Any) -> object:
        if threading.get_ident() != thread or not (width := widths.pop()):
            return None
        return prefix.trim(rest[-1], width)

    with contextlib.ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
        stack.callback(module.register_forward_hook(after).remove)
        yield


def _fill(module: Any, prefix: Prefix, cache: Any, rows: int) -> object:
    """Return a cache of the model's type, whose rows begin with a prefix's keys and values."""
    from transformers import DynamicCache

    text = module.config.get_text_config()
    layers, heads, _, size = prefix.rows.shape
    own_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    own_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if (layers // 2, heads, size) != (text.num_hidden_layers, own_heads, own_size):
        raise wrong_heads(prefix.rows, text.num_hidden_layers, own_heads, own_size)
    cache = DynamicCache(config=module.config) if cache is None else cache
    given = prefix.rows.to(module.dtype).to(module.device)[:, None].expand(-1, rows, -1, -1, -1)
    for layer in range(layers // 2):
        cache.update(given[2 * layer], given[2 * layer + 1], layer)
    return cache
