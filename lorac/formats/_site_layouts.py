"""Sites as JSON: what an adapter remembers of the places it came from.

A file of PEFT's keeps a convolution's kernel four-dimensional and an embedding under other names,
so writing one needs to know more of a site than the adapter's matrices tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import nn

from lorac.errors import BaseNeeded
from lorac.frontend.model_view import ModelView
from lorac.ir.sites import ConvGeometry, Site, SiteKind
from lorac.variants.adapter import Adapter

LAYOUT = "layout"
"""Key of `Adapter.provenance` under which the sites are kept: path -> `describe(site)`."""


def site_to_json(site: Site) -> dict[str, Any]:
    """A site's layout as JSON: kind, out and in features, transposed, within, channels, kernel, groups."""
    described: dict[str, Any] = {
        "kind": str(site.kind),
        "out": site.out_features,
        "in": site.in_features,
        "transposed": site.transposed,
    }
    if site.stack:
        described["stack"] = site.stack
    if site.within is not None:
        described["within"] = site.within
    if site.conv is not None:
        described |= {
            "channels": site.conv.channels,
            "kernel": list(site.conv.kernel),
            "groups": site.conv.groups,
        }
    return described


def is_site_json(described: Mapping[str, Any]) -> bool:
    """Whether a value of a file is what `describe` gives."""
    sizes = {"out": described.get("out"), "in": described.get("in"), "stack": described.get("stack", 1)}
    if "kernel" in described:
        kernel = described["kernel"]
        if not isinstance(kernel, list) or not 1 <= len(kernel) <= 3:
            return False
        sizes |= {"channels": described.get("channels"), "groups": described.get("groups")}
        sizes |= {f"kernel {axis}": size for axis, size in enumerate(kernel)}
    whole = all(type(size) is int and size > 0 for size in sizes.values())
    return whole and described.get("kind") in set(SiteKind) and isinstance(described.get("transposed"), bool)


def site_from_json(path: str, described: Mapping[str, Any]) -> Site:
    """A site with the layout that `describe` gave; strides, weights and dtype are not known."""
    conv = None
    if "kernel" in described:
        conv = open_geometry(described["channels"], tuple(described["kernel"]), described["groups"])
    return Site(
        path=path,
        kind=SiteKind(described["kind"]),
        out_features=described["out"],
        in_features=described["in"],
        dtype=torch.float32,
        weight=None,
        transposed=described["transposed"],
        stack=described.get("stack", 0),
        within=described.get("within"),
        conv=conv,
    )


def conv_site(path: str, out: int, channels: int, kernel: tuple[int, ...], groups: int) -> Site:
    """A convolution of which only the kernel is known."""
    return Site(
        path=path,
        kind=(SiteKind.CONV1D, SiteKind.CONV2D, SiteKind.CONV3D)[len(kernel) - 1],
        out_features=out,
        in_features=channels * prod(kernel),
        dtype=torch.float32,
        weight=None,
        conv=open_geometry(channels, kernel, groups),
    )


def matrix_site(path: str, out: int, columns: int, kind: SiteKind = SiteKind.LINEAR) -> Site:
    """A linear or embedding of which only the shape is known."""
    return Site(path=path, kind=kind, out_features=out, in_features=columns, dtype=torch.float32, weight=None)


def open_geometry(channels: int, kernel: tuple[int, ...], groups: int) -> ConvGeometry:
    """A convolution's geometry with stride and dilation left open."""
    ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
    return ConvGeometry(channels, kernel, stride=ones, padding=zeros, dilation=ones, groups=groups)


def same_layout(one: Site, other: Site) -> bool:
    """Whether a file of one site's layout fits the other; what no file tells does not count."""
    return _layout_key(one) == _layout_key(other)


def adapter_sites(adapter: Adapter, model: nn.Module | None) -> dict[str, Site]:
    """The adapter's sites, from the model or from what the adapter remembers, in the adapter's order.

    Raises:
        BaseNeeded: The adapter remembers nothing, and no model was given.
    """
    if model is not None:
        sites = ModelView.of(model).sites
        return {path: sites[path] for path in adapter.tensors}
    known = adapter.provenance.get(LAYOUT, {})
    unknown = [path for path in adapter.tensors if path not in known]
    if unknown:
        raise BaseNeeded(
            f"the layout of '{unknown[0]}' is not known: adapter '{adapter.name}' comes from no file",
            next_step="pass model=, or use format='native'",
        )
    return {path: site_from_json(path, known[path]) for path in adapter.tensors}


def _layout_key(site: Site) -> tuple[object, ...]:
    groups = site.conv.groups if site.conv else 1
    return (site.kind, *site.kernel, groups)
