"""Packs: which sites are computed as one, why others are not, and that every answer stays."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.backends.onnx.model_files import BASE_FILE, WEIGHTS_FILE
from lorac.ir.graph import ops
from lorac.ir.graph.graph import Graph, Skip
from lorac.ir.graph.interpreter import differs_beyond_rounding
from lorac.ir.graph.passes import PassResult, run_pipeline
from lorac.passes.fuse_projections import FuseProjections
from lorac.passes.pipelines import lowering_passes
from lorac.testing import adapter_away, assert_parity
from tests.captured import capture, captured_program, captured_stack, filled, graph_of, interpret
from tests.emitted import load_emitted

BLOCKS = [f"body.layers.{i}" for i in range(3)]


class Attention(nn.Module):
    """q, k and v of one input and of several widths, one of them without a bias, and an output layer."""

    def __init__(self, wide: int = 12, depth: int = 1) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(wide, n, bias=n != 20) for n in (24, 20, 16))
        self.o = nn.Linear(24, wide)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        mixed = torch.tanh(q) * torch.cat([k[..., :4], k], -1) + torch.cat([v, v[..., :8]], -1)
        out: Tensor = x + self.o(mixed)
        return out


class Tower(nn.Module):
    """Two such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Attention(), Attention())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


VARIANTS = {
    "one": lorac.DyLoRA(r=1, targets=["q", "v", "o"]),
    "three": lorac.DyLoRA(r=3, targets=["k", "v"]),
    "dora": lorac.DoRA(r=3, targets=["v"]),
    "shared": lorac.VeRA(r=2, targets=["q", "k"]),
}
CHOICES: tuple[Any, ...] = (
    "one",
    "three",
    "dora",
    {"one": 0.5, "three": -0.7},
    {"three": lorac.Active(1.0, rank=1), "dora": 0.5},
    {"shared": 0.5, "dora": 0.5},
)
_DRAWN = torch.Generator().manual_seed(1)  # not by what was collected before
X, OTHER = torch.randn(2, 5, 12, generator=_DRAWN), torch.randn(3, 7, 12, generator=_DRAWN)


def _run(graph: Graph, constant: bool = False) -> PassResult:
    ((_, outcome),) = run_pipeline(graph, [FuseProjections(constant)])
    return outcome


def _packs(graph: Graph) -> list[tuple[str, ...]]:
    return [pack.sites for pack in graph.projections.values()]


