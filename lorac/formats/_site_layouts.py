"""Layouts of sites as JSON: the part of each site that an adapter records.

A PEFT file stores the kernel of a convolution with four axes, and the factors of an embedding under other names, so
writing it needs layouts that the adapter's matrices do not show.
"""

import dataclasses
from math import prod

import torch

from lorac.argument_types import JsonMapping
from lorac.errors import BaseNeeded
from lorac.ir.sites.site import ConvGeometry, Site, SiteKind
from lorac.variants.adapter import Adapter

LAYOUT = "layout"
"""Key of ``Adapter.provenance`` for the sites: path -> ``site_to_json(site)``."""
_KINDS = [*SiteKind]


def site_to_json(site: Site) -> dict[str, object]:
    """Return the layout of a site as JSON: kind, out and in features, transposed, within, channels, kernel, groups."""
    layout: dict[str, object] = {
        "kind": str(site.kind),
        "out": site.out_features,
        "in": site.in_features,
        "transposed": site.transposed,
    }
    if site.stack:
        layout["stack"] = site.stack
    if site.within is not None:
        layout["within"] = site.within
    if site.conv is not None:
        layout |= {"channels": site.conv.channels, "kernel": list(site.conv.kernel), "groups": site.conv.groups}
    return layout


def is_site_json(layout: JsonMapping) -> bool:
    """Return whether a value has the form that ``site_to_json`` returns."""
    sizes = {"out": layout.get("out"), "in": layout.get("in"), "stack": layout.get("stack", 1)}
    if "kernel" in layout:
        kernel = layout["kernel"]
        if not isinstance(kernel, list) or not 1 <= len(kernel) <= 3:
            return False
        sizes |= {"channels": layout.get("channels"), "groups": layout.get("groups")}
        sizes |= {f"kernel {axis}": size for axis, size in enumerate(kernel)}
    whole = all(type(size) is int and size > 0 for size in sizes.values())
    return whole and layout.get("kind") in _KINDS and isinstance(layout.get("transposed"), bool)


def site_from_json(path: str, layout: JsonMapping) -> Site:
    """Return the site that a layout describes, without stride, weight and dtype, which a layout does not have."""
    if "kernel" in layout:
        return conv_site(path, layout["out"], layout["channels"], tuple(layout["kernel"]), layout["groups"])
    site = matrix_site(path, layout["out"], layout["in"], SiteKind(layout["kind"]))
    rest = {name: layout[name] for name in ("transposed", "stack", "within") if name in layout}
    return dataclasses.replace(site, **rest)


def conv_site(path: str, out: int, channels: int, kernel: tuple[int, ...], groups: int) -> Site:
    """Return a convolution site with a known kernel, and with placeholders for stride, padding and dilation."""
    ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
    return Site(
        path=path,
        kind=(SiteKind.CONV1D, SiteKind.CONV2D, SiteKind.CONV3D)[len(kernel) - 1],
        out_features=out,
        in_features=channels * prod(kernel),
        dtype=torch.float32,
        weight=None,
        conv=ConvGeometry(channels, kernel, stride=ones, padding=zeros, dilation=ones, groups=groups),
    )


def matrix_site(path: str, out: int, columns: int, kind: SiteKind = SiteKind.LINEAR) -> Site:
    """Return a linear or embedding site of which only the shape is known."""
    return Site(path=path, kind=kind, out_features=out, in_features=columns, dtype=torch.float32, weight=None)


def same_layout(site: Site, other: Site) -> bool:
    """Return whether two sites agree in everything that a file's layout shows."""
    first, second = ((one.kind, *one.kernel, one.conv.groups if one.conv else 1) for one in (site, other))
    return first == second


def remembered_sites(adapter: Adapter) -> dict[str, Site]:
    """Return the sites of an adapter from the layouts that it recorded when it was read, in the order of its tensors.

    Raises:
        BaseNeeded: the adapter was not read from a file.
    """
    layouts = adapter.provenance.get(LAYOUT, {})
    unknown = [path for path in adapter.tensors if path not in layouts]
    if unknown:
        raise BaseNeeded(
            f"the layout of '{unknown[0]}' is not known: adapter '{adapter.name}' was not read from a file",
            next_step="pass model=, or use format='native'",
        )
    return {path: site_from_json(path, layouts[path]) for path in adapter.tensors}
