"""The table of roles: one more row reaches everything that knows of slots, with no other edit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import lorac
from lorac import Reserve
from lorac.adapters.preparation import Preparer
from lorac.backends.onnx.tested_contents import draw_noise
from lorac.ir.algebra.changes import Change, LowRank
from lorac.ir.slots.composition import ComposedWeights, fill_slots
from lorac.ir.slots.roles import ROLES, SlotRole, Stage
from lorac.storage.plans import plan_from_json, plan_to_json
from lorac.testing import assert_close
from tests.emitted import load_emitted
from tests.refusing import refuses

WIDTH = 6


def _shaken(tensor: torch.Tensor, around: object, generator: torch.Generator) -> None:
    tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))


SCALE = SlotRole(
    name="s",
    letter="s",
    meaning="another scale of the base's outputs",
    stage=Stage.OUTPUT,
    apply=lambda layout, y, s: y * layout.per_output(s).to(y.dtype),
    shape=lambda place: (place.site.out_features,),
    start=lambda role, place: torch.ones(role.shape(place), dtype=role.dtype(place.site)),
    noise=_shaken,
    reserve="scales",
)
HELD = torch.linspace(0.5, 2.0, WIDTH, dtype=torch.float64)
X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A table with one more role, and a preparer whose low-rank changes carry it."""
    whole = Preparer.change

    def carrying(self: Preparer, *args: object) -> Change:
        change = whole(self, *args)  # type: ignore[arg-type]
        assert isinstance(change, LowRank)
        return dataclasses.replace(change, scales={**change.scales, SCALE.name: HELD})

    monkeypatch.setitem(ROLES, SCALE.name, SCALE)
    monkeypatch.setattr(Preparer, "change", carrying)
    yield


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, WIDTH, dtype=torch.float64))


def _adapter() -> lorac.Adapter:
    torch.manual_seed(1)
    tensors = {"lora_A": torch.randn(2, 4).double(), "lora_B": torch.randn(WIDTH, 2).double()}
    return lorac.Adapter("a", lorac.LoRA(r=2, alpha=2, targets=["0"]), {"0": tensors})


def _expected(model: nn.Module) -> torch.Tensor:
    """``s∘(W·x) + B·(A·x) + b``."""
    layer, tensors = model[0], _adapter().tensors["0"]  # type: ignore[index]
    pair = X @ tensors["lora_A"].t() @ tensors["lora_B"].t()
    return HELD * (X @ layer.weight.t()) + pair + layer.bias


def test_every_role_names_a_field_of_reserve() -> None:
    fields = {field.name for field in dataclasses.fields(Reserve)}
    assert {role.reserve for role in ROLES.values()} <= {"", *fields}
    assert [role.name for role in ROLES.values()] == list(ROLES)
    assert len({role.letter for role in ROLES.values()}) == len(ROLES)


@pytest.mark.usefixtures("scaling")
def test_a_new_role_reaches_plan_slots_and_both_engines() -> None:
    model = _model()
    eager = lorac.compile(model, {"a": _adapter()}, example_inputs=(X,))
    assert list(eager.plans["0"].room) == ["a", "b", "s"]
    filled, idle = (
        fill_slots(eager.plans, snapshot, eager.session.base)["0"].tensors["s"]
        for snapshot in (eager.switch.state.snapshot, ComposedWeights(()))
    )
    assert torch.equal(filled, HELD) and torch.equal(idle, torch.ones(WIDTH).double())
    with torch.no_grad():
        assert_close(eager(X), _expected(model))
        plain = eager(X, adapters=None)
    assert_close(eager(X), _expected(model))  # while gradients are recorded: from the adapter's own tensors

    emitted = lorac.compile(model, {"a": _adapter()}, target="onnxruntime", example_inputs=(X,))
    inputs = {str(value.name) for value in load_emitted(emitted).graph.inputs}
    assert {"0:a", "0:b", "0:s"} <= inputs
    assert_close(emitted(X), _expected(model))
    emitted.swap(None)
    assert_close(emitted(X), plain)


@pytest.mark.usefixtures("scaling")
def test_a_new_role_is_stored_shaken_and_explained() -> None:
    compiled = lorac.compile(_model(), {"a": _adapter()}, example_inputs=(X,))
    plan = compiled.plans["0"]
    assert plan_from_json(plan.site, json.loads(json.dumps(plan_to_json(plan)))) == plan

    idle = fill_slots(compiled.plans, ComposedWeights(()), compiled.session.base)
    noise = draw_noise(compiled.plans, idle, compiled.session.base)["0"].tensors["s"]
    assert bool((noise != 1).all()) and float((noise - 1).abs().max()) < 1

    (row,) = compiled.explain().terms
    assert row.slots == ("a", "b", "s")


@pytest.mark.usefixtures("scaling")
def test_rejects_an_adapter_without_slots_and_names_the_reserve() -> None:
    compiled = lorac.compile(_model(), reserve=lorac.Reserve(targets=["0"], rank=2), example_inputs=(X,))
    with pytest.raises(lorac.NeedsRecompile, match=r"has no slot 's'") as caught:
        compiled.add_adapter(_adapter())
    advised = "lorac.Reserve(targets=['0'], rank=2, scales=True)"
    assert f"reserve={advised}" in str(caught.value)

    roomy = lorac.compile(_model(), reserve=eval(advised), example_inputs=(X,))
    roomy.add_adapter(_adapter())
    roomy.swap("a")
    with torch.no_grad():
        assert_close(roomy(X), _expected(_model()))


@pytest.mark.usefixtures("scaling")
def test_rejects_fusing_a_role_without_a_weight_form() -> None:
    with refuses("not_mergeable", match="operand 's'"):
        lorac.compile(_model(), {"a": _adapter()}, mode="fused", example_inputs=(X,))


def test_rejects_a_stored_plan_with_an_unknown_role() -> None:
    plan = lorac.compile(_model(), {"a": _adapter()}, example_inputs=(X,)).plans["0"]
    stored = plan_to_json(plan)
    with pytest.raises(lorac.ArtifactError, match="room for 'biass'"):
        plan_from_json(plan.site, {**stored, "room": {"biass": 1}})
