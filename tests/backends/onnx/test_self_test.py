"""The self-test finds every way in which an emitter can lose a slot, and names the slot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.backends.onnx import build, self_test
from lorac.backends.onnx.model_files import MODEL_FILE, WEIGHTS_FILE
from lorac.backends.onnx.self_test import run_self_test
from lorac.backends.onnxruntime.engine import GraphSession, OrtEngine
from lorac.backends.onnxruntime.inference_session import create_session
from lorac.frontend.base_weights import make_base_reader
from lorac.storage.open_file import open_files
from tests.emitted import load_emitted
from tests.parity import assert_parity
from tests.refusing import refuses


class Twins(nn.Module):
    """Two layers of one shape with different inputs, and two that read the same."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(10, 14), nn.Linear(10, 14)
        self.left, self.right = nn.Linear(14, 9), nn.Linear(14, 9)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.one(x)) + self.two(torch.sin(x))
        return self.left(h) * torch.sigmoid(self.right(h))


@dataclass
class Built:
    """What the self-test looks at."""

    engine: OrtEngine
    program: Any
    snapshot: Any


def _noisy(r: int, cls: Any = lorac.LoRA) -> lorac.Adapter:
    """An adapter away from its init."""
    variant = cls(r=r, targets=["one", "two", "left", "right"])
    compiled = lorac.compile(_host(), {"a": variant})
    adapter = compiled.adapters["a"]
    with torch.no_grad():
        for index, tensor in enumerate(adapter.parameters()):
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index)) * 0.3)
    return adapter


def _host() -> nn.Module:
    torch.manual_seed(0)
    return Twins().eval()


def _build(mode: str, monkeypatch: pytest.MonkeyPatch) -> Built:
    tested: list[Built] = []
    monkeypatch.setattr(self_test, "run_self_test", lambda *args: tested.append(Built(*args[:3])))
    compiled = lorac.compile(
        _host(),
        {"a": _noisy(2), "b": _renamed(_noisy(3, lorac.DoRA), "b")},
        target="onnxruntime",
        mode=mode,
        active="a",
        example_inputs=(torch.randn(3, 10),),
    )
    tested[0].engine.keep = compiled  # type: ignore[attr-defined]  (its folder lives as long as it does)
    tested[0].engine.base = make_base_reader(_host())  # a baked engine keeps none
    return tested[0]


def _renamed(adapter: lorac.Adapter, name: str) -> lorac.Adapter:
    return lorac.Adapter(name, adapter.variant, adapter.tensors)


@pytest.fixture(scope="module")
def built() -> dict[str, Built]:
    with pytest.MonkeyPatch.context() as patch:
        return {mode: _build(mode, patch) for mode in ("live", "fused", "baked")}


def _sabotaged(built: Built, folder: Path, change: Callable[[ir.Model], None]) -> OrtEngine:
    """The same engine over a model that was tampered with."""
    folder.mkdir()
    model = load_emitted(built)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    change(model)
    ir.save(model, folder / MODEL_FILE, external_data=WEIGHTS_FILE, size_threshold_bytes=1 << 30)
    files, engine = open_files(folder, (MODEL_FILE,)), built.engine
    graph = engine.graphs["main"]
    session = GraphSession(create_session(files, "main", engine.options), graph.interface, graph.slots)
    return OrtEngine(dataclasses.replace(engine.program, graphs={"main": session}, files=files, base=engine.base))


def _input(model: ir.Model, name: str) -> ir.Value:
    return next(value for value in model.graph.inputs if value.name == name)


def _content(built: Built, name: str) -> Tensor:
    from lorac.ir.graph.feeds import collect_slot_tensors
    from lorac.ir.slots.composition import fill_slots

    engine = built.engine
    return collect_slot_tensors(engine.slots, engine.plans, fill_slots(engine.plans, built.snapshot, engine.base))[name]


def _constant(model: ir.Model, name: str, value: Tensor) -> ir.Value:
    made = ir.Value(name=name, const_value=ir.tensor(value.contiguous().numpy(), name=name))
    model.graph.initializers[name] = made
    return made


def _fold(model: ir.Model, name: str, value: Tensor) -> None:
    """The slot is an initializer, no input any more."""
    slot = _input(model, name)
    model.graph.inputs.remove(slot)
    slot.const_value = ir.tensor(value.contiguous().numpy(), name=name)
    model.graph.initializers[name] = slot


def _bypass(model: ir.Model, name: str, value: Tensor) -> None:
    """The slot is an input still, but its readers read a constant."""
    _input(model, name).replace_all_uses_with(_constant(model, "copy", value))


