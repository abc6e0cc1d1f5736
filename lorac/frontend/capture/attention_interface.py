"""Text that is to grow: a capture in which each attention of a transformers model is one op.

A transformers model calls its attention through an interface, and asks another for its masks. While such a model is
traced both are lorac's: a mask is a token that stands for "causal" or "causal within a window", and attention is the
op of ``lorac.ir.graph.attention_ops``. An encoder's masks stay what they are.
Padding of the text is none of the program's: it is given each row's length. So the trace has three arguments less than
forward: the mask is all ones, positions are an op of the ids, and what logits are wanted for is an input.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lorac.errors import CaptureError, Unavailable
from lorac.frontend.dynamic_shapes import make_dynamic_shapes
from lorac.frontend.hugging_face import is_hugging_face, set_config_fields
from lorac.frontend.layer_classes import Forward
from lorac.ir.graph import attention_ops as attending
from lorac.ir.graph.attention_ops import DECODER_IDS, IDS, LOGITS_TO_KEEP, WITHOUT_CACHE, find_token_input

MASK, POSITIONS = "attention_mask", "position_ids"
"""Arguments of transformers' causal language models that a trace makes by itself."""
_DECODER = "decoder_"
"""What the names of the same of a decoder beside an encoder begin with."""
_NAME = "lorac"


def make_decoder_inputs(model: nn.Module, given: Any) -> dict[str, Tensor]:
    """What a program that keeps a cache is captured with.

    Args:
        model: the host.
        given: example inputs by name.

    Raises:
        Unavailable: it is no causal language model of transformers, or takes more than text.
    """
    names = inspect.signature(model.forward).parameters
    known: Any = model
    if not is_hugging_face(model) or not known.can_generate() or find_token_input(names) not in names:
        raise _unfit(model, "is no language model of transformers")
    text = find_token_input(names)
    if text not in given:
        raise _unfit(model, f"is given no '{text}'")
    others = {
        name: value
        for name, value in given.items()
        if name not in {text, LOGITS_TO_KEEP, *list_derived_arguments(text)}
    }
    if others and text == IDS:
        raise _unfit(model, f"is given '{min(others)}', and only text grows")
    ids = given[text]
    if ids.shape[1] < 2:
        raise _unfit(model, "is given an example of less than two tokens")
    if IDS in others and MASK in names:
        others.setdefault(MASK, torch.ones_like(others[IDS]))
    # Of places that every longer or shorter text has too.
    places = {LOGITS_TO_KEEP: torch.tensor([1, 0, 1], device=ids.device)} if LOGITS_TO_KEEP in names else {}
    return {**others, text: ids, **places}


def list_derived_arguments(text: str) -> tuple[str, str]:
    """The arguments that a trace makes of a text by itself: its mask and its positions."""
    prefix = _DECODER if text == DECODER_IDS else ""
    return f"{prefix}{MASK}", f"{prefix}{POSITIONS}"


def get_longest_sequence(model: nn.Module) -> int | None:
    """The longest text that a model's configuration names, with the angles that it begins with; None: it names none."""
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]  # of transformers
    told = getattr(config, "rope_parameters", None) or {}
    kinds = [told, *(inner for inner in told.values() if isinstance(inner, dict))]
    changing = [kind.get(_ORIGINAL) for kind in kinds if kind.get("rope_type") in _CHANGING]
    limits = [*changing, getattr(config, "max_position_embeddings", None)]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


_DYNAMIC = "dynamic"
_CHANGING = (_DYNAMIC, "longrope")
"""Kinds of rotary positions whose angles are others in longer texts."""
_ORIGINAL = "original_max_position_embeddings"


