"""Differences between families of decoders, as tables for captures with a cache and for the passes after capture.

A model can decode with a cache if it calls the attention interface of transformers, or if its own attention adds the
mask that transformers makes (``lorac.frontend.capture.written_attention``). Families differ in the names of their
arguments (``SEQUENCES``), in the way they number tokens if the caller gives no positions (``NUMBERINGS``), and in
rotary angles that change with the length of a sequence (``CHANGING_ROTARY_KINDS``). To add a family, add a row.
Modules that choose the tokens that are attended to (DeepSeek Sparse Attention) choose all of a sequence up to a length,
so programs attend densely up to it.
"""

import copy
import inspect
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from lorac.argument_types import Operands
from lorac.ir.graph.attention_ops import DECODER_IDS, IDS
from lorac.ir.graph.nodes import find_stored_tensors

aten = torch.ops.aten


@dataclass(frozen=True)
class SequenceArguments:
    """Names of the arguments of forward for the sequence that grows during decoding.

    Attributes:
        ids: name of the argument with the token ids.
        mask: name of the mask's argument, which a capture computes from the ids.
        positions: name of the positions' argument, which a capture computes from the ids.
    """

    ids: str
    mask: str
    positions: str


SEQUENCES = (
    SequenceArguments(DECODER_IDS, "decoder_attention_mask", "decoder_position_ids"),  # encoder-decoders: T5, BART
    SequenceArguments(IDS, "attention_mask", "position_ids"),  # decoders: Llama, GPT-2
)
"""The row of a model is the first whose ``ids`` is one of the model's arguments."""


def find_sequence(names: Container[str]) -> SequenceArguments:
    """Return the row of ``SEQUENCES`` for a model or graph with these argument names; by default the last row."""
    return next((sequence for sequence in SEQUENCES if sequence.ids in names), SEQUENCES[-1])


def is_token_numbering(node: fx.Node, length: str) -> bool:
    """Return whether a node is an integer ``arange(length)``; ``length`` is the text of its size in the trace."""
    ranges = {aten.arange.default, aten.arange.start, aten.arange.start_step}
    if node.target not in ranges or str(node.meta["val"].shape[0]) != length:
        return False
    # The arguments are (end), (start, end) or (start, end, step).
    start = node.args[0] if len(node.args) > 1 else 0
    step = node.args[2] if len(node.args) > 2 else 1
    return (start, step) == (0, 1) and not node.meta["val"].is_floating_point()


def _is_stored_range(program: ExportedProgram, node: fx.Node, ids: fx.Node) -> bool:
    """Return whether a node is a slice, from index 0, of a stored ``arange``, which may have leading axes of size 1."""
    if node.target is not aten.slice.Tensor or str(node.meta["val"].shape[-1]) != str(ids.meta["val"].shape[1]):
        return False
    operands: Operands = node.args
    source = operands[0]  # of slice(source, axis=0, start=0, ...)
    axis = operands[1] if len(operands) > 1 else 0
    start = operands[2] if len(operands) > 2 else 0
    stored = find_stored_tensors(program).get(source)
    if stored is None or stored.is_floating_point() or stored.numel() != stored.shape[-1] or start != 0:
        return False
    is_last = axis % stored.dim() == stored.dim() - 1
    return is_last and bool((stored.flatten() == torch.arange(stored.numel())).all())


def _is_token_count(program: ExportedProgram, node: fx.Node, ids: fx.Node) -> bool:
    """Return whether a node counts, at each token, the tokens up to it that are not padding."""
    if node.target is not aten.cumsum.default or node.args[1] not in {1, -1}:
        return False
    summand: Any = node.args[0]
    while summand.target in {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default}:
        summand = summand.args[0]
    return summand.target is aten.ne.Scalar and summand.args[0] is ids


NUMBERINGS: tuple[tuple[int, Callable[[ExportedProgram, fx.Node, fx.Node], bool]], ...] = (
    (0, lambda _, node, ids: is_token_numbering(node, str(ids.meta["val"].shape[1]))),  # BART, Marian, Whisper
    (0, _is_stored_range),  # BERT as a decoder
    (1, _is_token_count),  # M2M100, NLLB
)
"""Ways to number the tokens of a sequence, equal in all rows of a batch or dependent on each row's padding: the number
of the first token, and the function (program, node, node of the ids) -> whether the node is such numbers."""