def _shadow(model: ir.Model, name: str, value: Tensor) -> None:
    """The readers read a constant to which the slot adds nothing: there is a path, and no effect."""
    slot = _input(model, name)
    uses = list(slot.uses())
    zero = _constant(model, "zero", torch.tensor(0.0))
    product = ir.node("Mul", [slot, zero], name="shadow_mul")
    total = ir.node("Add", [product.outputs[0], _constant(model, "copy", value)], name="shadow_add")
    product.outputs[0].name, total.outputs[0].name = "shadow_product", "shadow_total"
    model.graph.insert_before(model.graph[0], [product, total])
    for node, index in uses:
        node.replace_input_with(index, total.outputs[0])


def _exchange(model: ir.Model, one: str, two: str) -> None:
    first, second = _input(model, one), _input(model, two)
    first.name, second.name = "spare", one
    first.name = two


def _serve_all_rows_from_one_place(model: ir.Model, name: str) -> None:
    slot = _input(model, name)
    uses = [(node, index) for node, index in slot.uses() if node.op_type == "MatMul"]
    first = ir.node("Gather", [slot, _constant(model, "first", torch.tensor([0]))], name="first_place")
    first.outputs[0].name = "place"
    model.graph.insert_before(model.graph[0], first)
    for node, index in uses:
        node.replace_input_with(index, first.outputs[0])


@pytest.mark.medium("exchanged slots, and slots that became constants")
def test_rejects_a_slot_with_one_place_for_all_rows(built: dict[str, Built], tmp_path: Path) -> None:
    """One choice for all rows does not tell."""
    made = built["live"]
    engine = _sabotaged(made, tmp_path / "model", lambda model: _serve_all_rows_from_one_place(model, "one:b"))
    with refuses("self_test_failed", match="where rows have adapters of their own"):
        run_self_test(engine, made.program, made.snapshot)


def test_honest_engines_pass(built: dict[str, Built]) -> None:
    for made in built.values():
        run_self_test(made.engine, made.program, made.snapshot)


SLOTS = {"live": "one:b", "fused": "two:weight"}


@pytest.mark.parametrize("mode", SLOTS)
@pytest.mark.parametrize("harm", [_fold, _bypass, _shadow])
def test_a_slot_that_became_a_constant_is_named(
    built: dict[str, Built], mode: str, harm: Callable[..., None], tmp_path: Path
) -> None:
    made, slot = built[mode], SLOTS[mode]
    engine = _sabotaged(made, tmp_path / "model", lambda model: harm(model, slot, _content(made, slot)))
    with refuses("self_test_failed", match=f"'{slot}'"):
        run_self_test(engine, made.program, made.snapshot)


def test_a_constant_of_another_value_is_found_by_noise(built: dict[str, Built], tmp_path: Path) -> None:
    """Nothing static tells: the slot is an input with a path, and no constant equals it."""
    made = built["live"]
    other = 1 + 0.1 * torch.randn(_content(made, "two:c").shape)
    engine = _sabotaged(made, tmp_path / "model", lambda model: _shadow(model, "two:c", other))
    with refuses("self_test_failed", match="1 slots change nothing: 'two:c'"):
        run_self_test(engine, made.program, made.snapshot)


@pytest.mark.parametrize(
    ("mode", "one", "two"),
    [
        ("live", "one:b", "two:b"),
        ("live", "one:a", "two:a"),
        ("live", "one:c", "two:c"),
        ("fused", "one:weight", "two:weight"),
    ],
)
def test_exchanged_slots_are_named(built: dict[str, Built], mode: str, one: str, two: str, tmp_path: Path) -> None:
    made = built[mode]
    engine = _sabotaged(made, tmp_path / "model", lambda model: _exchange(model, one, two))
    with refuses("self_test_failed", match=f"'{one}'") as error:
        run_self_test(engine, made.program, made.snapshot)
    assert f"'{two}'" in str(error.value)


def test_only_the_slots_at_fault_are_named(built: dict[str, Built], tmp_path: Path) -> None:
    made = built["live"]
    engine = _sabotaged(made, tmp_path / "model", lambda model: _exchange(model, "one:b", "two:b"))
    with refuses("self_test_failed") as error:
        run_self_test(engine, made.program, made.snapshot)
    assert "left" not in str(error.value)
    assert "right" not in str(error.value)


def test_a_wrong_baked_value_is_found(built: dict[str, Built], tmp_path: Path) -> None:
    made = built["baked"]

    def harm(model: ir.Model) -> None:
        weight = model.graph.initializers["one:weight"]
        weight.const_value = ir.tensor(weight.const_value.numpy() * 1.1, name=weight.name)  # type: ignore[union-attr]

    engine = _sabotaged(made, tmp_path / "model", harm)
    with refuses("self_test_failed", match="baked"):
        run_self_test(engine, made.program, made.snapshot)


