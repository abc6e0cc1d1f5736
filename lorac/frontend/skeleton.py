"""A skeleton: what is left of a host when its forward is gone, enough for adapters to find their places.

An emitted program needs no host, but reading an adapter's file does: which modules there are, of which kind and shape,
which of them are the embeddings, which names share one tensor. A skeleton is a tree of modules with the same names,
kinds and shapes. Tensors that are at hand (the base weights of adapted sites, mapped from a file) are real, all others
are on the meta device and take no memory. It has a form in JSON, so an artefact carries it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lorac.frontend.site_discovery import find_matrix_sites, is_gpt2_conv1d, stores_transposed

Tensor = torch.Tensor
_LISTS: dict[str, type[nn.Module]] = {"list": nn.ModuleList, "sequence": nn.Sequential, "named": nn.ModuleDict}
_CONVOLUTIONS: dict[str, type[nn.Module]] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
_ROLES = {"input": "get_input_embeddings", "output": "get_output_embeddings"}
"""Which embedding -> the method of transformers models that gives it."""
_GEOMETRY = ("kernel_size", "stride", "padding", "dilation")


class Skeleton(nn.Module):
    """The root of a skeleton; answers for the embeddings as a transformers model does."""

    def __init__(self, embeddings: Mapping[str, str]) -> None:
        super().__init__()
        self._embeddings = dict(embeddings)

    def get_input_embeddings(self) -> nn.Module | None:
        """The module that embeds the input, or None."""
        return self._embedding("input")

    def get_output_embeddings(self) -> nn.Module | None:
        """The output layer, or None."""
        return self._embedding("output")

    def _embedding(self, role: str) -> nn.Module | None:
        path = self._embeddings.get(role)
        return None if path is None else self.get_submodule(path)


class SkeletonConv1D(nn.Module):
    """Stand-in for transformers' Conv1D, whose weight is (in, out); ``is_gpt2_conv1d`` knows its name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx


class MatrixHolder(nn.Module):
    """Stands for a module of a class of its own that multiplies by its parameters itself, stacks of matrices say.

    Args:
        is_transposed: whether it stores its stacks as (E, in, out).
    """

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed


