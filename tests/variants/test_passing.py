"""A pass of the model for one adapter alone: values read from it are those of the model with that adapter only."""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorac
from lorac.testing import assert_close
from tests.parity import assert_parity
from tests.refusing import refuses
from tests.variants.modules import drawn
from tests.variants.test_once import Counted

WIDTH = 6
_DRAWN = torch.Generator().manual_seed(0)
X, OTHER = (torch.randn(rows, 5, WIDTH, generator=_DRAWN) for rows in (4, 2))
TARGETS = pytest.mark.parametrize("target", ["eager", "onnxruntime"])


@dataclass(frozen=True, kw_only=True)
class Settled(lorac.BranchVariant):
    """y' = y + g∘(B·A·x + tanh(z)): g once of what module ``of`` gives where g is ``first``, z read in each pass."""

    targets: tuple[str, ...] = ("0", "2")
    of: str = "3"
    shift: str = "0.bias"
    first: float = 0.5
    beside: tuple[str, ...] = ("0", "in:0", "weight:0", "base:2", "input:input")
    name, emits = "test-settled", ("gate",)

    def params(self, site):
        read = {"c": drawn(1)} if site.path == "2" else {}
        return {"A": drawn(2, WIDTH), "B": drawn(WIDTH, 2), "gate": drawn(WIDTH, WIDTH, shared=True), **read}

    def reads_once(self):
        return (f"pass:first:{self.of}", f"param:{self.shift}")

    def reads(self, site):
        return ("own:gate", *(self.beside if site.path == "2" else ()))

    def once(self, p, ctx):
        read, shift = (ctx.value(name) for name in self.reads_once())
        return {"gate": torch.sigmoid(F.linear(read, p.gate) + shift)}

    def branch(self, x, y, p, ctx):
        gate = x.new_full((WIDTH,), self.first) if ctx.passing == "first" else ctx.value("own:gate")
        ctx.emit("gate", gate)
        read = self.beside if ctx.site.path == "2" else ()
        z = sum(((p.c * ctx.value(name)).mean() for name in read), torch.zeros(()))
        return y + gate * (F.linear(F.linear(x, p.A), p.B) + torch.tanh(z))


def host() -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
    return nn.Sequential(*layers).eval()


def passed(model: nn.Module, x: torch.Tensor, terms: Sequence) -> torch.Tensor:
    """A pass by hand: each term an adapter's tensors, its strength, and the gate."""
    unadapted, first = model[:3](x), model[0](x)
    y = first + sum(t * g * (x @ p["0"]["A"].T @ p["0"]["B"].T) for p, t, g in terms)
    z, hidden = sum(value.mean() for value in (y, x, model[0].weight, unadapted, x)), torch.tanh(y)
    moved = (t * g * (hidden @ p["2"]["A"].T @ p["2"]["B"].T + torch.tanh(p["2"]["c"] * z)) for p, t, g in terms)
    return model[3](model[2](hidden) + sum(moved))


def by_hand(model: nn.Module, adapters, strengths, x: torch.Tensor) -> torch.Tensor:
    """The gates of each adapter by a pass in which it acts alone and whole, then the sum of all."""
    terms = []
    for name, t in strengths.items():
        p = adapters[name].tensors
        alone = passed(model, x, [(p, 1, adapters[name].variant.first)])
        terms.append((p, t, torch.sigmoid(alone.detach() @ p["0"]["gate"].T + model[0].bias)))
    return passed(model, x, terms)


def made(model: nn.Module, **methods: lorac.BranchVariant) -> dict[str, lorac.Adapter]:
    found = dict(lorac.compile(model, methods, active=None).adapters)
    for adapter in found.values():
        adapter.tensors["2"]["c"].data.mul_(0.3)
    return found


@functools.cache
def three(target: str) -> tuple[nn.Module, dict[str, lorac.Adapter], lorac.Compiled]:
    """Two of the same settings and one of others."""
    model = host()
    adapters = made(model, a=Settled(), b=Settled(), c=Settled(first=-2))
    return model, adapters, lorac.compile(model, adapters, target, (X,), active=None)


@TARGETS
@torch.no_grad()
def test_each_adapter_has_a_pass_of_its_own(target: str) -> None:
    """Whatever its strength and whatever else is active; with the same settings, and with others."""
    model, adapters, compiled = three(target)
    for x in (X, OTHER):
        for choice in ({"a": 0.2}, {"b": -0.2}, {"c": 0.2}, {"a": 0.1, "b": -0.2, "c": 0.05}):
            y = by_hand(model, adapters, choice, x)
            assert_parity(compiled(x, adapters=choice), y, model(x), own_base=compiled(x, adapters=None))
    rows = compiled(OTHER, adapters=["c", None])
    assert_close(rows[:1], compiled(OTHER[:1], adapters="c"))
    assert_close(rows[1:], model(OTHER)[1:])