@pytest.mark.parametrize("mode", ["live", "fused", "baked"])
def test_rejects_a_model_that_is_wrong_at_other_sizes(built: dict[str, Built], mode: str, tmp_path: Path) -> None:
    def harm(model: ir.Model) -> None:
        output = model.graph.outputs[0]
        added = ir.node("Add", [output, _constant(model, "zeros", torch.zeros(3, 1))], name="narrow")
        added.outputs[0].name, output.name = output.name, "wide"
        added.outputs[0].type, added.outputs[0].shape = output.type, output.shape
        model.graph.append(added)
        model.graph.outputs[0] = added.outputs[0]

    made = built[mode]
    engine = _sabotaged(made, tmp_path / "model", harm)
    with refuses("self_test_failed", match=r"is right on the example inputs, and wrong on x \[4, 10\]"):
        run_self_test(engine, made.program, made.snapshot)


@pytest.mark.parametrize(("steep", "off", "differs"), [(1e4, 2e-7, False), (1e4, 1e-3, True), (1.0, 3e-3, True)])
def test_tolerates_roundings_that_the_network_amplifies(
    steep: float, off: float, differs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer may be as far off as a rounding of the inputs moves it, several times, and by no other cause."""
    x = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.5

    def answer(graph: Any, inputs: Any, tensors: Any = None, weights: Any = None) -> list[Tensor]:
        return [torch.sin(steep * inputs["x"])]

    monkeypatch.setattr(self_test, "run_graph", answer)
    comparison = object.__new__(self_test._ProgramComparison)
    comparison.engine = SimpleNamespace(mode="live", outputs=lambda *_: answer(None, {"x": x * (1 + off)}))  # type: ignore[assignment]
    comparison.graph, comparison.inputs = SimpleNamespace(name="main", slots={}), {"x": x}  # type: ignore[assignment]
    comparison.weights = {}
    assert comparison._differs({}) == differs


class Chaotic(nn.Module):
    """A layer, and a map that doubles every difference sixty times over."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.one(x))
        for _ in range(60):
            y = 3.99 * y * (1 - y)
        return y


def test_is_undecided_where_roundings_change_everything() -> None:
    arguments: dict[str, Any] = {"target": "onnxruntime", "example_inputs": (torch.randn(3, 10),)}
    with refuses("self_test_undecided", match="rounding the inputs changes an output of graph 'main' by") as error:
        lorac.compile(Chaotic().eval(), {"a": lorac.LoRA(r=2)}, **arguments)
    assert "self_test=False" in error.value.next_step
    lorac.compile(Chaotic().eval(), {"a": lorac.LoRA(r=2)}, self_test=False, **arguments)


def test_compile_runs_the_self_test_and_leaves_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    honest = build.emit

    def dishonest(*args: Any) -> ir.Model:
        model = honest(*args)
        _exchange(model, "one:b", "two:b")
        return model

    monkeypatch.setattr(build, "emit", dishonest)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    arguments = {"target": "onnxruntime", "example_inputs": (torch.randn(3, 10),)}
    with refuses("self_test_failed", match="'one:b'"):
        lorac.compile(_host(), {"a": _noisy(2)}, **arguments)
    assert not list(tmp_path.iterdir())
    lorac.compile(_host(), {"a": _noisy(2)}, self_test=False, **arguments)


@dataclass(frozen=True, kw_only=True)
class Tempered(lorac.BranchVariant):
    """y' = y + tanh(g)·tanh(x·Dᵀ), g a number without an axis."""

    name = "tempered"

    def params(self, site: Any) -> dict[str, lorac.ParamSpec]:
        return {
            "D": lorac.ParamSpec((site.out_features, site.in_features), lambda c: torch.ones(c.shape)),
            "g": lorac.ParamSpec((), lambda c: torch.tensor(0.5)),
        }

    def branch(self, x: Tensor, y: Tensor, p: Any, ctx: Any) -> Tensor:
        return y + torch.tanh(p.g) * torch.tanh(x @ p.D.T)


@pytest.mark.medium("slots with axes")
@torch.no_grad()
def test_a_parameter_without_an_axis_is_a_slot_too() -> None:
    x, model = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)), _host()
    found = lorac.compile(_host(), {"a": Tempered(targets=["one"])}, target="onnxruntime", example_inputs=(x,))
    expected = lorac.compile(_host(), {"a": Tempered(targets=["one"])})
    for strength in (1.0, 0.5):
        found.swap({"a": strength})
        expected.swap({"a": strength})
        assert_parity(found(x), expected(x), model(x), own_base=found(x, adapters=None))
