"""Parameters that are adapted by their own names (``target_parameters``): matrices and stacks of them, layers' weights.

Source: peft.tuners.lora.layer.ParamWrapper of PEFT 0.21. Per parameter, with E matrices (1 where it is no stack):

    lora_A (E·r, in)    the matrices' A (r, in), one below the other
    lora_B (out, r·E)   the columns of the matrices' B (out, r), those of one rank beside each other

A matrix by itself is (out, in) whatever its module makes of it: of an embedding (V, d), out is V. A layer that is
adapted by its weight's name is the same as one that is targeted, and is written so; but for an attention's packed
projection by itself, which PEFT knows under no other name.

Keys name the module, not the parameter: PEFT wraps it once for each of its parameters that are adapted, in their order,
so that the last stands outermost, and those before it under ``base_layer``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from lorac.errors import AdapterError, BaseNeeded, FormatError
from lorac.formats.peft.keys import WRAPPED, FileContents
from lorac.formats.peft.peft_type import Tensors
from lorac.frontend.model_view import ModelView
from lorac.ir.patterns import is_named
from lorac.ir.sites import Site, SiteKind
from lorac.variants.adapter import Adapter

Tensor = torch.Tensor
_A, _B = "lora_A.weight", "lora_B.weight"


def take_matrices(
    name: str, contents: FileContents, parameters: Sequence[str], model: nn.Module | None
) -> dict[str, dict[str, Tensor]]:
    """Take the tensors of matrices out of a file's sites.

    Args:
        name: the adapter's, for messages.
        contents: the file's; loses them.
        parameters: ``target_parameters``.
        model: the base.

    Returns:
        Site path -> tensors by parameter; of what the file lacks there are none.

    Raises:
        BaseNeeded: there is no model.
        AdapterError: tensors do not belong together, or to so many matrices.
    """
    if not parameters:
        return {}
    if model is None:
        raise BaseNeeded(
            f"the file of adapter '{name}' has target_parameters, and does not tell which tensors are of which",
            next_step="pass model=",
        )
    sites = ModelView.of(model).sites
    places = _places(_named(sites, parameters))
    return {path: _read(sites[path], contents.sites.pop(key)) for key, path in places.items() if key in contents.sites}


def matrix_paths(sites: Mapping[str, Site]) -> set[str]:
    """Paths of the sites of an adapter that PEFT has no layer for, so that only their parameters' names name them."""
    owners = [site.within for site in sites.values()]
    alone = {path for path, site in sites.items() if site.within == path and owners.count(path) == 1}
    return alone | {path for path, site in sites.items() if site.kind is SiteKind.MATRIX}


def write_matrices(
    adapter: Adapter, own: Collection[str], sites: Mapping[str, Site], model: nn.Module | None
) -> dict[str, Tensor]:
    """The tensors of an adapter's matrices as a file has them, by key without PEFT's prefix.

    Args:
        adapter: whose tensors.
        own: paths of the matrices (``without_layer``).
        sites: the adapter's.
        model: the base.

    Raises:
        BaseNeeded: there are some, and no model.
        FormatError: the method has dropout, of which PEFT has none there.
    """
    if not own:
        return {}
    first = next(path for path in sites if path in own)
    if model is None:
        raise BaseNeeded(
            f"what PEFT calls the tensors of '{first}' depends on the other parameters of its module",
            next_step="pass model=, or use format='native'",
        )
    if getattr(adapter.variant, "dropout", 0):
        raise FormatError(
            f"PEFT has no dropout at '{first}', which its module multiplies by itself, and adapter "
            f"'{adapter.name}' has one",
            next_step="set dropout=0.0 before saving, or use format='native'",
            code="unsupported_field",
        )
    places = _places([site for path, site in ModelView.of(model).sites.items() if path in own])
    return {
        f"{key}.{suffix}": tensor
        for key, path in places.items()
        for suffix, tensor in _write(sites[path], adapter.tensors[path]).items()
    }


def target_parameters(given: Sequence[str], own: Collection[str], sites: Mapping[str, Site]) -> tuple[str, ...]:
    """What names exactly the adapter's own matrices: as given if that does, else their parameters' names."""
    named = {site.path for site in _named(sites, given)}
    return tuple(given) if named == set(own) else tuple(sorted(str(sites[path].weight) for path in own))


def _named(sites: Mapping[str, Site], parameters: Sequence[str]) -> list[Site]:
    return [site for site in sites.values() if is_named(tuple(parameters), str(site.weight))]


def _places(sites: Sequence[Site]) -> dict[str, str]:
    """What stands before the suffix in keys -> the site's path.

    Args:
        sites: in the model's order.
    """
    wrapped: dict[str, list[str]] = defaultdict(list)
    for site in sites:
        wrapped[str(site.weight).rpartition(".")[0]].append(site.path)
    return {
        owner + f".{WRAPPED}" * depth: path
        for owner, paths in wrapped.items()
        for depth, path in enumerate(reversed(paths))
    }


def _read(site: Site, stored: Tensors) -> dict[str, Tensor]:
    if stored.keys() != {_A, _B}:
        raise _misfit(site, stored)
    a, b = stored[_A], stored[_B]
    count = max(site.stack, 1)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] % count:
        raise _misfit(site, stored)
    if not site.stack:
        turned = site.kind is SiteKind.EMBEDDING or site.transposed
        return {"lora_A": b.t(), "lora_B": a.t()} if turned else {"lora_A": a, "lora_B": b}
    rank = a.shape[0] // count
    return {"lora_A": a.unflatten(0, (count, rank)), "lora_B": b.unflatten(1, (rank, count)).permute(2, 0, 1)}


def _write(site: Site, tensors: Tensors) -> dict[str, Tensor]:
    a, b = tensors["lora_A"], tensors["lora_B"]
    return {_A: a.flatten(0, 1), _B: b.permute(1, 2, 0).flatten(1)} if site.stack else {_A: a, _B: b}


def _misfit(site: Site, stored: Tensors) -> AdapterError:
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in stored.items())
    matrices = f"{site.stack} matrices" if site.stack else "a matrix"
    return AdapterError(
        f"the tensors at '{site.path}', {matrices} {site.in_features} -> {site.out_features}, are no adapter of it: "
        f"{shapes}",
        next_step="lora_A is (E·r, in), lora_B (out, r·E); load the base model that the adapter was trained on",
        code="shape_mismatch",
    )
