"""SHiRA's two measures of orthogonality: worked by hand, and on adapters of several methods."""

import math

import torch
from torch import nn

import lorac
from lorac.analysis.orthogonality import Orthogonality, adapter_orthogonality, orthogonality
from lorac.testing import assert_close
from lorac.variants import shira
from tests.refusing import refuses


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def row_of_ones(size, row):
    """The identity with one row all ones."""
    A = torch.eye(size, dtype=torch.float64)
    A[row] = 1
    return A


def test_worked_example():
    """A₁ᵀA₂ = I + S₂ + S₁ᵀ: 8 + 7 + 7 entries of 1, two of which meet in one of 2: 21, and √(20 + 4)."""
    first, second = row_of_ones(8, 0), row_of_ones(8, 1)
    eye = torch.eye(8, dtype=torch.float64)
    assert torch.equal(first.t() @ second, eye + (second - eye) + (first - eye).t())
    found = orthogonality(first, second)
    assert found.ratio == 0.671875
    assert found.magnitude == math.sqrt(24)


def test_updates_of_other_outputs_are_orthogonal():
    first, second = torch.zeros(6, 4), torch.zeros(6, 4)
    first[:3], second[3:] = 1, 1
    assert orthogonality(first, second) == Orthogonality(0.0, 1.0)
    assert orthogonality(first, first) == Orthogonality(12.0, 0.0)


class Host(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(10, 12), nn.Linear(12, 10)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


@torch.no_grad()
def drawn(model, name, variant):
    adapter = lorac.compile(model, {name: variant}).adapters[name]
    for tensor in adapter.parameters():
        if tensor.is_floating_point():
            tensor.normal_()
    return adapter


def test_struct_masks_of_other_rows_keep_apart_but_for_the_diagonal():
    """Rows 0, 5 and 10, or 2 and 7, of 12 and the diagonal: a row of one meets the diagonal of the other."""
    model = Host()
    masks = {"a": shira.struct_mask(5), "b": shira.struct_mask(5, 2), "c": shira.struct_mask(5)}
    a, b, c = (drawn(model, n, lorac.SHiRA(mask=m, targets=("one",))) for n, m in masks.items())
    apart, alike = (adapter_orthogonality(a, other, model)["one"] for other in (b, c))
    # Of 10 columns: row 10 meets nothing.
    whole = torch.eye(10, dtype=torch.bool)
    whole[:, [0, 5]], whole[[2, 7]] = True, True
    assert apart.ratio == 1 - int(whole.sum()) / 100
    assert alike.ratio == 0
    assert alike.magnitude > apart.magnitude > 0


def test_every_method_that_edits_weights_is_measured_where_both_are():
    model = Host()
    lora = drawn(model, "a", lorac.LoRA(r=2, alpha=6, targets=("one", "two")))
    sparse = drawn(model, "b", lorac.SHiRA(r=1, targets=("two",)))
    found = adapter_orthogonality(lora, sparse, model)
    assert list(found) == ["two"]
    p, s = lora.tensors["two"], sparse.tensors["two"]
    update = torch.zeros(10, 12, dtype=torch.float64)
    update[tuple(s["indices"])] = s["values"].double()
    product = (3 * p["lora_B"].double() @ p["lora_A"].double()).t() @ update
    assert_close(number(found["two"].magnitude), product.norm())
    assert found["two"].ratio == 1 - int((product != 0).sum()) / 144


def test_the_adapters_patterns_count():
    model = Host()
    variant = lorac.LoRA(r=2, alpha=2, alpha_pattern={"two": 10}, targets=("one", "two"))
    a, b = (drawn(model, n, variant) for n in "ab")
    found = adapter_orthogonality(a, b, model)
    for path, scale in (("one", 1), ("two", 5)):
        first, second = (
            scale * x["lora_B"].double() @ x["lora_A"].double() for x in (a.tensors[path], b.tensors[path])
        )
        assert_close(number(found[path].magnitude), (first.t() @ second).norm())


def test_refusals():
    model = Host()
    lora = drawn(model, "a", lorac.LoRA(r=2, targets=("one",)))
    with refuses("site_not_found", match="'a' and 'b' adapt no site in common"):
        adapter_orthogonality(lora, drawn(model, "b", lorac.LoRA(r=2, targets=("two",))), model)
    routed = drawn(model, "c", lorac.MeteoRA(targets=("one",)))
    with refuses("not_mergeable", match=r"'c' \(meteora\) does not edit the weight of 'one'"):
        adapter_orthogonality(lora, routed, model)
    with refuses("shape_mismatch", match=r"\[3, 4\] and \[4, 3\]"):
        orthogonality(torch.ones(3, 4), torch.ones(4, 3))