_COUNTING_METHOD = "create_position_ids_from_input_ids"


def counts_by_padding(host: nn.Module) -> bool:
    """Return whether a model numbers only tokens that are not padding, from the padding id + 1 on (RoBERTa)."""
    return any(hasattr(module, _COUNTING_METHOD) for module in host.modules())


_DYNAMIC = "dynamic"
CHANGING_ROTARY_KINDS = (_DYNAMIC, "longrope")
"""Values of ``rope_type`` whose angles change when a sequence exceeds the original limit."""
DEFAULT_POSITIONS = 4096
"""Positions of a table for a model that states no longest sequence."""
_SLOPES = "alibi"
"""Argument of the forward of a module that gets slopes, and the field of its configuration that says so."""
_ORIGINAL_LIMIT = "original_max_position_embeddings"
_SELECTION_ARGUMENTS = frozenset({"hidden_states", "position_embeddings", "attention_mask"})
"""Those of the forward of a module that chooses tokens; others (GLM-5.5, DeepSeek-V4) choose pools of tokens."""


def get_longest_sequence(model: nn.Module) -> int | None:
    """Return the length up to which a model attends to the whole sequence, by its original angles; None for any."""
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]  # of transformers
    parameters = getattr(config, "rope_parameters", None) or {}
    # The parameters apply to all layers, or are a dict by type of layer.
    rotaries = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    originals = [rotary.get(_ORIGINAL_LIMIT) for rotary in rotaries if rotary.get("rope_type") in CHANGING_ROTARY_KINDS]
    limits = [*originals, getattr(config, "max_position_embeddings", None)]
    limits += [selector.index_topk for selector in iter_token_selectors(model)]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def iter_token_selectors(model: nn.Module) -> Iterator[Any]:
    """Yield the modules that choose, by keys of their own, the ``index_topk`` tokens that each token attends to."""
    found: Iterator[Any] = (m for m in model.modules() if isinstance(getattr(m, "index_topk", None), int))
    return (m for m in found if inspect.signature(m.forward).parameters.keys() >= _SELECTION_ARGUMENTS)


def attend_densely(host: nn.Module) -> None:
    """Leave out the choice of tokens to attend to in a copied model: it is all of a sequence that a program takes."""
    for selector in iter_token_selectors(host):
        selector.forward = lambda hidden_states, *_, **__: hidden_states


def call_torch_attention(host: nn.Module) -> None:
    """Let modules of a copy that add slopes call torch's attention, as by default: else Falcon adds them twice."""
    for module in host.modules():
        forward: Any = inspect.unwrap(type(module).forward)
        code = forward.__code__
        if _SLOPES in code.co_varnames and "scaled_dot_product_attention" in code.co_names:
            config: Any = copy.copy(module.config)
            if getattr(config, _SLOPES) and not config.multi_query:  # a bias of each head needs keys of each
                config._attn_implementation_internal = "sdpa"
                module.config = config


def freeze_dynamic_rotary(host: nn.Module) -> None:
    """Restore the original angles of dynamic rotary modules in a copied model, and disable their updates.

    At each call, these modules compare the largest position with the original limit. A trace cannot follow the
    comparison, and need not: no program accepts a sequence above ``get_longest_sequence``. The angles must be restored
    because a model that has processed a longer sequence has the angles for that sequence.
    """
    for module in host.modules():
        kinds: Any = getattr(module, "rope_type", None)
        by_layer_type = kinds if isinstance(kinds, dict) else {"": kinds}
        for layer_type in [layer_type for layer_type, kind in by_layer_type.items() if kind == _DYNAMIC]:
            rotary: Any = module
            prefix = f"{layer_type}_" if layer_type else ""
            original = getattr(rotary, f"{prefix}original_inv_freq")
            setattr(rotary, f"{prefix}inv_freq", original.to(getattr(rotary, f"{prefix}inv_freq").device))
            rotary.rope_type = {**rotary.rope_type, layer_type: "default"} if layer_type else "default"
