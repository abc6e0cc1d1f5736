"""An adapter as tensors: its factors give the result of its method's formula in NumPy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.ir.algebra.changes import Change, Dense, LowRank, Sparse
from lorac.testing import assert_close
from tests.oracles import dora, hira, ia3, lora, shira
from tests.refusing import refuses

OUT, IN = 6, 10


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.site, self.other = nn.Linear(IN, OUT), nn.Linear(IN, OUT, bias=False)
        self.norm, self.kernel = nn.LayerNorm(IN), nn.Conv2d(3, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.site(self.norm(x)) + self.other(x)  # type: ignore[no-any-return]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    return Model().double()


@torch.no_grad()
def drawn(model: nn.Module, variant: Any) -> lorac.Adapter:
    """An adapter whose every tensor has been away from its start."""
    adapter: lorac.Adapter = lorac.compile(model, {"a": variant}).adapters["a"]
    for tensor in adapter.parameters():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor))
    return adapter


def rebuilt(change: Change, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """W' and b' from the attributes that `lorac.factors` documents."""
    held = SimpleNamespace(**{k: v.numpy() for k, v in vars(change).items() if isinstance(v, Tensor)})
    moved = bias if change.e is None else bias + held.e
    if isinstance(change, Dense):
        return held.weight, moved
    if isinstance(change, Sparse):
        made = weight.copy()
        np.add.at(made, (held.rows, held.cols), held.values)
        return made, moved
    assert isinstance(change, LowRank)
    assert "t" not in change.scales
    given = {"c": np.ones(OUT), "d": np.ones(IN), "g": np.ones(change.rank), "h": np.ones(OUT)}
    given |= {letter: part.numpy() for letter, part in change.scales.items()}
    update = given["h"][:, None] * ((held.a * given["g"]) @ held.b).T
    return given["c"][:, None] * weight * given["d"] + update, moved


CASES: dict[str, tuple[Any, Any, type]] = {
    "lora": (lorac.LoRA(r=3, alpha=5, targets=["site", "other"]), lora, LowRank),
    "lora, bias": (lorac.LoRA(r=3, lora_bias=True, targets=["site"]), lora, LowRank),
    "dora": (lorac.DoRA(r=3, alpha=5, targets=["site", "other"]), dora, LowRank),
    "ia3": (lorac.IA3(targets=["site", "other"]), ia3, LowRank),
    "ia3, inputs": (lorac.IA3(feedforward=["site"], targets=["site"]), ia3, LowRank),
    "shira": (lorac.SHiRA(r=2, targets=["site"]), shira, Sparse),
    "hira": (lorac.HiRA(r=2, targets=["site"]), hira, Dense),
}


@pytest.mark.parametrize("case", CASES)
def test_the_formula_is_rebuilt(case: str, model: nn.Module) -> None:
    variant, oracle, form = CASES[case]
    adapter = drawn(model, variant)
    found = lorac.factors(adapter, model)
    assert list(found) == list(adapter.tensors)
    for path, change in found.items():
        assert isinstance(change, form)
        layer: Any = model.get_submodule(path)
        weight = layer.weight.detach().numpy()
        bias = np.zeros(OUT) if layer.bias is None else layer.bias.detach().numpy()
        p = SimpleNamespace(**{name: tensor.detach().numpy() for name, tensor in adapter.tensors[path].items()})
        made, moved = rebuilt(change, weight, bias)
        assert_close(torch.tensor(made), torch.tensor(oracle.weight(weight, p, variant)))
        expected = oracle.bias(bias, weight, p, variant) if hasattr(oracle, "bias") else bias
        assert_close(torch.tensor(moved), torch.tensor(expected))


def test_returns_the_difference_of_replaced_parameters(model: nn.Module) -> None:
    """A layer saved whole, a norm, and trained biases; beside an adapter at the same time."""
    variant = lorac.LoRA(r=2, targets=["site"], modules_to_save=["other", "norm"], bias="lora_only")
    adapter = drawn(model, variant)
    found = lorac.factors(adapter, model)
    assert list(found) == ["site", "other", "norm.weight", "norm.bias"]
    for path, name in (("other", "other.weight"), ("norm.weight",) * 2, ("norm.bias",) * 2):
        assert isinstance(found[path], Dense)
        assert torch.equal(found[path].weight, adapter.replaced[name])
    moved = found["site"].e
    assert moved is not None
    assert_close(moved, adapter.replaced["site.bias"] - model.get_parameter("site.bias"))


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "path"),
    [(lorac.LoRA(r=2, targets=["kernel"]), "kernel"), (lorac.OFT(block_size=5, targets=["site"]), "site")],
    ids=["kernel", "input transform"],
)
def test_flattened_kernels_and_transformed_inputs(variant: Any, path: str, model: nn.Module) -> None:
    adapter = drawn(model, variant)
    change = lorac.factors(adapter, model)[path]
    weight = model.get_parameter(f"{path}.weight").flatten(1)
    expected = variant.weight(weight, SimpleNamespace(**adapter.tensors[path]))
    assert isinstance(change, LowRank)
    blocks = change.scales.get("t")
    moved = weight if blocks is None else weight @ torch.block_diag(*blocks).T
    assert_close(moved + (change.a @ change.b).T, expected)


def test_returns_the_same_factors_without_the_model(model: nn.Module) -> None:
    """Without the model: the same factors, wherever they depend on nothing of the base."""
    adapter = drawn(model, lorac.LoRA(r=3, alpha=5, targets=["site", "kernel"]))
    with_model, alone = lorac.factors(adapter, model), lorac.factors(adapter)
    assert list(alone) == ["site", "kernel"]
    for path, change in alone.items():
        assert isinstance(change, LowRank)
        assert torch.equal(change.a, with_model[path].a)
        assert torch.equal(change.b, with_model[path].b)


@pytest.mark.parametrize(
    ("variant", "what"),
    [
        (lorac.DoRA(r=2, targets=["site"]), "the change of 'site' by adapter 'a'"),
        (lorac.HiRA(r=2, targets=["site"]), "the change of 'site' by adapter 'a'"),
        (lorac.LoRA(r=2, lora_bias=True, targets=["site"]), "the change of the bias of 'site' by adapter 'a'"),
        (lorac.IA3(targets=["site"]), "the shape of 'site', since the tensors of 'a' fit several"),
        (lorac.SHiRA(r=1, targets=["site"]), "the shape of 'site', since the tensors of 'a' fit several"),
        (lorac.PLP(r=2, targets=["site"]), "the shape of 'site', since the tensors of 'a' fit several"),
        (
            lorac.LoRA(r=2, targets=["site"], modules_to_save=["norm"]),
            "the site of 'norm.weight', a parameter that 'a' replaces",
        ),
    ],
    ids=["dora", "hira", "bias", "ia3", "shira", "plp", "replaced"],
)
def test_rejects_methods_that_need_the_base_without_it(variant: Any, what: str, model: nn.Module) -> None:
    adapter = drawn(model, variant)
    with pytest.raises(lorac.BaseNeeded) as raised:
        lorac.factors(adapter)
    assert raised.value.what == f"only the base tells {what}"
    assert lorac.factors(adapter, model)["site"] is not None


def test_the_dtype_of_the_factors() -> None:
    half = Model().to(torch.bfloat16)
    adapter = lorac.compile(half, {"a": lorac.LoRA(r=2, targets=["site"])}).adapters["a"]
    assert lorac.factors(adapter, half)["site"].a.dtype == torch.float32
    assert lorac.factors(adapter)["site"].a.dtype == torch.float32
    for found in (lorac.factors(adapter, half, dtype=torch.float64), lorac.factors(adapter, dtype=torch.float64)):
        assert {found["site"].a.dtype, found["site"].b.dtype} == {torch.float64}


def test_returns_factors_without_gradients_and_leaves_the_model(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = drawn(model, lorac.DoRA(r=2, targets=["site"]))
    change = lorac.factors(adapter, model)["site"]
    assert not any(tensor.requires_grad for tensor in vars(change).values() if isinstance(tensor, Tensor))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training


@torch.no_grad()
def test_refusals(model: nn.Module) -> None:
    routed = drawn(model, lorac.MeteoRA(targets=["site"]))
    for base in (model, None):
        with refuses("not_mergeable", match=r"'a' \(meteora\) does not edit the weight of 'site'"):
            lorac.factors(routed, base)
    stray = lorac.Adapter(
        "a", lorac.LoRA(r=2), {"sight": drawn(model, lorac.LoRA(r=2, targets=["site"])).tensors["site"]}
    )
    with refuses("site_not_found", match="'sight', which is not a module of the model"):
        lorac.factors(stray, model)
    stray.tensors["sight"]["lora_A"][0, 0] = torch.nan
    with refuses("non_finite", match=r"'sight\.lora_A' of adapter 'a'"):
        lorac.factors(stray)
