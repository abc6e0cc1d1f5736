"""Modules that become sites because an adapter names them: a norm, an attention, an MLP, a stage.

A branch at such a site reads the module's input and output, which are the first tensors of each. Their widths are
inferred from the module's structure, never from the model family, so that a skeleton gives the same result as the
model:

1. the scale of a norm, a vector called ``weight``, has its width;
2. a module whose first layer takes the width that its last layer returns maps that width to itself, whether or not its
   norms count as layers;
3. a module that begins with an embedding takes ids, and returns the width of its last layer;
4. if each layer takes the width that the previous layer returns, the first and the last give the widths;
5. a module next to norms of one width, which takes or returns that width, maps it to itself.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorac.errors import SiteError
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.site import Site, SiteKind


@dataclass(frozen=True)
class _LayerWidths:
    """Widths and dtype of a submodule that has a weight."""

    takes: int
    returns: int
    dtype: torch.dtype
    norm: bool = False
    ids: bool = False


def make_module_sites(paths: Iterable[str], view: ModelView) -> dict[str, Site]:
    """Make a site for each of the given modules.

    Raises:
        SiteError: the widths of a module cannot be inferred from its structure.
    """
    return {path: make_module_site(path, view) for path in paths}


def make_module_site(path: str, view: ModelView) -> Site:
    """Make a site for a module.

    Raises:
        SiteError: the module's widths cannot be inferred from its structure.
    """
    found = infer_module_site(path, view)
    if found is not None:
        return found
    layers = list(_iter_layers(path, view))
    ends = f" (the first takes {layers[0].takes}, the last returns {layers[-1].returns})" if layers else " (none found)"
    kind = type(view.module.get_submodule(path)).__name__
    raise SiteError(
        f"the widths of the input and the output of '{path}', a {kind}, cannot be inferred from its structure; looked "
        f"for: the scale of a norm, layers inside that begin and end with one width or follow each other{ends}, and "
        "norms of that width next to it",
        next_step="name the module around it, or one inside it, in targets=; `lorac sites MODEL` prints its layers",
    )


def infer_module_site(path: str, view: ModelView) -> Site | None:
    """Return the site for a module; None if its widths cannot be inferred from its structure."""
    layers = list(_iter_layers(path, view))
    widths = _infer_widths(path, layers, view.module)
    if widths is None:
        return None
    takes, returns = widths
    return Site(path, SiteKind.BLOCK, returns, takes, layers[0].dtype, weight=None, named=True)


def _iter_layers(path: str, view: ModelView) -> Iterator[_LayerWidths]:
    """Yield the submodules that have a weight, including the module itself, in module order."""
    sites = view.sites
    for name, module in view.module.get_submodule(path).named_modules(prefix=path):
        # A module without a site may multiply by matrices in its own forward (stacks of experts).
        matrices = (f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False))
        inside = [sites[name]] if name in sites else [sites[matrix] for matrix in matrices if matrix in sites]
        for site in (site for site in inside if site.kind not in {SiteKind.BLOCK, SiteKind.PARAMETER}):
            takes = site.in_features if site.conv is None else site.conv.channels
            yield _LayerWidths(takes, site.out_features, site.dtype, ids=site.kind is SiteKind.EMBEDDING)
        width = _norm_width(module)
        if width is not None:
            yield _LayerWidths(width, width, module.get_parameter("weight").dtype, norm=True)


def _norm_width(module: nn.Module) -> int | None:
    """Return the length of a norm's scale."""
    weight = module._parameters.get("weight")
    return len(weight) if isinstance(weight, torch.Tensor) and weight.dim() == 1 else None


def _infer_widths(path: str, layers: Sequence[_LayerWidths], model: nn.Module) -> tuple[int, int] | None:
    """Return (input width, output width) inferred from a module's layers or from the norms next to it, or None."""
    plain = [layer for layer in layers if not layer.norm]
    plain = [*plain[:1], *(layer for layer in plain[1:] if not layer.ids)]  # without tables of positions
    for counted in (plain, layers):
        if counted and counted[0].takes == counted[-1].returns:
            return counted[0].takes, counted[-1].returns
    if not plain:
        return None
    if plain[0].ids:
        return plain[0].takes, layers[-1].returns
    if all(before.returns == layer.takes for before, layer in itertools.pairwise(plain)):
        return plain[0].takes, plain[-1].returns
    parent = model.get_submodule(path.rpartition(".")[0])
    around = {width for module in parent.children() if (width := _norm_width(module)) is not None}
    alike = len(around) == 1 and around <= {plain[0].takes, plain[-1].returns}
    return (min(around), min(around)) if alike else None
