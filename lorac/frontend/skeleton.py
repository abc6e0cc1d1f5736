"""A skeleton of a host: as much of its structure as adapters need to find their sites without its forward.

An emitted program needs no host, but reading an adapter's file depends on the host's structure: which modules exist,
their kinds and shapes, which of them are the embeddings, and which names share a tensor. A skeleton is a tree of
modules with the same names, kinds and shapes; modules of a library's classes have classes with the same names, and
several models remain several, since names in files may depend on both. Tensors that an artifact stores (the base
weights of adapted sites, mapped from a file) are real; all others are on the meta device and take no memory. A skeleton
has a JSON form, which an artifact contains.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorac.argument_types import JsonMapping
from lorac.frontend.base_weights import named_tensors
from lorac.frontend.components import Components, Skeleton
from lorac.frontend.site_discovery import find_matrix_sites, is_gpt2_conv1d, stores_transposed

_CONTAINERS: dict[str, type[nn.Module]] = {"list": nn.ModuleList, "sequence": nn.Sequential, "named": nn.ModuleDict}
_CONVOLUTIONS: dict[str, type[nn.Module]] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
_KINDS: dict[str, type[nn.Module]] = {
    "linear": nn.Linear,
    "embedding": nn.Embedding,
    "attention": nn.MultiheadAttention,
    **_CONVOLUTIONS,
    **_CONTAINERS,
}
_EMBEDDINGS = {"input": "get_input_embeddings", "output": "get_output_embeddings"}
"""``"input"`` or ``"output"`` -> the method of transformers models that returns this embedding."""
ModuleType = TypeVar("ModuleType", bound=nn.Module)
_GEOMETRY = ("kernel_size", "stride", "padding", "dilation")
_FIELDS: dict[str, dict[str, str]] = {
    "linear": {"in": "in_features", "out": "out_features"},
    "gpt2": {"in": "nx", "out": "nf"},
    "embedding": {"in": "num_embeddings", "out": "embedding_dim", "padding": "padding_idx"},
    "attention": {"width": "embed_dim"},
    **dict.fromkeys(
        _CONVOLUTIONS,
        {"in": "in_channels", "out": "out_channels", "groups": "groups", "mode": "padding_mode"}
        | {name: name for name in _GEOMETRY},
    ),
}
"""Kind of a module -> the entries of its description, each with the attribute that it stores."""


class SkeletonConv1D(nn.Module):
    """Stand-in for transformers' Conv1D, whose weight is (in, out); ``is_gpt2_conv1d`` recognises its name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx


class MatrixHolder(nn.Module):
    """Stand-in for a custom module that multiplies by its parameters in its own forward, such as stacks of experts.

    Args:
        is_transposed: whether its stacks are stored as (E, in, out).
    """

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed


def describe_skeleton(
    model: nn.Module, packed: Mapping[str, str] | None = None, widened: Mapping[str, torch.dtype] | None = None
) -> dict[str, object]:
    """Describe a host as JSON: modules in order, tensors by name, paths of the embeddings, and its class.

    Args:
        packed: name of a weight that is quantised in the host's program -> its quantised class.
        widened: name of a tensor -> its original, narrower dtype.
    """
    modules = {path: _describe_module(module) for path, module in model.named_modules() if path}
    first: dict[int, str] = {}
    tensors: dict[str, dict[str, object]] = {}
    for name, tensor in named_tensors(model).items():
        entry: dict[str, object] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        if not isinstance(tensor, nn.Parameter):
            entry["buffer"] = True
        if packed and name in packed:
            entry["packed"] = packed[name]
        if widened and name in widened:
            entry["given"] = str(widened[name]).removeprefix("torch.")
        if first.setdefault(id(tensor), name) != name:
            entry["is"] = first[id(tensor)]
        tensors[name] = entry
    own = {"several": True} if isinstance(model, Components) else _describe_class(model)
    return {"modules": modules, "tensors": tensors, "embeddings": _embedding_paths(model), **own}


