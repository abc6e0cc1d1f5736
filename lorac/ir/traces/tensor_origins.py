"""Which parts of given tensors others hold, in what order of axes and how scaled: recorded while code makes them.

The code runs on tensors of the meta device, which have no values, so it does the same with any values.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_COPIES = {_aten.clone.default, _aten.cat.default}
_SCALINGS = {_aten.mul.Tensor, _aten.div.Tensor, _aten.neg.default, _aten._to_copy.default}
"""Ops that round each value for itself, so that they give the same in any layout of memory."""


class Unrecordable(Exception):
    """Code does something else with given tensors than viewing, copying, casting and scaling them."""


@dataclass(frozen=True)
class OriginStep:
    """An op with the arguments that follow its tensor."""

    func: OpOverload
    args: tuple[object, ...]
    kwargs: tuple[tuple[str, object], ...]

    def apply(self, tensor: Tensor) -> Tensor:
        """Return what the op makes of a tensor."""
        result: Tensor = self.func(tensor, *self.args, **dict(self.kwargs))
        return result


@dataclass(frozen=True, eq=False)
class TensorOrigin:
    """The part of a given tensor that another holds.

    Attributes:
        name: of the given tensor.
        part: the part, as a view of the given tensor, with the axes of the other.
        steps: what was done to its values, in order.
    """

    name: str
    part: Tensor
    steps: tuple[OriginStep, ...] = ()

    def view(self, given: Mapping[str, Tensor]) -> Tensor:
        """Return the part of one of the given tensors, as it was before any step."""
        tensor = given[self.name]
        offset = int(tensor.storage_offset() + self.part.storage_offset())
        return tensor.as_strided(self.part.shape, self.part.stride(), offset)


class OriginRecorder(TorchDispatchMode):
    """Records in its blocks the origins of what is made of given tensors.

    Args:
        given: the tensors by name, on the meta device; more may be added.
    """

    def __init__(self, given: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._given = given
        self._known: dict[int, tuple[Tensor, TensorOrigin]] = {}  # the tensors live, so that no other gets their ids

    def find(self, tensor: Tensor) -> TensorOrigin | None:
        """Return the origin of a tensor; None if it is not made of given ones."""
        if id(tensor) in self._known:
            return self._known[id(tensor)][1]
        name = next((name for name, given in self._given.items() if given is tensor), None)
        return None if name is None else TensorOrigin(name, tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's
        named = kwargs or {}
        result = func(*args, **named)
        values = (value if isinstance(value, list | tuple) else [value] for value in (*args, *named.values()))
        tensors = [value for value in itertools.chain(*values) if isinstance(value, Tensor)]
        origins = [origin for origin in map(self.find, tensors) if origin is not None]
        if origins:
            if len(tensors) > 1 or func._schema.is_mutable:
                raise Unrecordable(str(func))
            self._record(result, _follow(origins[0], func, args[1:], named))
        return result

    def _record(self, result: object, found: list[TensorOrigin]) -> None:
        made = result if isinstance(result, list | tuple) else [result]
        for tensor, origin in zip(made, found, strict=True):
            if tensor.shape != origin.part.shape:
                raise Unrecordable("a value for each of several")
            self._known[id(tensor)] = (tensor, origin)


def _follow(
    origin: TensorOrigin, func: OpOverload, more: Sequence[object], named: Mapping[str, object]
) -> list[TensorOrigin]:
    """Return the origins of what an op makes of a tensor and further arguments."""
    if func in _COPIES:
        return [origin]
    if func in _SCALINGS:
        return [replace(origin, steps=(*origin.steps, OriginStep(func, tuple(more), tuple(named.items()))))]
    if not func.is_view or func is _aten.view.dtype:
        raise Unrecordable(str(func))
    parts = func(origin.part, *more, **named)
    return [replace(origin, part=part) for part in (parts if isinstance(parts, list | tuple) else [parts])]
