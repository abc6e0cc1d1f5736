"""Modules that become sites because somebody names them: a norm, an attention, an MLP, a stage; never by model family.

A branch there reads what the module takes and gives, as the first tensor of each. How wide these are is read off the
module's structure, so that a skeleton of the model tells the same as the model:

1. the scale of a norm, a vector called ``weight``, has its width;
2. a module whose first layer takes as much as its last one gives maps that width to itself, be its norms counted as
   layers or not;
3. one that begins with an embedding takes ids, and gives what its last layer gives;
4. of layers each of which takes what the one before gives, the first and the last tell;
5. what stands beside norms of one width, and takes or gives that, maps it to itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lorac.errors import SiteError
from lorac.ir.sites import Site, SiteKind

_UNCALLED = (nn.ModuleList, nn.ModuleDict)
"""What only holds others: nobody calls it."""


@dataclass(frozen=True)
class _LayerWidths:
    """What of a module holds a weight: how wide its input and output are, and of which dtype it is."""

    takes: int
    gives: int
    dtype: torch.dtype
    norm: bool = False
    ids: bool = False


def list_callable_paths(model: nn.Module) -> list[str]:
    """Paths of the modules that are called, the model itself left out."""
    return [path for path, module in model.named_modules() if path and not isinstance(module, _UNCALLED)]


def make_module_sites(paths: Iterable[str], model: nn.Module, sites: Mapping[str, Site]) -> dict[str, Site]:
    """The sites that these modules become.

    Raises:
        SiteError: the structure of one does not tell how wide its input and output are.
    """
    return {path: make_module_site(path, model, sites) for path in paths}


def make_module_site(path: str, model: nn.Module, sites: Mapping[str, Site]) -> Site:
    """The site that one module becomes.

    Args:
        path: its path.
        model: the model, or its skeleton.
        sites: every other site of the model (``find_sites``).

    Raises:
        SiteError: its structure does not tell how wide its input and output are.
    """
    found = infer_module_site(path, model, sites)
    if found is not None:
        return found
    layers = list(_layers(path, model, sites))
    seen = f" (the first takes {layers[0].takes}, the last gives {layers[-1].gives})" if layers else " (there are none)"
    raise SiteError(
        f"how wide the input and the output of '{path}', a {type(model.get_submodule(path)).__name__}, are is not told "
        f"by its structure; looked for: the scale of a norm, layers inside that begin and end with one width or follow "
        f"each other{seen}, and norms of that width beside it",
        next_step="name the module around it, or one inside it, in targets=; `lorac sites MODEL` prints its layers",
        code="site_unsupported",
    )


def infer_module_site(path: str, model: nn.Module, sites: Mapping[str, Site]) -> Site | None:
    """As ``module_site``; None where the structure does not tell."""
    layers = list(_layers(path, model, sites))
    widths = _infer_widths_from_layers(layers) or _infer_widths_from_norms(path, layers, model)
    if widths is None:
        return None
    takes, gives = widths
    return Site(path, SiteKind.BLOCK, gives, takes, layers[0].dtype, weight=None, named=True)


def _layers(path: str, model: nn.Module, sites: Mapping[str, Site]) -> Iterator[_LayerWidths]:
    """What of a module, itself included, holds a weight, in the order of the modules."""
    for name, module in model.get_submodule(path).named_modules(prefix=path):
        inside = [sites[name]] if name in sites else _find_own_matrices(name, module, sites)
        for site in (site for site in inside if site.kind not in {SiteKind.BLOCK, SiteKind.PARAMETER}):
            takes = site.in_features if site.conv is None else site.conv.channels
            yield _LayerWidths(takes, site.out_features, site.dtype, ids=site.kind is SiteKind.EMBEDDING)
        width = _norm_width(module)
        if width is not None:
            yield _LayerWidths(width, width, module.get_parameter("weight").dtype, norm=True)


def _find_own_matrices(name: str, module: nn.Module, sites: Mapping[str, Site]) -> list[Site]:
    """The matrices that a module multiplies by itself, experts' stacks for one."""
    own = (f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False))
    return [sites[path] for path in own if path in sites]


def _norm_width(module: nn.Module) -> int | None:
    """The length of a norm's scale."""
    weight = module._parameters.get("weight")
    return len(weight) if isinstance(weight, torch.Tensor) and weight.dim() == 1 else None


def _infer_widths_from_layers(layers: Collection[_LayerWidths]) -> tuple[int, int] | None:
    """(takes, gives) by the layers of a module alone."""
    plain = _plain(layers)
    for counted in (plain, list(layers)):
        if counted and counted[0].takes == counted[-1].gives:
            return counted[0].takes, counted[-1].gives
    if plain and plain[0].ids:
        return plain[0].takes, list(layers)[-1].gives
    if plain and all(before.gives == layer.takes for before, layer in itertools.pairwise(plain)):
        return plain[0].takes, plain[-1].gives
    return None


def _plain(layers: Iterable[_LayerWidths]) -> list[_LayerWidths]:
    """Those that are no norms; a table looked up amid them, of positions for one, is none either."""
    plain = [layer for layer in layers if not layer.norm]
    return [*plain[:1], *(layer for layer in plain[1:] if not layer.ids)]


def _infer_widths_from_norms(path: str, layers: Collection[_LayerWidths], model: nn.Module) -> tuple[int, int] | None:
    """(takes, gives) by the norms that stand beside a module."""
    parent = model.get_submodule(path.rpartition(".")[0])
    widths = {width for module in parent.children() if (width := _norm_width(module)) is not None}
    plain = _plain(layers)
    if len(widths) != 1 or not plain:
        return None
    (width,) = widths
    return (width, width) if width in {plain[0].takes, plain[-1].gives} else None