def build_skeleton(described: JsonMapping, values: Mapping[str, Tensor] | None = None) -> Skeleton:
    """Build a skeleton from its description.

    Args:
        described: the result of ``describe_skeleton``.
        values: known tensors by name; all others are on the meta device.
    """
    cls = _class_like(described.get("class"), Skeleton)
    root = cls(described["embeddings"], several=bool(described.get("several")))
    for path, entry in described["modules"].items():
        owner, _, leaf = path.rpartition(".")
        _module_at(root, owner).add_module(leaf, _make_module(entry))
    tensors, known = dict[str, Tensor](), values or {}
    for name, entry in described["tensors"].items():
        if "is" in entry:
            tensor = tensors[entry["is"]]
        else:
            empty = functools.partial(torch.empty, entry["shape"], dtype=_dtype(entry["dtype"]), device="meta")
            tensor = known[name] if name in known else empty()
        if "is" not in entry and not entry.get("buffer"):
            # The class of a quantised weight's stand-in has the quantised class's name, which sites report.
            packed = entry.get("packed")
            stand_in: Callable[..., Tensor] = type(packed, (nn.Parameter,), {}) if packed else nn.Parameter
            tensor = stand_in(tensor, requires_grad=False)
        tensors[name] = tensor
        owner, _, leaf = name.rpartition(".")
        if entry.get("buffer"):
            _module_at(root, owner).register_buffer(leaf, tensor)
        else:
            setattr(_module_at(root, owner), leaf, tensor)  # attention has None under the names of further biases
    return root.eval()


def read_widened(described: JsonMapping) -> dict[str, torch.dtype]:
    """Return name -> original dtype for the widened tensors of a description, as ``describe_skeleton`` takes them."""
    return {name: _dtype(entry["given"]) for name, entry in described["tensors"].items() if "given" in entry}


def _describe_module(module: Any) -> dict[str, object]:
    kind = next((kind for kind, cls in _KINDS.items() if isinstance(module, cls)), None)
    if is_gpt2_conv1d(module):
        kind = "gpt2"
    if kind is None:
        holds = find_matrix_sites("", module)
        kept = {"kind": "matrices", "transposed": stores_transposed(module)} if holds else {}
        return kept | _describe_class(module)
    values = {entry: getattr(module, name) for entry, name in _FIELDS.get(kind, {}).items()}
    return {"kind": kind} | {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def _describe_class(module: nn.Module) -> dict[str, object]:
    """Return the import path of a module's class; nothing for torch's classes."""
    cls = type(module)
    return {} if cls.__module__.partition(".")[0] == "torch" else {"class": f"{cls.__module__}.{cls.__name__}"}


@functools.cache
def _class_like(described: str | None, base: type[ModuleType]) -> type[ModuleType]:
    """Return a subclass of ``base`` with the name and module of a described class; ``base`` if none is described."""
    module, _, name = str(described or "").rpartition(".")
    return type(name, (base,), {"__module__": module}) if name.isidentifier() else base


def _make_module(entry: JsonMapping) -> nn.Module:
    """Make a module of the described kind without tensors, which the caller registers."""
    kind = entry.get("kind")
    with torch.device("meta"):
        if kind == "linear":
            return _without_parameters(nn.Linear(entry["in"], entry["out"]))
        if kind == "gpt2":
            return SkeletonConv1D(entry["out"], entry["in"])
        if kind == "embedding":
            # Passing a weight avoids a random one: on the meta device, drawing it imports torch's compiler.
            weight = torch.empty(entry["in"], entry["out"])
            return _without_parameters(nn.Embedding.from_pretrained(weight, padding_idx=entry["padding"]))
        if kind == "attention":
            return _without_parameters(nn.MultiheadAttention(entry["width"], 1))
        if kind in _CONVOLUTIONS:
            geometry = {k: tuple(entry[k]) if isinstance(entry[k], list) else entry[k] for k in _GEOMETRY}
            options = {"groups": entry["groups"], "padding_mode": entry["mode"]}
            return _without_parameters(_CONVOLUTIONS[kind](entry["in"], entry["out"], **options, **geometry))
        if kind == "matrices":
            return _class_like(entry.get("class"), MatrixHolder)(entry["transposed"])
        return _class_like(entry.get("class"), _CONTAINERS.get(str(kind), nn.Module))()  # type: ignore[arg-type]  # classes are hashable


def _without_parameters(module: nn.Module) -> nn.Module:
    for name in list(module._parameters):
        module.register_parameter(name, None)
    return module


def _module_at(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a path; a path that ``named_modules`` leaves out (a second path) gets a plain module."""
    here = root
    for part in path.split(".") if path else ():
        child = here._modules.get(part)
        if child is None:
            child = nn.Module()
            here.add_module(part, child)
        here = child
    return here


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _embedding_paths(model: nn.Module) -> dict[str, str]:
    """Return ``"input"`` and ``"output"`` -> path of the embedding, if the model has a method for it."""
    found = {}
    for role, getter in _EMBEDDINGS.items():
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        path = next((path for path, other in model.named_modules() if module is not None and other is module), None)
        if path is not None:
            found[role] = path
    return found