@pytest.mark.medium("passes in eager, gates in backends/onnx/test_gates.py, and test_x_lora.py emits a pass")
@torch.no_grad()
def test_in_a_program_a_pass_is_behind_a_gate_of_its_own(tmp_path: Path) -> None:
    model, _, compiled = three("onnxruntime")
    compiled.save(tmp_path / "settled")
    lorac.compile(model, {}, "onnxruntime", (X,)).save(tmp_path / "base")
    found, base = (onnx.load(next((tmp_path / name).rglob("*.onnx"))).graph for name in ("settled", "base"))
    products = ("MatMul", "Gemm")
    outside = Counter(node.op_type for node in found.node if node.op_type in products)
    assert outside == Counter(node.op_type for node in base.node if node.op_type in products)
    gates = [node for node in found.node if node.op_type == "If"]
    bodies = [next(a.g for a in gate.attribute if a.name == "then_branch") for gate in gates]
    norms = [[node.op_type for node in body.node].count("LayerNormalization") for body in bodies]
    # The norm that is read of each pass; one gate for the pass of the base, and one for each adapter at each site.
    assert sorted(norms) == [0] * (1 + 3 * 2) + [1] * 3
    loaded = lorac.load(tmp_path / "settled")
    assert torch.equal(loaded(OTHER, adapters="b"), compiled(OTHER, adapters="b"))


@torch.no_grad()
def test_in_eager_a_pass_is_run_where_its_adapter_is_on() -> None:
    model = nn.Sequential(Counted(host()))
    of = Settled(targets=("0.within.0",), of="0.within.3", shift="0.within.0.bias")
    adapters = {"a": of, "b": replace(of, first=2)}
    compiled = lorac.compile(model, adapters, active=None)
    for choice, passes in ((None, 1), ("a", 2), ({"a": 0.5, "b": 0.5}, 3)):
        compiled.host[0].calls = 0
        compiled(X, adapters=choice)
        assert compiled.host[0].calls == passes


def test_gradients_treat_the_pass_as_constant() -> None:
    model = host()
    compiled = lorac.compile(model, made(model, a=Settled()))
    given = compiled.adapters["a"].tensors
    wanted = (X * by_hand(model, compiled.adapters, {"a": 1}, X)).sum()
    for tensor in (given["0"]["gate"], given["0"]["A"], given["2"]["B"]):
        expected = torch.autograd.grad(wanted, tensor, retain_graph=True)[0]
        assert_close(torch.autograd.grad((X * compiled(X)).sum(), tensor)[0], expected)


@pytest.mark.parametrize(
    ("method", "error", "text"),
    [
        (Settled(of="4"), lorac.SiteError, "not a value of the program"),
        (Settled(beside=("pass:first:3",)), lorac.SiteError, "which only `once` reads"),
    ],
)
def test_rejects_values_that_do_not_exist(method, error, text) -> None:
    with pytest.raises(error, match=text):
        lorac.compile(host(), {"s": method})


@dataclass(frozen=True, kw_only=True)
class Circular(lorac.BranchVariant):
    """Asks, in its own pass, for what is computed of that."""

    targets: tuple[str, ...] = ("0",)
    name = "test-circular"

    def params(self, site):
        return {"up": drawn(WIDTH, WIDTH)}

    def reads_once(self):
        return ("pass:first:2",)

    def reads(self, site):
        return ("own:gate",)

    def once(self, p, ctx):
        return {"gate": ctx.value("pass:first:2")}

    def branch(self, x, y, p, ctx):
        return y + ctx.value("own:gate") * F.linear(x, p.up)


@pytest.mark.medium("eager", cases=["onnxruntime"])
@TARGETS
def test_rejects_a_cyclic_formula(target: str) -> None:
    with refuses("site_unreached", match=r"'own:gate', which does not exist in the pass 'first'.*\n.*ctx\.passing"):
        lorac.compile(host(), {"c": Circular()}, target, (X,))(X)


@torch.no_grad()
def test_only_the_called_component_runs_the_pass() -> None:
    models = {"one": host(), "two": host()}
    compiled = lorac.compile(models, {"a": Settled(targets=("one.0",), of="one.3", shift="one.0.bias")})
    alone = lorac.compile(models["one"], {"a": Settled(targets=("0",))})
    for key, tensor in compiled.adapters["a"].tensors["one.0"].items():
        alone.adapters["a"].tensors["0"][key].copy_(tensor)
    assert torch.equal(compiled["two"](X), models["two"](X))
    assert torch.equal(compiled["one"](X), alone(X))
