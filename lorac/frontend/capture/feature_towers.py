"""Capture with a cache of models for images or sounds: a tower's graph, and a decoder that reads the features.

Both are captures of the whole model with another forward. The tower's forward is the model's method for features. The
decoder's forward replaces the embeddings of a row's placeholders by the row's features, as the model's own forward
does, so that a sequence may be processed in parts.
"""

import contextlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from lorac.errors import Unavailable
from lorac.frontend.host import Host
from lorac.ir.calls.call import Inputs
from lorac.ir.calls.modalities import (
    BLOCK_TYPES,
    BLOCKS,
    FEATURES,
    OFFSETS,
    PLACED,
    TOKEN_ARGUMENTS,
    LaterFeatures,
    Modality,
    TokenBlocks,
    feature_ids,
    find_modality,
    pad_rows,
    split_inputs,
)
from lorac.ir.calls.multimodal_positions import POSITION_IDS
from lorac.ir.graph.attention_ops import DECODER_IDS, IDS, LOGITS_TO_KEEP, WITHOUT_CACHE, encoder_output_name
from lorac.ir.graph.interpreter import differs_beyond_rounding
from lorac.ir.traces.modes import FunctionMode

_MASK = "attention_mask"
_SELF = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)

Part = tuple[Host, Mapping[str, object]]
"""A model with another forward, and example inputs for this forward."""


def split_tower(host: Host, example: object) -> tuple[Part, Part] | None:
    """Return the decoder and the tower of a model; None if an encoder reads the images, or the example is only text.

    Args:
        host: the model; left unchanged.
        example: example inputs, as ``Host.bind`` takes them.

    Raises:
        Unavailable: the numbers of placeholders and features in the example differ, or the model does more than replace
            embeddings by features.
    """
    try:
        given = {name: value for name, value in host.bind(example).items() if name != _MASK}
    except TypeError:  # the capture raises this error
        return None
    model: Any = host.model
    modality = find_modality(given)
    if modality is None or IDS not in given or DECODER_IDS in host.parameters:  # an encoder reads both
        return None
    token = modality.find_token(model.config.to_dict())
    if token is None or not callable(getattr(model, modality.method, None)):
        return None
    others = {IDS, POSITION_IDS, LOGITS_TO_KEEP, *TOKEN_ARGUMENTS}
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
    by_type = BLOCK_TYPES.get(model.config.model_type)
    if by_type is not None:
        given = {by_type.argument: torch.where(marks, by_type.type, 1 - by_type.type), **given}
        blocks = pad_rows([by_type.find(row) for row in given[by_type.argument]])
        text[BLOCKS] = torch.cat([blocks, torch.zeros_like(blocks)], 1)  # tokens after the example have no blocks
    decoder = _with_forward(host, _decoder_forward(host, text, modality.later, by_type))
    if not any(parameter.is_meta for parameter in model.parameters()):
        with torch.no_grad():
            expected = host.copy(share_buffers=True).model.eval()(**given).logits
            found = decoder.model.eval()(**text).logits
        if differs_beyond_rounding(found, expected):
            raise Unavailable(
                f"{type(model).__name__} keeps no cache: it does more with {modality.name}s than put their features "
                "in the place of embeddings",
                next_step=WITHOUT_CACHE,
            )
    if BLOCKS in text:  # a row is processed in parts, and the last part has a token after all blocks
        text[IDS] = torch.cat([text[IDS], torch.zeros_like(ids[:, :1])], 1)
    return (decoder, text), (tower, runs[0])


def _with_forward(host: Host, forward: Any) -> Host:
    """Return a host of a copy whose forward is this function."""
    copied = host.copy(share_buffers=True)
    cls = type(copied.model)
    copied.model.__class__ = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
    return copied


