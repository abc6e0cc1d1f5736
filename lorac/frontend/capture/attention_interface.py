"""Capture for a cache: each attention of a transformers model becomes one op.

A transformers model calls its attention and its mask functions through two interfaces. During a trace, both are
lorac's: a mask becomes a token tensor for "causal", "causal within a window" or "causal within a chunk", and attention
becomes the op of ``lorac.ir.graph.attention_ops``. An encoder's masks stay tensors.

The program takes the length of each row instead of padding. So the trace computes two arguments of forward: the mask is
all ones, and positions are an op of the ids. The positions whose logits are wanted are an input.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lorac.errors import CaptureError, Unavailable
from lorac.frontend.capture.decoder_families import (
    call_torch_attention,
    counts_by_padding,
    find_sequence,
    iter_token_selectors,
)
from lorac.frontend.host import Host
from lorac.frontend.inputs.dynamic_shapes import make_dynamic_shapes
from lorac.frontend.layer_classes import Forward
from lorac.ir.calls.call import Inputs
from lorac.ir.calls.modalities import PLACED, find_blocks
from lorac.ir.graph import attention_ops
from lorac.ir.graph.attention_ops import IDS, LOGITS_TO_KEEP, WITHOUT_CACHE
from lorac.ir.graph.nodes import find_module_path, find_source_line
from lorac.ir.graph.ops import RECURRENCE

_INTERFACE = "lorac"
"""The name under which lorac's functions are registered in transformers."""
_ENCODER_MASK = "attention_mask"
_FROM_FIRST, _FROM_ITSELF = slice(0, 2), slice(1, 2)
"""Columns of a token's block that are used: first and last, or only last."""


def make_decoder_inputs(host: Host, given: Inputs) -> dict[str, Tensor]:
    """Return the inputs of a capture with a cache.

    Args:
        host: the model.
        given: example inputs by name.

    Raises:
        Unavailable: the model is not a causal language model of transformers, or takes more than token ids.
    """
    model, names = host.model, host.parameters
    sequence = find_sequence(names)
    if not host.generates or sequence.ids not in names:
        raise _unavailable(model, "is not a language model of transformers")
    if sequence.positions in names and counts_by_padding(model):
        why = "keeps no cache: its forward numbers tokens from the id of padding on, and transformers' generate from 0"
        raise _unavailable(model, why)
    if sequence.ids not in given:
        raise _unavailable(model, f"needs the example input '{sequence.ids}'")
    computed = {sequence.ids, LOGITS_TO_KEEP, sequence.mask, sequence.positions}
    others = {name: value for name, value in given.items() if name not in computed}
    if not others.keys() <= PLACED and sequence.ids == IDS:
        raise Unavailable(
            f"{type(model).__name__} is given '{min(others)}', but a cache holds token ids only",
            next_step="use target='eager', or example_inputs= without that input for a cache of text",
        )
    ids = given[sequence.ids]
    if ids.shape[1] < 2:
        raise _unavailable(model, "needs an example of two tokens or more")
    most = min((selector.index_topk for selector in iter_token_selectors(model)), default=ids.shape[1])
    if ids.shape[1] > most:
        raise Unavailable(
            f"{type(model).__name__} attends to only {most} (index_topk) of the example's {ids.shape[1]} tokens, and "
            "with a cache it has to attend to all",
            next_step=f"give example_inputs= of at most {most} tokens; target='eager' runs longer sequences",
        )
    if IDS in others and _ENCODER_MASK in names:
        others.setdefault(_ENCODER_MASK, torch.ones_like(others[IDS]))
    # Positions that every sequence has, even a sequence of one token.
    wanted = {LOGITS_TO_KEEP: torch.tensor([-1, 0, -1], device=ids.device)} if LOGITS_TO_KEEP in names else {}
    return {**others, sequence.ids: ids, **wanted}


def make_decoder_shapes(host: Host, inputs: Mapping[str, Tensor]) -> dict[str, object]:
    """Return the dynamic shapes of ``make_decoder_inputs``."""
    sizes: dict[str, Any] = {LOGITS_TO_KEEP: {0: Dim("kept")}}
    shapes: dict[str, Any] = make_dynamic_shapes(host, {n: value for n, value in inputs.items() if n not in sizes})
    sizes |= {name: {**shapes[name], 1: Dim(f"{name}_count")} for name in PLACED & shapes.keys()}
    return shapes | {name: sizes[name] for name in inputs if name in sizes}