def freeze_dynamic_rotary(host: nn.Module) -> None:
    """Have the dynamic rotary positions of a copy keep the angles that they begin with.

    They look at the largest position to see whether the text has become longer than ``longest_text``, where no program
    goes, and a trace cannot look. A model that has read such a text holds the angles of that.
    """
    for module in host.modules():
        kinds: Any = getattr(module, "rope_type", None)
        by_layers = kinds if isinstance(kinds, dict) else {"": kinds}
        for layers in [layers for layers, kind in by_layers.items() if kind == _DYNAMIC]:
            _rewind(module, layers)


def _rewind(module: Any, layers: str) -> None:
    """Give a rotary module the angles that it began with, for some kind of layers, and have it keep them."""
    prefix = f"{layers}_" if layers else ""
    first = getattr(module, f"{prefix}original_inv_freq")
    setattr(module, f"{prefix}inv_freq", first.to(getattr(module, f"{prefix}inv_freq").device))
    module.rope_type = {**module.rope_type, layers: "default"} if layers else "default"


def make_decoder_shapes(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The dynamic shapes of ``text_inputs``."""
    shapes = make_dynamic_shapes(model, {name: value for name, value in inputs.items() if name != LOGITS_TO_KEEP})
    return shapes | {name: {0: Dim("kept")} for name in inputs if name == LOGITS_TO_KEEP}


def derive_decoder_arguments(forward: Forward) -> Forward:
    """A forward that takes what ``text_inputs`` has, and makes the rest."""
    own = inspect.signature(forward)
    text = find_token_input(own.parameters)
    mask, positions = list_derived_arguments(text)

    @functools.wraps(forward)
    def call(**given: Any) -> Any:
        ids = given[text]
        made = {mask: torch.ones_like(ids), positions: torch.ops.lorac.positions(ids)}
        return forward(**given, **{name: value for name, value in made.items() if name in own.parameters})

    left = [parameter for name, parameter in own.parameters.items() if name not in {mask, positions}]
    call.__signature__ = own.replace(parameters=left)  # type: ignore[attr-defined]  # functions take attributes
    return call


@dataclass
class _AttentionInterface:
    """What one trace asks of the interfaces.

    Attributes:
        paths: id of a module -> its path.
        windows: id of a token that stands for a mask -> the token, and the tokens that each token sees; 0 for all.
        shown: id of a token that stands for a mask that stays what it is -> the token, and the mask.
        unfit: what no cache can stand for.
        marked: whether something attended through the interface.
    """

    paths: Mapping[int, str]
    windows: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    shown: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    unfit: list[str] = field(default_factory=list)
    marked: bool = False

    def mask(self, **asked: Any) -> Tensor | None:
        """As transformers' functions that make masks."""
        from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

        token: Tensor = torch.ops.lorac.mask(torch.empty((), device=asked.get("device")))
        if asked["mask_function"] is bidirectional_mask_function:
            given = asked["attention_mask"]
            return self._token(token, None if given is None else given[:, None, None, :].to(torch.bool))
        if causal_mask_function.__code__ not in {code for code, _ in _closed_over(asked["mask_function"])}:
            return self._token(token, sdpa_mask(**{**asked, "allow_is_bidirectional_skip": False}))
        window = _window(asked["mask_function"])
        if window is None:
            self.unfit.append("its attention hides more than what comes later, and what lies outside a window")
        self.windows[id(token)] = token, window or 0
        return token

    def _token(self, token: Tensor, mask: Tensor | None) -> Tensor | None:
        """What stands for a mask: a module that attends by itself would take booleans for what is added to scores."""
        if mask is None:
            return None
        self.shown[id(token)] = token, mask
        return token

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
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As transformers' functions that attend."""
        self.marked = True
        path = self.paths.get(id(module), type(module).__name__)
        known = self.windows.get(id(attention_mask))
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) or known is not None
        _, shown = self.shown.get(id(attention_mask), (None, attention_mask))
        seen, bias = None if known is not None else shown, position_bias
        if seen is not None and seen.dtype != torch.bool:
            self.unfit.append(f"'{path}' attends by a mask of its own")
        scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
        window, cap = (known or (None, 0))[1], float(softcap or 0)
        y = torch.ops.lorac.attention(query, key, value, bias, seen, s_aux, scale, causal, window, cap, path)
        return y, None

    def reader(self, host: nn.Module, inputs: Mapping[str, Any]) -> str:
        """The first module that gets a mask and hands it on to none, in a call of the traced copy; "" for none."""
        readers: list[str] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(id(value) in self.windows or id(value) in self.shown for value in (*args, *kwargs.values())):
                readers.append(self.paths.get(id(module), ""))

        hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in host.modules()]
        try:
            # What made the trace fail may make this call fail, too; until then it tells who reads masks.
            with torch.no_grad(), contextlib.suppress(Exception):
                host(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        after = [*readers[1:], ""]
        return next((own for own, inner in zip(readers, after, strict=True) if not inner.startswith(f"{own}.")), "")


@contextlib.contextmanager
def capture_attention(host: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """While a copy of a model is traced: each of its attentions is one op.

    Args:
        host: the copy.
        inputs: what it is traced with, by name.

    Raises:
        Unavailable: a cache cannot stand for what it attends to.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    marks = _AttentionInterface({id(module): path for path, module in host.named_modules()})
    set_config_fields(host, {"_attn_implementation_internal": _NAME})
    kept: list[tuple[dict[str, Any], Callable[..., Any]]] = [
        (ALL_ATTENTION_FUNCTIONS._global_mapping, marks.attend),
        (ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, marks.mask),
    ]
    for mapping, function in kept:
        mapping[_NAME] = function
    try:
        yield
    except CaptureError as error:
        if marks.unfit:
            raise _unfit(host, f"keeps no cache: {marks.unfit[0]}") from error
        if not marks.marked and (marks.windows or marks.shown):
            raise _attends(host, marks.reader(host, inputs)) from error
        raise
    finally:
        for mapping, _ in kept:
            mapping.pop(_NAME, None)
    if marks.unfit:
        raise _unfit(host, f"keeps no cache: {marks.unfit[0]}")


def check_attention_captured(program: ExportedProgram, host: nn.Module) -> None:
    """Refuse a model that computes attention by itself: then a mask is left that something reads.

    Raises:
        Unavailable: naming the module.
    """
    program.graph.eliminate_dead_code()
    left = [user for node in program.graph.nodes if node.target is attending.MASK for user in node.users]
    marked = any(node.target is attending.ATTENTION for node in program.graph.nodes)
    if left or not marked:
        stack = list((left[0].meta.get("nn_module_stack") or {}).values()) if left else []
        raise _attends(host, stack[-1][0] if stack else "")


def _window(mask: Callable[..., Any]) -> int | None:
    """How many tokens a causal mask of transformers lets each see, 0 for all; None for any other mask."""
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    if mask is causal_mask_function:
        return 0
    ours, theirs = (_closed_over(function) for function in (sliding_window_causal_mask_function(1), mask))
    if len(theirs) != len(ours) or any(mine[0] is not other[0] for mine, other in zip(ours, theirs, strict=True)):
        return None
    sizes = [size for (_, own), (_, size) in zip(ours, theirs, strict=True) if own == 1]
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], int) else None


def _closed_over(function: Any) -> list[tuple[Any, Any]]:
    """The code of a function and of those it is made of, each with the numbers that it closes over."""
    if isinstance(function, tuple | list):
        return [found for inner in function for found in _closed_over(inner)]
    if not hasattr(function, "__code__"):
        return [(type(function), function)]
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return [(function.__code__, None), *(found for held in cells for found in _closed_over(held))]


def _attends(model: nn.Module, path: str) -> Unavailable:
    who = f"'{path}'" if path else "it"
    return _unfit(model, f"keeps no cache: {who} attends by itself, not through transformers' attention interface")


def _unfit(model: nn.Module, why: str) -> Unavailable:
    return Unavailable(f"{type(model).__name__} {why}", next_step=WITHOUT_CACHE)