def describe_skeleton(model: nn.Module, packed: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A host's skeleton as JSON: modules in their order, tensors by name, the embeddings' paths.

    Args:
        model: the host.
        packed: name of a weight that the host's program holds quantised -> as what.
    """
    modules = {path: _described(module) for path, module in model.named_modules() if path}
    first: dict[int, str] = {}
    tensors = {}
    named: list[tuple[str, Tensor, bool]] = []
    named += [(name, p, True) for name, p in model.named_parameters(remove_duplicate=False)]
    named += [(name, b, False) for name, b in model.named_buffers(remove_duplicate=False)]
    for name, tensor, parameter in named:
        entry: dict[str, Any] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        if not parameter:
            entry["buffer"] = True
        if packed and name in packed:
            entry["packed"] = packed[name]
        if first.setdefault(id(tensor), name) != name:
            entry["is"] = first[id(tensor)]
        tensors[name] = entry
    return {"modules": modules, "tensors": tensors, "embeddings": _embeddings(model)}


def build_skeleton(described: Mapping[str, Any], values: Mapping[str, Tensor] | None = None) -> Skeleton:
    """The skeleton of ``describe``'s answer.

    Args:
        described: as ``describe`` gives it.
        values: tensors at hand, by name; the others are on the meta device.
    """
    root = Skeleton(described["embeddings"])
    for path, entry in described["modules"].items():
        _attach(root, path, _module(entry))
    made: dict[str, Tensor] = {}
    for name, entry in described["tensors"].items():
        owner = _owner(root, name.rpartition(".")[0])
        tensor = made[name] = made[entry["is"]] if "is" in entry else _tensor(name, entry, values or {})
        leaf = name.rpartition(".")[2]
        if entry.get("buffer"):
            owner.register_buffer(leaf, tensor)
        else:
            owner.register_parameter(leaf, tensor)  # type: ignore[arg-type]  # what is no buffer is a Parameter
    return root.eval()


def _described(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, nn.Linear):
        return {"kind": "linear", "in": module.in_features, "out": module.out_features}
    if is_gpt2_conv1d(module):
        return {"kind": "gpt2", "in": int(module.nx), "out": int(module.nf)}  # type: ignore[arg-type]  # numbers, of a class not imported
    if isinstance(module, nn.Embedding):
        return {
            "kind": "embedding",
            "in": module.num_embeddings,
            "out": module.embedding_dim,
            "padding": module.padding_idx,
        }
    if isinstance(module, nn.MultiheadAttention):
        return {"kind": "attention", "width": module.embed_dim}
    kinds = [kind for kind, cls in (_CONVOLUTIONS | _LISTS).items() if isinstance(module, cls)]
    if not kinds:
        return {"kind": "matrices", "transposed": stores_transposed(module)} if find_matrix_sites("", module) else {}
    return {"kind": kinds[0]} if kinds[0] in _LISTS else _described_convolution(kinds[0], module)


def _described_convolution(kind: str, module: Any) -> dict[str, Any]:
    geometry = {name: _plain(getattr(module, name)) for name in _GEOMETRY}
    return {
        "kind": kind,
        "in": module.in_channels,
        "out": module.out_channels,
        "groups": module.groups,
        "mode": module.padding_mode,
        **geometry,
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _module(entry: Mapping[str, Any]) -> nn.Module:
    """An empty module of the kind; its tensors are registered after."""
    kind = entry.get("kind")
    with torch.device("meta"):
        if kind == "linear":
            return _bare(nn.Linear(entry["in"], entry["out"]))
        if kind == "gpt2":
            return SkeletonConv1D(entry["out"], entry["in"])
        if kind == "embedding":
            # Given a weight it draws none: on the meta device, drawing imports torch's compiler.
            weight = torch.empty(entry["in"], entry["out"])
            return _bare(nn.Embedding.from_pretrained(weight, padding_idx=entry["padding"]))
        if kind == "attention":
            return _bare(nn.MultiheadAttention(entry["width"], 1))
        if kind in _CONVOLUTIONS:
            return _bare(_convolution(entry))
        return MatrixHolder(entry["transposed"]) if kind == "matrices" else _LISTS.get(str(kind), nn.Module)()


def _convolution(entry: Mapping[str, Any]) -> nn.Module:
    geometry = {k: tuple(entry[k]) if isinstance(entry[k], list) else entry[k] for k in _GEOMETRY}
    return _CONVOLUTIONS[entry["kind"]](
        entry["in"], entry["out"], groups=entry["groups"], padding_mode=entry["mode"], **geometry
    )


def _bare(module: nn.Module) -> nn.Module:
    for name in list(module._parameters):
        module.register_parameter(name, None)
    return module


def _attach(root: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    _owner(root, owner).add_module(leaf, module)


def _owner(root: nn.Module, path: str) -> nn.Module:
    """The module at a path; one that ``named_modules`` left out (it goes by several paths) becomes a plain module."""
    here = root
    for part in path.split(".") if path else ():
        child = here._modules.get(part)
        if child is None:
            child = nn.Module()
            here.add_module(part, child)
        here = child
    return here


def _tensor(name: str, entry: Mapping[str, Any], values: Mapping[str, Tensor]) -> Tensor:
    dtype = getattr(torch, entry["dtype"])
    assert isinstance(dtype, torch.dtype)
    value = values.get(name)
    if value is None:
        value = torch.empty(tuple(entry["shape"]), dtype=dtype, device="meta")
    return value if entry.get("buffer") else _parameter(entry.get("packed"))(value, requires_grad=False)


def _parameter(packed: object) -> Callable[..., nn.Parameter]:
    """The class of a parameter; one that stands for a quantised weight is of a class of that name, as sites tell it."""
    return nn.Parameter if packed is None else type(str(packed), (nn.Parameter,), {})


def _embeddings(model: nn.Module) -> dict[str, str]:
    """Which embedding -> its path, as far as the model tells."""
    found = {}
    for role, getter in _ROLES.items():
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        paths = [path for path, candidate in model.named_modules() if module is not None and candidate is module]
        if paths:
            found[role] = paths[0]
    return found