def _tower_forward(modality: Modality, inputs: Inputs) -> Any:
    def forward(self: Any, **given: Tensor) -> dict[str, Tensor]:
        with _WholeFeatures(self):
            output = getattr(self, modality.method)(**given, return_dict=True)
        later = modality.later and getattr(output, modality.later.output, None)
        kinds = [output.pooler_output, *(later or ())]
        parts = [kind if isinstance(kind, list | tuple) else [kind] for kind in kinds]
        flat = [torch.cat([part.reshape(-1, part.shape[-1]) for part in kind]) for kind in parts]
        return {encoder_output_name(FEATURES): flat[0] if len(flat) == 1 else torch.cat(flat, -1)}

    named = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in inputs]
    forward.__signature__ = inspect.Signature([_SELF, *named])  # type: ignore[attr-defined]  # functions take attributes
    return forward


class _WholeFeatures(FunctionMode):
    """A mode that keeps features whole where the model's method splits them by image, which a trace cannot follow.

    Inside modules that the method calls, splits are unchanged.

    Args:
        model: the model whose method runs in the block.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._modules, self._depth, self._hooks = list(model.modules()), 0, contextlib.ExitStack()

    def __enter__(self) -> Self:
        for module in self._modules:
            self._hooks.enter_context(module.register_forward_pre_hook(lambda *_: self._move(1)))
            self._hooks.enter_context(module.register_forward_hook(lambda *_: self._move(-1), always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch's
        self._hooks.close()

    def _move(self, levels: int) -> None:
        self._depth += levels

    def handle(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if not self._depth and function in _WHOLE:
            return _WHOLE[function](args[0])
        selects = function is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype is torch.bool
        return args[0] if selects and not self._depth else function(*args, **kwargs)


_WHOLE: Mapping[object, Callable[[Tensor], object]] = {
    **dict.fromkeys((Tensor.unbind, Tensor.split, torch.split), lambda features: (features,)),
    Tensor.__len__: lambda features: 1,
    **dict.fromkeys((Tensor.item, Tensor.tolist), lambda sizes: 1),
}
"""Function that splits features or reads their number -> its replacement."""


def _decoder_forward(
    host: Host, names: Collection[str], deeper: LaterFeatures | None, by_type: TokenBlocks | None
) -> Any:
    def forward(self: Any, **given: Any) -> Any:
        ids, features = given.pop(IDS), given.pop(FEATURES)
        embeds = self.get_input_embeddings()(ids.clamp(min=0))
        places, is_feature = (-1 - ids).clamp(min=0, max=features.shape[1] - 1), (ids < 0)[..., None]
        found = torch.ops.lorac.rows(features, places).to(embeds.dtype)
        numbers = given.get(POSITION_IDS)
        numbers = torch.arange(ids.shape[1]).expand(ids.shape) if numbers is None else numbers
        tables = {name: given.pop(name) for name in (OFFSETS, BLOCKS) if name in names}
        terms = {n: torch.ops.lorac.rows(t, numbers.clamp(max=t.shape[1] - 1)) for n, t in tables.items()}
        if OFFSETS in terms:
            given[POSITION_IDS] = numbers + terms[OFFSETS].permute(2, 0, 1)
        if by_type is not None:
            types = torch.where(terms[BLOCKS].ne(0).any(-1), by_type.type, 1 - by_type.type)
            given[by_type.argument] = types
        first, *later = found.split(embeds.shape[-1], -1)
        given["inputs_embeds"] = torch.where(is_feature, first, embeds)
        if not later:
            return base.forward(self, **given)
        assert deeper is not None
        added = {deeper.marks: is_feature, deeper.features: [torch.where(is_feature, part, 0) for part in later]}
        inner = next(module for module in self.modules() if callable(getattr(module, deeper.adds, None)))
        setattr(inner, deeper.adds, lambda hidden, _, part: hidden + part)
        with inner.register_forward_pre_hook(lambda _, args, known: (args, known | added), with_kwargs=True):
            return base.forward(self, **given)

    base = type(host.model)
    own = [p for p in host.parameters.values() if p.kind is not p.VAR_KEYWORD]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [*own, *(inspect.Parameter(name, kind, default=None) for name in sorted(PLACED & {*names}))]
    forward.__signature__ = inspect.Signature([_SELF, *parameters])  # type: ignore[attr-defined]  # functions take attributes
    return forward
