"""Capture of models that read images or sounds, for a cache: a tower's graph, and a decoder that reads its features.

Both are captures of the whole model with another forward. The tower's is the model's own method for features. The
decoder's puts the features of a row in the place of the embeddings of its placeholders, as the model's own forward
does, so that a sequence may come in parts.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lorac.errors import Unavailable
from lorac.frontend.host import Host
from lorac.ir.calls.call import Inputs
from lorac.ir.calls.modalities import (
    FEATURES,
    KINDS,
    OFFSETS,
    TOKEN_TYPES,
    Modality,
    feature_ids,
    find_modality,
    pad_rows,
    split_inputs,
)
from lorac.ir.calls.multimodal_positions import POSITION_IDS
from lorac.ir.graph.attention_ops import IDS, LOGITS_TO_KEEP, WITHOUT_CACHE, encoder_output_name
from lorac.ir.graph.interpreter import differs_beyond_rounding

_MASK = "attention_mask"
_LATER = "_deepstack_process"
"""A text model's method that adds features of later layers of a tower behind its own layers (Qwen3-VL's)."""


Part = tuple[Host, Mapping[str, object]]
"""A model with another forward, and example inputs of it."""


def split_tower(host: Host, example: object) -> tuple[Part, Part] | None:
    """Return the decoder and the tower of a model; None for one whose example inputs are text alone.

    Args:
        host: the model; left unchanged.
        example: example inputs, as ``Host.bind`` takes them.

    Raises:
        Unavailable: the example has other numbers of placeholders and features, or the model computes something else
            from both than from text with features in the place of embeddings.
    """
    try:
        given = {name: value for name, value in host.bind(example).items() if name != _MASK}
    except TypeError:  # the capture reports it
        return None
    model: Any = host.model
    modality = find_modality(given)
    if modality is None or IDS not in given or not callable(getattr(model, modality.method, None)):
        return None
    if (token := modality.find_token(model.config.to_dict())) is None:
        return None
    others = {IDS, POSITION_IDS, LOGITS_TO_KEEP, TOKEN_TYPES, KINDS}
    inputs = {name: value for name, value in given.items() if name not in others}
    tower, runs = _with_forward(host, _tower_forward(modality, inputs)), split_inputs(modality, inputs)
    with torch.no_grad():
        vectors = torch.cat([tower.model.eval()(**run)[encoder_output_name(FEATURES)] for run in runs])
    ids: Tensor = given[IDS]
    marks = ids.eq(token)
    if not len(vectors) or int(marks.sum()) != len(vectors):
        raise Unavailable(
            f"the example has {int(marks.sum())} tokens of the {modality.name}s and {len(vectors)} features for them",
            next_step="give example_inputs= as the model's processor makes them",
        )
    features = pad_rows(vectors.split(marks.sum(1).tolist()))
    positions = host.find_positions()
    known = None if positions is None else positions.compute(given)
    text = {IDS: torch.where(marks, feature_ids(marks), ids), FEATURES: features.repeat(1, 2, 1)}
    if known is not None:
        text[OFFSETS] = (known - torch.arange(ids.shape[1])).permute(1, 2, 0).contiguous()
    decoder = _with_forward(host, _decoder_forward(host, known is not None))
    if not any(parameter.is_meta for parameter in model.parameters()):
        with torch.no_grad():
            expected = host.copy(share_buffers=True).model.eval()(**given).logits
            found = decoder.model.eval()(**text).logits
        if differs_beyond_rounding(found, expected):
            raise Unavailable(
                f"{type(model).__name__} keeps no cache: it reads {modality.name}s in another way than in the place of "
                "embeddings, such as by tokens that see later ones",
                next_step=WITHOUT_CACHE,
            )
    return (decoder, text), (tower, runs[0])


def _with_forward(host: Host, forward: Any) -> Host:
    """Return a host of a copy whose forward is another function."""
    copied = host.copy(share_buffers=True)
    cls = type(copied.model)
    copied.model.__class__ = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
    return copied


def _tower_forward(modality: Modality, inputs: Inputs) -> Any:
    def forward(self: Any, **given: Tensor) -> dict[str, Tensor]:
        with _WholeFeatures(modality.method):
            output = getattr(self, modality.method)(**given, return_dict=True)
        kinds = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
        parts = [kind if isinstance(kind, list | tuple) else [kind] for kind in kinds]
        flat = [torch.cat([part.reshape(-1, part.shape[-1]) for part in kind]) for kind in parts]
        return {encoder_output_name(FEATURES): flat[0] if len(flat) == 1 else torch.cat(flat, -1)}

    named = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in inputs]
    forward.__signature__ = _signature(forward, named)  # type: ignore[attr-defined]  # functions take attributes
    return forward


class _WholeFeatures(TorchFunctionMode):
    """Leaves features in one piece where the method for them divides them among images, which a trace cannot follow.

    Args:
        method: the name of the method.
    """

    def __init__(self, method: str) -> None:
        super().__init__()
        self._method = method

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's
        if func in _WHOLE and _calling_function() == self._method:
            return _WHOLE[func](args[0])
        selects = func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype is torch.bool
        if selects and _calling_function() == self._method:
            return args[0]
        return func(*args, **(kwargs or {}))


_WHOLE: Mapping[object, Callable[[Tensor], object]] = {
    **dict.fromkeys((Tensor.unbind, Tensor.split, torch.split), lambda features: (features,)),
    Tensor.__len__: lambda features: 1,
    **dict.fromkeys((Tensor.item, Tensor.tolist), lambda sizes: 1),
}
"""Function that splits features, or reads their number -> its replacement."""


def _calling_function() -> str:
    """Return the name of the innermost running function that is neither torch's nor of this module."""
    frame = sys._getframe(2)
    # A comprehension has a frame of its own until Python 3.12.
    while frame.f_back is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_name[0] == "<"):
        frame = frame.f_back
    return frame.f_code.co_name


