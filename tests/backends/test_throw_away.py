"""A backend from another package takes that package and an entry point: it compiles, runs and swaps with no edit."""

from __future__ import annotations

import copy
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.backends.onnx.model_files import MODEL_FILE
from lorac.session import targets
from lorac.testing import adapter_away, assert_parity
from tests.backends.throw_away import DIALECT, PlainEngine


class Net(nn.Module):
    """A convolution, a layer on its means, and a block that a branch can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 6), nn.Linear(8, 6)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))])

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv(x)).mean((2, 3))
        return self.blocks[0](self.left(h) * torch.sigmoid(self.right(h)))


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry points that a package with these backends would have."""
    home = "tests.backends.throw_away"
    named = {"plain": f"{home}:BACKEND", "narrow": f"{home}:NARROW", "far": "no_such_library.backend:BACKEND"}
    found = {name: metadata.EntryPoint(name, value, targets.GROUP) for name, value in named.items()}
    monkeypatch.setattr(targets, "list_entry_points", lambda group: found if group == targets.GROUP else {})


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


X, OTHER = (torch.randn(n, 3, 7, 6, generator=torch.Generator().manual_seed(n)) for n in (3, 5))
VARIANTS = {
    "low": lorac.LoRA(r=2, targets=["conv", "left", "right"]),
    "scaled": lorac.DoRA(r=3, targets=["left"]),
    "routed": lorac.MeteoRA(r=2, experts=3, targets=["right"]),
    "after": lorac.AdapterTune(r=2, targets=["blocks.0"]),
}
CHOICES: list[Any] = ["low", "scaled", "routed", "after", {"low": 0.4, "routed": 0.5}]


@pytest.fixture(scope="module")
def adapters(model: nn.Module) -> dict[str, lorac.Adapter]:
    """Adapters of several forms, away from their init, each a fifth of the base."""
    wide = copy.deepcopy(model).double()
    return {name: adapter_away(v, wide, X.double(), name=name, seed=1) for name, v in VARIANTS.items()}


@pytest.mark.usefixtures("offered")
@torch.no_grad()
def test_a_target_from_outside_compiles_runs_and_swaps(model: nn.Module, adapters: dict[str, lorac.Adapter]) -> None:
    eager = lorac.compile(model, adapters, active=None)
    plain = lorac.compile(model, adapters, target="plain", active=None, example_inputs=(X,), threads=2)
    assert isinstance(plain.engine, PlainEngine)
    base = plain(X)
    for choice in CHOICES:
        for each in (eager, plain):
            each.swap(choice)
        for x in (X, OTHER):
            assert_parity(plain(x), eager(x), model(x), own_base=plain(x, adapters=None))
    plain.swap(None)
    assert torch.equal(plain(X), base)


@pytest.mark.medium("live", cases=["fused"])
@pytest.mark.usefixtures("offered")
@pytest.mark.parametrize("mode", ["live", "fused"])
@torch.no_grad()
def test_a_target_from_outside_saves_and_loads(
    mode: str, model: nn.Module, adapters: dict[str, lorac.Adapter], tmp_path: Path
) -> None:
    chosen = {name: adapters[name] for name in ("low", "scaled")}
    plain = lorac.compile(model, chosen, target="plain", mode=mode, active="low", example_inputs=(X,))
    plain.save(tmp_path / "saved")
    loaded = lorac.load(tmp_path / "saved")
    assert isinstance(loaded.engine, PlainEngine)
    for choice in ("low", "scaled", None):
        for each in (plain, loaded):
            each.swap(choice)
        assert torch.equal(loaded(X), plain(X))


@pytest.mark.usefixtures("offered")
def test_its_program_is_in_its_dialect(model: nn.Module, adapters: dict[str, lorac.Adapter]) -> None:
    compiled = lorac.compile(model, adapters, target="plain", active=None, example_inputs=(X,))
    emitted = ir.load(compiled.engine.files[MODEL_FILE].where)
    ops = {(node.domain, node.op_type) for node in emitted.graph.all_nodes()}
    assert ops <= DIALECT.claims
    assert ("", "Where") in ops
    assert not {("", "If"), ("", "Split")} & ops
    shapes = {str(value.name): value.shape for value in emitted.graph.inputs}
    assert shapes["conv:a"][0] == 2
    assert not isinstance(shapes["left:a"][1], int)
    assert "left|right:a" not in shapes
    filled = compiled.switch.state.bound.tensors
    assert filled["left:a"].shape == (8, 1)
    assert not filled["left:a"].any()
    assert filled["conv:b"].shape == (8, 2, 1, 1)


@pytest.mark.usefixtures("offered")
def test_rejects_an_op_that_the_target_does_not_claim(model: nn.Module) -> None:
    with pytest.raises(lorac.Unavailable, match=r"plain does not compute Tanh, which 'blocks\.0\.1' asks for") as error:
        lorac.compile(model, {"a": lorac.LoRA(targets=["left"])}, target="narrow", example_inputs=(X,))
    assert "use target='eager'" in str(error.value)


@pytest.mark.usefixtures("offered")
def test_rejects_an_unknown_option_of_a_target(model: nn.Module) -> None:
    assert {"eager", "onnxruntime", "plain"} <= set(targets.targets())
    with pytest.raises(lorac.OptionError, match="target 'plain' has no option 'thread'") as error:
        lorac.compile(model, {}, target="plain", thread=1)
    assert "nearest: threads" in str(error.value)


def test_rejects_an_unknown_target(model: nn.Module) -> None:
    with pytest.raises(lorac.OptionError, match="there is no target 'onnxruntme'") as error:
        lorac.compile(model, {}, target="onnxruntme")
    assert "nearest: onnxruntime" in str(error.value)


@pytest.mark.usefixtures("offered")
def test_names_the_missing_library_of_a_target(model: nn.Module) -> None:
    with pytest.raises(lorac.MissingExtra, match="no_such_library is not installed") as error:
        lorac.compile(model, {}, target="far")
    assert "pip install no_such_library" in str(error.value)