def derive_decoder_arguments(forward: Forward) -> Forward:
    """Wrap a forward so that it takes ``make_decoder_inputs`` and computes the mask and the positions from the ids."""
    signature = inspect.signature(forward)
    sequence = find_sequence(signature.parameters)

    @functools.wraps(forward)
    def call(**given: Any) -> Any:
        ids = given[sequence.ids]
        derived = {sequence.mask: torch.ones_like(ids), sequence.positions: torch.ops.lorac.positions(ids)}
        return forward(**given, **{name: value for name, value in derived.items() if name in signature.parameters})

    derived = {sequence.mask, sequence.positions}
    remaining = [parameter for name, parameter in signature.parameters.items() if name not in derived]
    call.__signature__ = signature.replace(parameters=remaining)  # type: ignore[attr-defined]  # functions take attributes
    return call


@dataclass
class AttentionInterface:
    """lorac's functions for transformers' attention and mask interfaces, during one trace.

    Attributes:
        paths: id of a module -> its path.
        windows: id of a mask's token tensor -> the tensor, and its window and blocks as ``attention_ops.attention``
            takes them.
        masks: id of an encoder's additive mask -> this mask, and the boolean mask.
        problems: reasons why an attention cannot use a cache.
        used: whether a module attended through the interface.
    """

    paths: Mapping[int, str]
    windows: dict[int, tuple[Tensor, int, Tensor | None]] = field(default_factory=dict)
    masks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    used: bool = False

    def mask(self, **request: Any) -> Tensor | None:
        """Make a mask, as transformers' mask functions do."""
        from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

        rows, *lengths = [request[size] for size in ("batch_size", "q_length", "kv_length")]
        like = torch.zeros((), dtype=request["dtype"], device=request["device"])
        if causal_mask_function.__code__ in {code for code, _ in _list_closures(request["mask_function"])}:
            found = _read_mask(request["mask_function"])
            if found is None:
                self.problems.append("its attention hides more than later tokens and tokens outside a window")
            window, blocks = found or (0, None)
            token: Tensor = torch.ops.lorac.mask(like, [rows, *lengths], window)
            self.windows[id(token)] = token, window, blocks
            return token
        padding, bidirectional = request["attention_mask"], request["mask_function"] is bidirectional_mask_function
        if bidirectional and padding is None:
            return None
        full = {**request, "allow_is_bidirectional_skip": False, "use_vmap": False}  # a trace of vmap cannot run
        seen: Any = padding[:, None, None, :].to(torch.bool) if bidirectional else sdpa_mask(**full)
        added = torch.where(seen, like, torch.finfo(like.dtype).min).expand(rows, 1, *lengths)
        self.masks[id(added)] = added, seen
        return added

    def attend(  # noqa: PLR0913, PLR0917  (as transformers calls it)
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        is_causal: bool | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Attend, as transformers' attention functions do."""
        self.used = True
        path = self.paths.get(id(module), type(module).__name__)
        _, window, blocks = self.windows.get(id(attention_mask), (None, None, None))
        causal = attention_mask is None and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        _, mask = self.masks.get(id(attention_mask), (None, attention_mask))
        seen = None if window is not None else mask
        if seen is not None and seen.dtype != torch.bool:
            position_bias, seen = seen if position_bias is None else position_bias + seen, None
        scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
        causal |= window is not None
        if blocks is not None and ((window or 0) < 0 or s_aux is not None or position_bias is not None):
            self.problems.append(f"'{path}' adds to the scores of tokens that see later ones")
        operands = query, key, value, position_bias, seen, s_aux, blocks, scale, causal, window or 0
        return torch.ops.lorac.attention(*operands, float(softcap or 0), path), None

    def find_mask_reader(self, host: nn.Module, inputs: Inputs) -> str:
        """Return the path of the first module that gets a mask and passes it to no inner module; "" without one."""
        readers: list[str] = []

        def record(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            if any(id(value) in self.windows or id(value) in self.masks for value in (*args, *kwargs.values())):
                readers.append(self.paths.get(id(module), ""))

        # The call may fail as the trace did; it records readers until then.
        with contextlib.ExitStack() as hooks, torch.no_grad(), contextlib.suppress(Exception):
            for module in host.modules():
                hooks.enter_context(module.register_forward_pre_hook(record, with_kwargs=True))
            host(**inputs)
        followed = zip(readers, [*readers[1:], ""], strict=True)
        return next((reader for reader, inner in followed if not inner.startswith(f"{reader}.")), "")


@contextlib.contextmanager
def capture_attention(host: Host, inputs: Inputs) -> Iterator[AttentionInterface]:
    """Trace a copy inside the block with each attention as one op.

    Args:
        host: the copy.
        inputs: inputs of the trace by name.

    Yields:
        The functions for transformers' interfaces, with the requests of the trace so far.

    Raises:
        Unavailable: an attention cannot use a cache.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    interface = AttentionInterface({id(module): path for path, module in host.model.named_modules()})
    host.configure({"_attn_implementation_internal": _INTERFACE})
    call_torch_attention(host.model)
    registries: list[tuple[dict[str, Any], Forward]] = [
        (ALL_ATTENTION_FUNCTIONS._global_mapping, interface.attend),
        (ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, interface.mask),
    ]
    for registry, function in registries:
        registry[_INTERFACE] = function
    try:
        yield interface
    except CaptureError as error:
        if interface.problems:
            raise _unavailable(host.model, f"keeps no cache: {interface.problems[0]}") from error
        if not interface.used and (interface.windows or interface.masks):
            reader = interface.find_mask_reader(host.model, inputs)
            raise _attends_by_itself(type(host.model).__name__, reader) from error
        if error.__cause__ is None:
            raise
        raise CaptureError(error.what, next_step=WITHOUT_CACHE) from error.__cause__  # the error of the trace
    finally:
        for registry, _ in registries:
            registry.pop(_INTERFACE, None)
    if interface.problems:
        raise _unavailable(host.model, f"keeps no cache: {interface.problems[0]}")


def check_attention_captured(program: ExportedProgram, model: str) -> None:
    """Refuse a model that computes attention outside transformers' interface, so that a node still reads a mask.

    Args:
        program: as traced, without dead nodes.
        model: class name of the model.

    Raises:
        Unavailable: the model does; the error names the module.
    """
    readers = [user for node in program.graph.nodes if node.target is attention_ops.MASK for user in node.users]
    captured = any(node.target in {attention_ops.ATTENTION, RECURRENCE} for node in program.graph.nodes)
    if readers or not captured:
        softmaxes = (node for node in program.graph.nodes if "softmax" in str(node.target))
        attending = next(iter([*readers, *softmaxes]), None)
        found = ("", None) if attending is None else (find_module_path(attending), find_source_line(attending))
        raise _attends_by_itself(model, *found)


def _read_mask(mask: Forward) -> tuple[int, Tensor | None] | None:
    """Return window and blocks of transformers' causal mask as ``attention_ops.attention`` takes them, or None."""
    from transformers import masking_utils as masking

    causal, sliding = masking.causal_mask_function, masking.sliding_window_overlay(1)
    windowed, blockwise = masking.sliding_window_causal_mask_function(1), masking.blockwise_overlay(torch.zeros(1))
    known = [  # sign of the window, the columns of the blocks that are seen despite the mask, the mask
        (0, None, causal),
        (1, None, windowed),
        (-1, None, masking.chunked_causal_mask_function(1, torch.zeros(1))),  # chunks of all rows begin at 0
        (0, _FROM_FIRST, masking.or_masks(causal, blockwise)),
        (1, _FROM_FIRST, masking.or_masks(windowed, blockwise)),
        (1, _FROM_ITSELF, masking.and_masks(masking.or_masks(causal, blockwise), sliding)),
    ]
    found = _list_closures(mask)
    codes = [code for code, _ in found if inspect.iscode(code)]
    for sign, parts, function in known:
        if codes == [code for code, _ in _list_closures(function) if inspect.iscode(code)]:
            window = sign * sum(value for _, value in found if isinstance(value, int))
            groups = next((value for _, value in found if parts is not None and isinstance(value, Tensor)), None)
            blocks = None if groups is None else find_blocks(groups, torch.ops.lorac.positions(groups))[..., parts]
            return window, blocks
    return None


def _list_closures(function: object) -> list[tuple[object, object]]:
    """Return the code of a function and of functions in its closure, and the values in the closures."""
    if isinstance(function, tuple | list):
        return [found for inner in function for found in _list_closures(inner)]
    if not hasattr(function, "__code__"):
        return [(type(function), function)]
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return [(function.__code__, None), *(found for value in cells for found in _list_closures(value))]


def _attends_by_itself(model: str, path: str, line: str | None = None) -> Unavailable:
    who, where = f"'{path}'" if path else "it", f", at {line}" if line else ""
    return Unavailable(
        f"{model} keeps no cache: {who} attends by itself, not through transformers' attention interface{where}",
        next_step=WITHOUT_CACHE,
    )


def _unavailable(model: nn.Module, why: str) -> Unavailable:
    return Unavailable(f"{type(model).__name__} {why}", next_step=WITHOUT_CACHE)
