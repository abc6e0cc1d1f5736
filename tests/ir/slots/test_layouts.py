"""Sites of each kind: their base is the module's, and their low-rank half is the merged delta."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorac
from lorac.ir.slots.layouts import layout_of
from lorac.testing import assert_close

CASES = {
    "linear": (lambda: nn.Linear(5, 7), (2, 3, 5)),
    "no bias": (lambda: nn.Linear(5, 7, bias=False), (5,)),
    "transposed": (lambda: Conv1D(7, 5), (4, 5)),
    "embedding": (lambda: nn.Embedding(13, 6, padding_idx=3), None),
    "conv1d": (lambda: nn.Conv1d(3, 8, 5, stride=2, padding=2), (2, 3, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 3, 7, 6)),
    "unbatched": (lambda: nn.Conv2d(3, 8, 3), (3, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 3, padding=1), (1, 2, 4, 5, 3)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1), (2, 6, 5, 4)),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def made(request):
    make, shape = request.param
    model = nn.ModuleDict({"site": make()}).double()
    site = lorac.sites(model)["site"]
    x = torch.randint(13, (2, 4)) if shape is None else torch.randn(shape, dtype=torch.float64)
    return site, layout_of(site), model["site"], x


@torch.no_grad()
def test_base_is_the_modules_own(made):
    site, layout, module, x = made
    bias = module.bias if site.bias else None
    assert_close(layout.base(x, module.weight, bias), module(x))


@torch.no_grad()
def test_bound_weight_in_slot_layout(made):
    site, layout, module, x = made
    matrix = site.present(module.weight)
    bias = torch.randn(site.out_features, dtype=torch.float64)
    slot = layout.slot_weight(matrix)
    no_bias = layout.base(x, module.weight, None)
    assert_close(layout.bound(x, slot, None), no_bias)
    assert_close(layout.bound(x, slot, bias), no_bias + layout.per_output(bias))


@torch.no_grad()
def test_the_two_halves_are_the_merged_delta(made):
    site, layout, module, x = made
    a = torch.randn(site.in_features, 3, dtype=torch.float64)
    b = torch.randn(3, site.out_features, dtype=torch.float64)
    half = layout.up(layout.down(x, layout.slot_a(a)), layout.slot_b(b))
    dense = (a @ b).t()
    if site.conv is not None:
        # PEFT's rule: A mixes all channels, whatever the base's groups.
        convolve = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[len(site.conv.kernel)]
        conv = site.conv
        expected = convolve(x, dense.reshape(site.kernel), None, conv.stride, conv.padding, conv.dilation)
    else:
        stored = site.store(site.present(module.weight) + dense)
        expected = layout.base(x, stored, None) - layout.base(x, module.weight, None)
    assert_close(half, expected)


@torch.no_grad()
def test_vectors_broadcast_over_outputs_ranks_and_inputs(made):
    site, layout, module, x = made
    y = layout.base(x, module.weight, None)
    scale = torch.randn(site.out_features, dtype=torch.float64)
    scaled = layout.base(x, site.store(site.present(module.weight) * scale[:, None]), None)
    assert_close(y * layout.per_output(scale), scaled)
    a = torch.randn(site.in_features, 3, dtype=torch.float64)
    ranks = torch.randn(3, dtype=torch.float64)
    down = layout.down(x, layout.slot_a(a))
    assert_close(down * layout.per_rank(ranks), layout.down(x, layout.slot_a(a * ranks)))
    if layout.has_input_axis:
        columns = layout.per_input(torch.linspace(1, 2, site.in_features).double())
        by_columns = site.store(site.present(module.weight) * columns)
        assert_close(layout.base(x * columns, module.weight, None), layout.base(x, by_columns, None))
        blocks = torch.randn(1, site.in_features, site.in_features, dtype=torch.float64)
        turned = site.store(site.present(module.weight) @ blocks[0].t())
        assert_close(layout.base(layout.through(x, blocks), module.weight, None), layout.base(x, turned, None))