def _host(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Tower().eval().to(dtype)


def _adapters(host: nn.Module) -> dict[str, lorac.Adapter]:
    """Ranks 0, 1 and 3, mixed per site; scales at one site of a pack."""
    wide, x = copy.deepcopy(host).double(), X.double()
    return {name: adapter_away(v, wide, x, name=name, seed=len(name)) for name, v in VARIANTS.items()}


# ── Which sites, and why not others ──────────────────────────────────────────────────────────────────────────────────
def test_fuses_sites_that_read_the_same_input() -> None:
    graph = captured_stack({"one": lorac.LoRA(r=2, targets=["query", "out"])})
    outcome = _run(graph)
    assert outcome.changed
    assert _packs(graph) == [(f"{block}.query", f"{block}.key") for block in BLOCKS]
    assert [skip.where for skip in outcome.skipped] == [f"{block}.out" for block in BLOCKS]
    assert {skip.why for skip in outcome.skipped} == {
        "no other site of its module reads its input and can be fused with it"
    }
    assert _run(graph) == PassResult(changed=False, skipped=outcome.skipped), "a second run finds nothing more"


@pytest.mark.medium("OFT", keep=["oft-*"])
@pytest.mark.parametrize(
    ("variant", "why"),
    [
        (lorac.SHiRA(r=1, targets=["query"]), "its weight is bound by itself"),
        (lorac.OFT(block_size=2, targets=["query"]), "its input is changed before the product"),
        (lorac.MeteoRA(r=2, targets=["query"]), "a branch acts on what it computes"),
    ],
    ids=lambda given: getattr(given, "name", ""),
)
def test_leaves_sites_with_other_forms(variant: Any, why: str) -> None:
    graph = captured_stack({"one": variant})
    outcome = _run(graph)
    assert not outcome.changed
    assert outcome.skipped == tuple(Skip(f"{block}.query", why) for block in BLOCKS)
    apart = "computed apart from layers that read the same input"
    assert graph.interface.notes == (f"'{BLOCKS[0]}.query' and 2 more: {apart}, since {why}",), "explain() tells it"


def test_weights_that_become_constants_are_packed() -> None:
    host = _host()
    compiled = lorac.compile(host, {"one": lorac.LoRA(r=1, targets=["q", "v"])}, mode="baked")
    for constant, sites in ((True, ("q", "v")), (False, ())):
        graph = graph_of("tower", captured_program(host, (X,)), compiled.sites, compiled.plans)
        _run(graph, constant)
        found = [tuple(path.rpartition(".")[2] for path in paths) for paths in _packs(graph)]
        assert found == ([sites] * 2 if sites else [])


@pytest.mark.medium("test_fuses_sites_that_read_the_same_input")
def test_packs_join_the_calls_of_a_shared_layer() -> None:
    it = capture("tiny_albert", {"one": lorac.LoRA(r=2, targets=["query", "value"])})
    assert _run(it.graph).changed
    (pack,) = it.graph.projections.values()
    assert [path.rpartition(".")[2] for path in pack.sites] == ["query", "key", "value"]
    joined = [node for node in it.graph.find(ops.LINEAR) if ops.site_of(node) == pack.plan.site.path]
    assert len(joined) > 1


class Odd(nn.Module):
    """Layers that come in different company, read what is written to, or share their weight."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        if kind == "tied":
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "company":
            y: Tensor = self.first(self.first(x) + self.second(x))
        elif self.kind == "written":
            x = x + 1
            y = self.first(x)
            x.mul_(2)
            y = y + self.second(x)
        elif self.kind == "read":
            y = self.first(x) @ self.first.weight + self.second(x)
        else:
            y = self.first(x) * self.second(x)
        return y


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("company", "its calls do not all share an input with the same sites"),
        ("written", "its input is written to"),
        ("tied", "its weight is read elsewhere too"),
        ("read", "its weight is read elsewhere too"),
    ],
)
def test_leaves_layers_that_cannot_be_fused(kind: str, why: str) -> None:
    host = Odd(kind)
    compiled = lorac.compile(host, {"one": lorac.LoRA(r=2, targets=["first"])})
    graph = graph_of("odd", captured_program(host, (torch.randn(3, 4),)), compiled.sites, compiled.plans)
    outcome = _run(graph)
    assert not outcome.changed
    assert outcome.skipped == (Skip("first", why),)


def test_fuses_nine_layers_of_one_input() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(9))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([head(x) for head in self.heads], -1)

    host = Heads()
    graph = graph_of("heads", captured_program(host, (torch.randn(3, 4),)), lorac.sites(host), {})
    _run(graph)
    assert [len(paths) for paths in _packs(graph)] == [9]


# ── What they compute ────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.medium("test_swaps_and_returns_to_the_same_bits; the other dtype")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_every_level_answers_as_eager_does(dtype: torch.dtype) -> None:
    """The reference interpreter over fused projections, with every mixture of ranks, at another batch and length."""
    host = _host(dtype)
    compiled = lorac.compile(host, _adapters(host), active=None)
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    graph = graph_of("tower", captured_program(host, (X.to(dtype),), shapes), compiled.sites, compiled.plans)
    for step in lowering_passes():
        run_pipeline(graph, [step])
        if step.name not in ("insert", "cleanup"):
            continue
        for choice, x in itertools.product(CHOICES, (X.to(dtype), OTHER.to(dtype))):
            compiled.swap(choice)
            y = interpret(graph, {"x": x}, filled(compiled, graph))
            assert not differs_beyond_rounding(y, compiled(x)), "more than rounding"
            if dtype is torch.float64:
                assert_parity(y, compiled(x), host(x))
    assert [pack.sizes for pack in graph.projections.values()] == [(24, 20, 16)] * 2
    assert set(graph.slots) == {
        *(f"layers.{i}.{leaf}:{role}" for i in range(2) for leaf in "qkvo" for role in "ab"),
        *(f"layers.{i}.{leaf}:{role}" for i in range(2) for leaf in "qk" for role in "gh"),
        *(f"layers.{i}.v:c" for i in range(2)),
    }


@pytest.fixture(scope="module")
def emitted() -> Mapping[str, Any]:
    """The tower in ONNX Runtime, with the same adapters in every mode."""
    host = _host()
    adapters = _adapters(host)
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    options = {"target": "onnxruntime", "example_inputs": (X,), "dynamic_shapes": shapes}
    return {
        "host": host,
        "eager": lorac.compile(host, adapters, active=None),
        "live": lorac.compile(host, adapters, active=None, **options),
        "bare": lorac.compile(host, {}, **options),
        "baked": lorac.compile(host, adapters, active="dora", mode="baked", **options),
    }


@torch.no_grad()
def test_swaps_and_returns_to_the_same_bits(emitted: Mapping[str, Any]) -> None:
    host, eager, live = emitted["host"], emitted["eager"], emitted["live"]
    base = {x.shape: live(x, adapters=None) for x in (X, OTHER)}
    for choice in CHOICES:
        eager.swap(choice)
        live.swap(choice)
        for x in (X, OTHER):
            assert_parity(live(x), eager(x), host(x), own_base=base[x.shape])
    live.swap(None)
    for x in (X, OTHER):
        assert torch.equal(live(x), base[x.shape])
        assert torch.equal(live(x), emitted["bare"](x)), "a pair of rank 0 changes no bit of the base"


@torch.no_grad()
def test_bakes_into_one_product(emitted: Mapping[str, Any]) -> None:
    eager, baked = emitted["eager"], emitted["baked"]
    eager.swap("dora")
    assert_parity(baked(OTHER), eager(OTHER), emitted["host"](OTHER))
    for name in ("bare", "baked"):
        graph = load_emitted(emitted[name]).graph
        products = [node for node in graph if node.op_type in ("MatMul", "Gemm")]
        assert len(products) == 4, "two a block"


def test_emits_one_product_split_by_constant_sizes(emitted: Mapping[str, Any]) -> None:
    graph = load_emitted(emitted["live"]).graph
    cuts = [node for node in graph if node.op_type == "Split"]
    assert [ir.convenience.get_const_tensor(cut.inputs[1]).numpy().tolist() for cut in cuts] == [[24, 20, 16]] * 2
    names = {str(name) for name in graph.initializers}
    assert not {f"layers.0.{leaf}.weight" for leaf in "qkv"} & names


def test_no_base_weight_is_on_disk_twice(emitted: Mapping[str, Any]) -> None:
    """Those of packed sites are parts of one in the program's file, and are read there, to the bit."""
    host, live = emitted["host"], emitted["live"]
    data = live.engine.files[WEIGHTS_FILE].read()
    stored = live.engine.files[BASE_FILE].read()
    for path in ("layers.0.q", "layers.1.v"):
        weight = host.get_submodule(path).weight.detach()
        assert torch.equal(live.engine.base.weight(live.sites[path]), weight)
        column = weight.t()[0].contiguous().numpy().tobytes()
        assert data.count(column) == 1
        assert np.ascontiguousarray(weight.numpy()).tobytes() not in stored
        assert np.ascontiguousarray(weight.t().numpy()).tobytes() not in stored


def test_a_weight_of_zeros_is_read_back_as_zeros() -> None:
    """Its bytes are those of its transpose, of which the program's file has the rows apart."""
    host = Attention(wide=32).eval()
    nn.init.zeros_(host.k.weight)
    compiled: Any = lorac.compile(host, {"a": lorac.LoRA(r=1)}, "onnxruntime", (torch.randn(2, 3, 32),))
    for path in "qkv":
        assert torch.equal(compiled.engine.base.weight(compiled.sites[path]), host.get_submodule(path).weight.detach())


def test_each_site_is_explained_by_itself(emitted: Mapping[str, Any]) -> None:
    terms = {(row.site, row.adapter): row for row in emitted["live"].explain().terms}
    assert terms["layers.0.v", "dora"].slots == ("a", "b", "c")
    assert terms["layers.0.k", "three"].slots == ("a", "b")
    assert terms["layers.0.k", "three"].shape == (12, 20)