def _decoder_forward(host: Host, has_axes: bool) -> Any:
    def forward(self: Any, **given: Any) -> Any:
        ids, features = given.pop(IDS), given.pop(FEATURES)
        embeds = self.get_input_embeddings()(ids.clamp(min=0))
        places, is_feature = (-1 - ids).clamp(min=0, max=features.shape[1] - 1), (ids < 0)[..., None]
        found = torch.ops.lorac.rows(features, places).to(embeds.dtype)
        if has_axes:
            offsets, numbers = given.pop(OFFSETS), given.get(POSITION_IDS)
            numbers = torch.arange(ids.shape[1]).expand(ids.shape) if numbers is None else numbers
            found_offsets = torch.ops.lorac.rows(offsets, numbers.clamp(max=offsets.shape[1] - 1))
            given[POSITION_IDS] = numbers + found_offsets.permute(2, 0, 1)
        first, *later = found.split(embeds.shape[-1], -1)
        given["inputs_embeds"] = torch.where(is_feature, first, embeds)
        if not later:
            return base.forward(self, **given)
        added = {
            "visual_pos_masks": is_feature,
            "deepstack_visual_embeds": [torch.where(is_feature, part, 0) for part in later],
        }
        inner = next(module for module in self.modules() if callable(getattr(module, _LATER, None)))
        setattr(inner, _LATER, lambda hidden, _, part: hidden + part)
        with inner.register_forward_pre_hook(lambda _, args, known: (args, known | added), with_kwargs=True):
            return base.forward(self, **given)

    base = type(host.model)
    own = [p for p in host.parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [FEATURES, OFFSETS] if has_axes else [FEATURES]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [*own, *(inspect.Parameter(name, kind, default=None) for name in added)]
    forward.__signature__ = _signature(forward, parameters)  # type: ignore[attr-defined]  # functions take attributes
    return forward


def _signature(forward: Any, parameters: list[inspect.Parameter]) -> inspect.Signature:
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return inspect.Signature([first, *parameters])
