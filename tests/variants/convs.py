"""Convolutions of many geometries to adapt, and the result of each from the whole matrix of a kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lorac.ir.sites.site import CONVOLUTION_KINDS
from lorac.testing import Host
from lorac.testing.models import chain_layers

_MODULES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_APPLY = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def conv_host(name, channels, out, kernel, sizes, **geometry):
    """A host that is one convolution; its matrix is applied as that of an ungrouped one, zeros between groups."""
    axes = len(sizes)

    def apply(x, weight, bias):
        rows = torch.from_numpy(weight).reshape(
            out, channels, *((kernel,) * axes if isinstance(kernel, int) else kernel)
        )
        rest = {key: value for key, value in geometry.items() if key != "groups"}
        return _APPLY[axes](torch.from_numpy(x), rows, torch.from_numpy(bias), **rest).numpy()

    return Host(
        name,
        CONVOLUTION_KINDS[axes],
        lambda: chain_layers(site=_MODULES[axes](channels, out, kernel, **geometry)),
        (channels, *sizes),
        apply,
        batches=((3,), ()),
    )


SQUARE = (
    conv_host("plain", 3, 8, 3, (6, 5)),
    conv_host("strided", 3, 8, 3, (6, 5), stride=2, padding=1),
    conv_host("dilated", 3, 8, 3, (8, 7), dilation=2, padding=2),
    conv_host("far", 3, 8, 3, (10, 9), dilation=4, padding=(4, 3), stride=(2, 1)),
    conv_host("even", 4, 6, 2, (5, 4)),
    conv_host("one", 5, 4, 1, (3, 4)),
    conv_host("line", 3, 8, 3, (9,), stride=2, padding=1, dilation=2),
    conv_host("volume", 2, 5, 3, (5, 4, 6), stride=(2, 1, 1), padding=1, dilation=(1, 1, 2)),
)
OBLONG = (
    conv_host("oblong", 3, 8, (2, 3), (6, 5), stride=(1, 2), dilation=(2, 1)),
    conv_host("oblong volume", 2, 5, (1, 3, 2), (3, 5, 4), padding=(0, 1, 1)),
)
GROUPED = (
    conv_host("grouped", 4, 6, 3, (6, 5), groups=2, padding=1),
    conv_host("depthwise", 4, 8, 3, (8, 7), groups=4, dilation=2, stride=2),
    conv_host("grouped volume", 4, 6, 2, (3, 4, 5), groups=2),
)
