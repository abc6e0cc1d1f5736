"""A formula that is no pure function of torch ops is refused, with its method, the site and the line of its file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorac
from lorac import SiteKind
from lorac.testing import HOSTS, assert_close, conformance
from lorac.testing.hosts import Block
from lorac.variants import initialisers
from tests.refusing import refuses

Fault = Callable[..., Any]
FAULTS: dict[str, Fault] = {}
"""Name -> a formula over W, or y of a branch, and its own parameters."""


def fault(function: Fault) -> Fault:
    FAULTS[function.__name__] = function
    return function


@fault
def writes(base: torch.Tensor, p: Any) -> Any:
    return base.mul_(1.1)  # the line


@fault
def writes_into_a_view(base: torch.Tensor, p: Any) -> Any:
    base.view(-1)[2:].add_(1.0)  # the line
    return base


@fault
def assigns(base: torch.Tensor, p: Any) -> Any:
    base[0] = 0.0  # the line
    return base


@fault
def writes_out(base: torch.Tensor, p: Any) -> Any:
    return torch.add(base, 1.0, out=base)  # the line


@fault
def writes_into_a_parameter(base: torch.Tensor, p: Any) -> Any:
    return base + p.m.add_(1.0).sum()  # the line


@fault
def answers_nothing(base: torch.Tensor, p: Any) -> Any:
    torch.tanh(base)


@fault
def answers_a_pair(base: torch.Tensor, p: Any) -> Any:
    return base, base


@fault
def answers_another_shape(base: torch.Tensor, p: Any) -> Any:
    return base[..., :-1]


@fault
def answers_complex_numbers(base: torch.Tensor, p: Any) -> Any:
    return base.to(torch.complex64)


@fault
def answers_integers(base: torch.Tensor, p: Any) -> Any:
    return base.long()


@fault
def chooses_by_a_value(base: torch.Tensor, p: Any) -> Any:
    return base + 1 if base.sum() > 0 else base  # the line


@fault
def reads_a_value(base: torch.Tensor, p: Any) -> Any:
    return base * p.m.sum().item()  # the line


@fault
def picks_by_a_mask(base: torch.Tensor, p: Any) -> Any:
    return base * base[base > 0].sum()  # the line


@fault
def raises(base: torch.Tensor, p: Any) -> Any:
    return base + p.missing  # the line


@fault
def does_not_fit(base: torch.Tensor, p: Any) -> Any:
    return base @ p.m.view(1, -1)  # the line


@dataclass(frozen=True, kw_only=True)
class FaultyWeight(lorac.WeightVariant):
    does: str

    name: ClassVar[str] = "faulty-weight"

    def params(self, site: Any) -> dict[str, lorac.ParamSpec]:
        return {"m": lorac.ParamSpec((site.out_features,), initialisers.zeros)}

    def weight(self, W: torch.Tensor, p: Any) -> Any:
        return FAULTS[self.does](W, p)


@dataclass(frozen=True, kw_only=True)
class FaultyBranch(lorac.BranchVariant):
    does: str
    read: tuple[str, ...] = ()

    name: ClassVar[str] = "faulty-branch"
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({SiteKind.LINEAR, SiteKind.BLOCK})

    def reads(self, site: Any) -> tuple[str, ...]:
        return self.read

    def params(self, site: Any) -> dict[str, lorac.ParamSpec]:
        return {"m": lorac.ParamSpec((site.out_features,), initialisers.zeros)}

    def branch(self, x: torch.Tensor, y: torch.Tensor, p: Any, ctx: Any) -> Any:
        return FAULTS[self.does](y, p) if self.does in FAULTS else y + ctx.value(self.does).mul_(2.0)  # the line


class Net(nn.Module):
    """Two blocks between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = nn.Linear(6, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(Block(8, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.front(x)
        for block in self.blocks:
            h = block(h)
        return self.back(h)


@pytest.fixture
def net() -> Iterator[Net]:
    """A model that no formula may have changed in the end."""
    torch.manual_seed(0)
    made = Net()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    yield made
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())


def line_of(does: str, formula: Fault) -> str:
    """``file:line`` of the line that is at fault: of a wrong answer the formula's first, else the one marked so."""
    start = formula.__code__.co_firstlineno
    if does.startswith("answers"):
        return f"in {__file__}:{start}: def "
    start = FAULTS.get(does, formula).__code__.co_firstlineno
    lines = Path(__file__).read_text().splitlines()
    found = next(i for i, line in enumerate(lines[start - 1 :], start) if line.endswith("# the line"))
    return f"in {__file__}:{found}: "


@pytest.mark.parametrize("does", FAULTS)
def test_a_weight_formula(does: str, net: Net) -> None:
    with refuses("formula_failed", match="faulty-weight at 'front'") as raised:
        lorac.compile(net, {"a": FaultyWeight(does=does, targets=["front"])})
    assert line_of(does, FaultyWeight.weight) in str(raised.value)


@pytest.mark.parametrize("site", ["front", "blocks.1"])
@pytest.mark.parametrize("does", FAULTS)
def test_a_branch(does: str, site: str, net: Net) -> None:
    """Of a layer's branch it shows when compiling; of a block's in the first call, before that reads any memory."""
    x = torch.randn(3, 6)
    given = x.clone()
    with refuses("formula_failed", match=f"faulty-branch at '{site}'") as raised:
        lorac.compile(net, {"a": FaultyBranch(does=does, targets=[site])})(x)
    assert line_of(does, FaultyBranch.branch) in str(raised.value)
    assert torch.equal(x, given)


@torch.no_grad()
def test_a_blocks_branch_where_no_gradient_is_recorded(net: Net) -> None:
    x = torch.randn(3, 6)
    given = x.clone()
    with refuses("formula_failed", match="writes into y"):
        lorac.compile(net, {"a": FaultyBranch(does="writes", targets=["blocks.1"])})(x)
    assert torch.equal(x, given)


@pytest.mark.medium("one that writes", keep=["writes"])
@pytest.mark.parametrize("does", ["writes", "answers_another_shape", "chooses_by_a_value"])
def test_a_blocks_branch_in_onnxruntime(does: str, net: Net) -> None:
    variant = FaultyBranch(does=does, targets=["blocks.1"])
    with refuses("formula_failed", match=r"faulty-branch at 'blocks.1'") as raised:
        lorac.compile(net, {"a": variant}, target="onnxruntime", example_inputs=(torch.randn(3, 6),))
    assert line_of(does, FaultyBranch.branch) in str(raised.value)


def test_a_weight_formula_in_onnxruntime(net: Net) -> None:
    variant = FaultyWeight(does="writes", targets=["front"])
    with refuses("formula_failed", match="writes into W"):
        lorac.compile(net, {"a": variant}, target="onnxruntime", example_inputs=(torch.randn(3, 6),))


@pytest.mark.medium("eager, and a branch that writes", cases=["*-onnxruntime"])
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@pytest.mark.parametrize("value", ["weight:front", "base:blocks.0", "blocks.0"])
def test_a_value_of_the_program_is_not_written_either(value: str, target: str, net: Net) -> None:
    variant = FaultyBranch(does=value, read=(value,), targets=["back"])
    with refuses("formula_failed", match=f"writes into the value '{value}' \\(aten.mul_\\)") as raised:
        lorac.compile(net, {"a": variant}, target=target, example_inputs=(torch.randn(3, 6),))(torch.randn(3, 6))
    assert line_of(value, FaultyBranch.branch) in str(raised.value)


def test_rejects_formulas_that_write_or_raise(net: Net) -> None:
    with refuses("formula_failed", match=r"writes into W \(aten\.mul_\)"):
        lorac.compile(net, {"a": FaultyWeight(does="writes")})
    with refuses("formula_failed", match=r"writes into p\.m \(aten\.add_\)"):
        lorac.compile(net, {"a": FaultyWeight(does="writes_into_a_parameter")})
    with refuses("formula_failed", match="raises AttributeError") as raised:
        lorac.compile(net, {"a": FaultyWeight(does="raises")})
    assert isinstance(raised.value.__cause__, AttributeError)


def test_rejects_a_faulty_formula_that_is_added_later(net: Net) -> None:
    compiled = lorac.compile(net, {"a": lorac.LoRA(r=2)}, reserve=lorac.Reserve(targets="all-linear", rank=4))
    x = torch.randn(3, 6)
    before = compiled(x)
    for variant in (FaultyWeight(does="writes"), FaultyBranch(does="writes", targets=["front"])):
        with refuses("formula_failed"):
            compiled.add_adapter(variant, "b")
    assert set(compiled.adapters) == {"a"}
    assert torch.equal(compiled(x), before)


@pytest.mark.parametrize("variant", [FaultyWeight, FaultyBranch])
def test_the_conformance_kit_reports_a_faulty_formula(variant: type[lorac.WeightVariant]) -> None:
    checks = conformance(variant, does="writes", targets=(), hosts={"linear": HOSTS["linear"]})
    formula = next(check for check in checks if str(check).endswith("linear-formula"))
    with refuses("formula_failed", match="writes into") as raised:
        formula()
    assert line_of("writes", FAULTS["writes"]) in str(raised.value)


def test_a_checkpoint_ends_its_recomputation_within_a_formula() -> None:
    """What others raise for their own ends passes a formula as it is."""
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    net = Net()
    compiled = lorac.compile(net, {"a": lorac.AdapterTune(r=2, init="small", targets=["blocks.1"])})
    inner = compiled.host.blocks[1]
    own = inner.forward
    inner.forward = lambda h: checkpoint(own, h, use_reentrant=False)
    compiled.train()
    compiled(torch.randn(3, 6)).sum().backward()
    assert all(tensor.grad is not None for tensor in compiled.adapters["a"].parameters())


def test_accepts_writes_into_own_tensors() -> None:
    """Writing into what it made itself, and choosing by masks, is pure."""

    @dataclass(frozen=True, kw_only=True)
    class Pure(FaultyWeight):
        def weight(self, W: torch.Tensor, p: Any) -> Any:
            made = W.clone()
            made[0] += p.m[0]
            return torch.where(made > 0, made, made * (1 + p.m[:, None]))

    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 6)
    compiled = lorac.compile(net, {"a": Pure(does="", targets=["front"])})
    with torch.no_grad():
        next(iter(compiled.adapters["a"].parameters())).fill_(0.5)
        weight = net.front.weight.detach().clone()
        weight[0] += 0.5
        weight = torch.where(weight > 0, weight, weight * 1.5)
        expected = net.back(net.blocks[1](net.blocks[0](F.linear(x, weight, net.front.bias))))
        np.testing.assert_array_equal(compiled(x).numpy(), expected.numpy())


@pytest.mark.medium("those of a block", cases=["front"])
@pytest.mark.parametrize("kind", ["front", "blocks.1"])
def test_a_branch_may_hold_constants_of_its_own(kind: str, tmp_path: Path) -> None:
    """They become constants of the program, stored with it."""

    @dataclass(frozen=True, kw_only=True)
    class Constant(FaultyBranch):
        def branch(self, x: torch.Tensor, y: torch.Tensor, p: Any, ctx: Any) -> Any:
            return y + torch.tensor([0.5, 0.25]).repeat(4) * torch.tanh(y + p.m) * torch.tensor(2.0)

    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 6)
    eager = lorac.compile(net, {"a": Constant(does="", targets=[kind])}, example_inputs=(x,))
    emitted = lorac.compile(net, {"a": Constant(does="", targets=[kind])}, target="onnxruntime", example_inputs=(x,))
    assert_close(emitted(x), eager(x).detach())
    assert not torch.equal(eager(x), net(x))
    eager.save(tmp_path / "stored")
    assert_close(lorac.load(tmp_path / "stored")(x), eager(x).detach())
