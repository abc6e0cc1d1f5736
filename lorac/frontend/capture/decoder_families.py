"""How families of models decode: the table that captures with a cache, and the passes behind them, read.

A model decodes over a cache if it attends through transformers' attention interface, or adds the mask from there to
scores of its own (``lorac.frontend.capture.written_attention``). Families differ in the names of
their arguments (``SEQUENCES``), in how they number tokens where they are given no positions (``NUMBERINGS``), and in
rotary angles that change with the length of a sequence (``CHANGING_ROTARY_KINDS``). A further family is a row.
"""

from collections.abc import Callable, Container
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
    """The arguments of forward that describe the sequence that grows.

    Attributes:
        ids: its token ids.
        mask, positions: arguments that a capture computes from the ids.
    """

    ids: str
    mask: str
    positions: str


SEQUENCES = (
    SequenceArguments(DECODER_IDS, "decoder_attention_mask", "decoder_position_ids"),  # encoder-decoders: T5, BART
    SequenceArguments(IDS, "attention_mask", "position_ids"),  # decoders: Llama, GPT-2
)
"""The first whose ids are among a model's arguments is the model's."""


def find_sequence(names: Container[str]) -> SequenceArguments:
    """Return the arguments of the sequence that grows, for a model or a graph with these arguments."""
    return next((sequence for sequence in SEQUENCES if sequence.ids in names), SEQUENCES[-1])


@dataclass(frozen=True)
class Numbering:
    """A way in which decoders number the tokens of a sequence, for all rows alike or by their padding.

    Attributes:
        name: its computation in the model.
        models: examples.
        first: the number of the first token.
        matches: (program, node, ids) -> whether a node has these numbers.
    """

    name: str
    models: str
    first: int
    matches: Callable[[ExportedProgram, fx.Node, fx.Node], bool]


def is_token_numbering(node: fx.Node, length: str) -> bool:
    """Return whether a node is ``arange(length)``, where torch writes the sequence's length as ``length``."""
    ranges = {aten.arange.default, aten.arange.start, aten.arange.start_step}
    if node.target not in ranges or str(node.meta["val"].shape[0]) != length:
        return False
    start, step = (node.args[0], (*node.args, 1)[2]) if len(node.args) > 1 else (0, 1)
    return (start, step) == (0, 1) and not node.meta["val"].is_floating_point()


def _is_stored_range(program: ExportedProgram, node: fx.Node, ids: fx.Node) -> bool:
    """Return whether a node is a slice of a stored ``arange``, with or without an axis for rows."""
    if node.target is not aten.slice.Tensor or str(node.meta["val"].shape[-1]) != str(ids.meta["val"].shape[1]):
        return False
    operands: Operands = node.args
    source, axis, start = (*operands, 0, 0)[:3]
    stored = find_stored_tensors(program).get(source)
    if stored is None or stored.is_floating_point() or stored.numel() != stored.shape[-1] or start != 0:
        return False
    is_last = axis % stored.dim() == stored.dim() - 1
    return is_last and bool((stored.flatten() == torch.arange(stored.numel())).all())


def _is_token_count(program: ExportedProgram, node: fx.Node, ids: fx.Node) -> bool:
    """Return whether a node counts the tokens up to each that are not padding."""
    if node.target is not aten.cumsum.default or node.args[1] not in {1, -1}:
        return False
    counted: Any = node.args[0]
    while counted.target in {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default}:
        counted = counted.args[0]
    return counted.target is aten.ne.Scalar and counted.args[0] is ids


NUMBERINGS = (
    Numbering(
        "arange",
        "BART, Marian, Whisper",
        0,
        lambda _, node, ids: is_token_numbering(node, str(ids.meta["val"].shape[1])),
    ),
    Numbering("a slice of a stored range", "BERT as a decoder", 0, _is_stored_range),
    Numbering("a count of tokens that are not padding", "M2M100, NLLB", 1, _is_token_count),
)


_COUNTING_METHOD = "create_position_ids_from_input_ids"


def counts_by_padding(host: nn.Module) -> bool:
    """Return whether a model numbers tokens from the id of padding on, as RoBERTa and CamemBERT do."""
    return any(hasattr(module, _COUNTING_METHOD) for module in host.modules())


_DYNAMIC = "dynamic"
CHANGING_ROTARY_KINDS = (_DYNAMIC, "longrope")
"""Values of ``rope_type`` whose angles change once a sequence is longer than the original limit."""
_ORIGINAL_LIMIT = "original_max_position_embeddings"


def get_longest_sequence(model: nn.Module) -> int | None:
    """Return the longest sequence that a model's configuration admits with its first angles; None: no limit."""
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]  # of transformers
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(inner for inner in parameters.values() if isinstance(inner, dict))]
    changing = [kind.get(_ORIGINAL_LIMIT) for kind in kinds if kind.get("rope_type") in CHANGING_ROTARY_KINDS]
    limits = [*changing, getattr(config, "max_position_embeddings", None)]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def freeze_dynamic_rotary(host: nn.Module) -> None:
    """Give the dynamic rotary modules of a copy the angles that they begin with, and switch their updates off.

    The modules compare the largest position with ``get_longest_sequence``, which a trace cannot do and no program
    exceeds. A model that has processed a longer sequence holds the angles of that one.
    """
    for module in host.modules():
        kinds: Any = getattr(module, "rope_type", None)
        by_layer_type = kinds if isinstance(kinds, dict) else {"": kinds}
        for layer_type in [layer_type for layer_type, kind in by_layer_type.items() if kind == _DYNAMIC]:
            rotary: Any = module
            prefix = f"{layer_type}_" if layer_type else ""
            first = getattr(rotary, f"{prefix}original_inv_freq")
            setattr(rotary, f"{prefix}inv_freq", first.to(getattr(rotary, f"{prefix}inv_freq").device))
            rotary.rope_type = {**rotary.rope_type, layer_type: "default"} if layer_type else "default"
