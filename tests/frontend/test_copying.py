"""Layers under several names: an adapter acts under the first, as PEFT's does, not where a list holds the layer too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import lorac
from tests import parity
from tests.peft_files import make_peft

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Listed(nn.Module):
    """It calls a layer by its name, and again from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.layer = nn.Tanh(), nn.Linear(4, 4)
        self.order: Any = [self.layer]

    def forward(self, x: Tensor) -> Tensor:
        again: Tensor = self.order[0](self.act(self.layer(x)))
        return again


class Nested(Listed):
    """Another module has the list, in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.act.__dict__["table"] = {"first": (self.order, 1)}
        self.order = ()

    def forward(self, x: Tensor) -> Tensor:
        again: Tensor = vars(self.act)["table"]["first"][0][0](self.act(self.layer(x)))
        return again


class Unregistered(Listed):
    """An attribute holds the layer that is not one of the module's children."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "order", self.layer)

    def forward(self, x: Tensor) -> Tensor:
        again: Tensor = self.order(self.act(self.layer(x)))
        return again


class Idle(Listed):
    """It has the list and calls the layer by its name alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x))


@torch.no_grad()
@pytest.mark.parametrize(
    ("target", "mode"), [("eager", "live"), ("eager", "fused"), ("eager", "baked"), ("onnxruntime", "live")]
)
@pytest.mark.parametrize("cls", [Listed, Nested, Unregistered, Idle])
def test_adapts_the_calls_that_peft_adapts(cls: type[Listed], target: str, mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = cls().eval()
    oracle = make_peft(model, tmp_path, LoraConfig(r=2, target_modules=["layer"]), inputs={"x": X})
    compiled = lorac.compile(model, {"a": tmp_path}, target=target, mode=mode, example_inputs=(X,))
    parity.assert_parity(compiled(X), oracle(X), model(X))


def test_says_that_a_layer_is_only_called_from_a_list() -> None:
    class Only(Listed):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.order[0](x))

    adapter = lorac.LoRA(r=2, targets=["layer", "head"])
    with pytest.warns(lorac.LoracWarning, match="no effect at 'layer', whose weights the model only reads"):
        lorac.compile(Only().eval(), [adapter], example_inputs=(X,))


@torch.no_grad()
def test_merges_into_the_listed_layer_too_as_peft_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Listed().eval()
    oracle = make_peft(model, tmp_path, LoraConfig(r=2, target_modules=["layer"]), inputs={"x": X})
    merged = lorac.merge_into(model, {"a": tmp_path})
    parity.assert_parity(merged(X), oracle.merge_and_unload()(X), model(X))
