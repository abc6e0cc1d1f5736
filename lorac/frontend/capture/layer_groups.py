"""Groups of equal layers in one list, found by a comparison of their modules.

Two layers are equal if their modules have the same classes and attributes, and tensors of the same sizes, tied in the
same way. An attribute may also be the layer's index, as transformers' ``layer_idx`` is: then the layers compute the
same only while nothing reads it, which the caller has to check.
"""

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorac.frontend.base_weights import named_tensors

_MIN_LAYERS = 2
IndexAttributes = frozenset[tuple[str, str]]
"""Attributes that store a layer's index: (path of the module within the layer, name)."""
_MODULE_ATTRIBUTES = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"})
"""Attributes of every module, which are compared separately."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one list that are equal except for their tensors.

    Attributes:
        paths: paths of the layers, in order.
        numbered: attributes that store a layer's index in the list.
    """

    paths: tuple[str, ...]
    numbered: IndexAttributes


def find_layer_groups(model: nn.Module) -> list[LayerGroup]:
    """Return the groups of equal layers in all lists of a model; a layer with no equal is left out."""
    holders: dict[int, set[str]] = {}
    for path, tensor in named_tensors(model).items():
        holders.setdefault(id(tensor), set()).add(path.rpartition(".")[0])
    shared = frozenset(key for key, modules in holders.items() if len(modules) > 1)  # tensors of several modules
    found: list[LayerGroup] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < _MIN_LAYERS:
            continue
        groups: list[_OpenGroup] = []
        for number, (name, layer) in enumerate(module.named_children()):
            if next(layer.children(), None) is None or not shared.isdisjoint(map(id, named_tensors(layer).values())):
                continue
            inner = f"{path}.{name}".removeprefix(".")
            if not any(group.takes(inner, layer, number) for group in groups):
                groups.append(_OpenGroup(layer, number, [inner]))
        full = (group for group in groups if len(group.paths) >= _MIN_LAYERS)
        found += [LayerGroup(tuple(group.paths), frozenset(group.numbered)) for group in full]
    return found


@dataclass
class _OpenGroup:
    """A group of equal layers under construction: the first layer, its index, all paths, attributes with the index."""

    layer: nn.Module
    number: int
    paths: list[str]
    numbered: set[tuple[str, str]] = field(default_factory=set)

    def takes(self, path: str, layer: nn.Module, number: int) -> bool:
        """Add a layer if it equals the first; return whether it was added."""
        pairs, numbered = _pairs(self.layer, layer), set[tuple[str, str]]()
        if pairs is None:
            return False
        names = ((inner, name) for inner, (own, _) in pairs.items() for name in vars(own).keys() - _MODULE_ATTRIBUTES)
        for inner, name in names:
            mine, theirs = (vars(module)[name] for module in pairs[inner])
            if type(mine) is type(theirs) is int and (mine, theirs) == (self.number, number):
                numbered.add((inner, name))
            elif not _same(mine, theirs, self.layer, layer):
                return False
        self.paths.append(path)
        self.numbered |= numbered
        return True


def _pairs(one: nn.Module, other: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]] | None:
    """Return the modules of two layers by path; None if the layers differ in classes, tensors or names."""
    mine, theirs = dict(one.named_modules()), dict(other.named_modules())
    if list(mine) != list(theirs):
        return None
    pairs = {path: (module, theirs[path]) for path, module in mine.items()}
    for a, b in pairs.values():
        if type(a) is not type(b) or a.training != b.training or vars(a).keys() != vars(b).keys():
            return None
        for x, y in ((a._parameters, b._parameters), (a._buffers, b._buffers)):
            if x.keys() != y.keys() or not all(_same_size(x[name], y[name]) for name in x):
                return None
    return pairs


def _same_size(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    properties = ((t.shape, t.dtype, t.device, t.requires_grad, type(t), t.layout) for t in (one, other))
    return len(set(properties)) == 1 and (one.layout is not torch.strided or one.stride() == other.stride())


def _same(one: object, other: object, mine: nn.Module, theirs: nn.Module) -> bool:
    """Return whether two attributes of modules are equal; values that cannot be compared count as different."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    parts, others = _parts(one, mine), _parts(other, theirs)
    if parts is not None and others is not None:
        return parts.keys() == others.keys() and all(_same(parts[key], others[key], mine, theirs) for key in parts)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _same_size(one, other) and torch.equal(one, other)
    return isinstance(one, _PLAIN) and bool(one == other)


def _parts(value: object, layer: nn.Module) -> Mapping[object, object] | None:
    """Return the parts of a value by name or position; None for a value without parts."""
    if isinstance(value, types.MethodType):
        return {"function": value.__func__, "of": _place(value.__self__, layer)}
    if isinstance(value, functools.partial):
        return {"function": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    return value if isinstance(value, Mapping) else None


_PLAIN = (int, float, complex, str, bytes, set, frozenset, torch.Size, torch.dtype, torch.device)
"""Classes of values that are compared by ``==``."""


def _place(module: object, layer: nn.Module) -> object:
    """Return a module's path within a layer; the object itself if it is outside the layer."""
    return next((path for path, found in layer.named_modules() if found is module), module)
