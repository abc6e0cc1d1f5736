"""Programs of models whose Python loops over the rows, or that check the values of their inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.testing import assert_close


class Images(nn.Module):
    """A linear layer over pieces of images, two a row, that a loop cuts apart; all images have to be of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, pieces: Tensor, heights: Tensor) -> dict[str, Any]:
        torch._check_tensor_all(heights == heights[0])
        seen = self.linear(pieces)
        features = [seen[2 * i : 2 * i + 2] * (1 + x[i].mean()) for i in range(x.shape[0])]
        return {
            "features": features,
            "all": torch.cat(features)[None] * heights[0],
            "first": torch.stack([f[0] for f in features]),
            "bias": self.linear.bias * 2,
        }


def _call(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x, pieces = (torch.randn(*shape, generator=generator) for shape in ((rows, 5), (2 * rows, 4)))
    return {"x": x, "pieces": pieces, "heights": torch.full((rows,), rows)}


@pytest.fixture(scope="module")
def host() -> Images:
    torch.manual_seed(0)
    return Images()


@pytest.fixture(scope="module")
def compiled(host: Images) -> Any:
    with pytest.warns(lorac.LoracWarning) as caught:
        adapters = {"a": lorac.LoRA(r=2, targets=["linear"])}
        made = lorac.compile(host, adapters, target="onnxruntime", active=None, example_inputs=_call(2))
    said = [str(warning.message) for warning in caught]
    assert any("holds for 2 rows, and other calls run in parts of so many, at " in text for text in said), said
    return made


@pytest.fixture(scope="module", params=["compiled", "loaded"])
def program(compiled: Any, request: Any, tmp_path_factory: Any) -> Any:
    if request.param == "compiled":
        return compiled
    folder: Path = tmp_path_factory.mktemp("rows") / "images.lorac"
    compiled.save(folder)
    return lorac.load(folder)


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_any_number_of_rows_is_answered_in_parts(program: Any, host: Images, rows: int):
    found, wanted = program(**_call(rows)), host(**_call(rows))
    assert len(found["features"]) == rows
    for one, other in zip(found["features"], wanted["features"], strict=True):
        assert_close(one, other.detach())
    for name in ("all", "first", "bias"):
        assert_close(found[name], wanted[name].detach())


def test_values_that_the_model_checks_are_checked_in_every_part(program: Any):
    for wrong in (torch.tensor([2, 1]), torch.tensor([2, 2, 2, 1])):
        call = _call(len(wrong))
        with pytest.raises(
            lorac.InputMismatch, match=r"the model checks them at .*test_rows\.py:\d+: torch\._check_tensor"
        ):
            program(**{**call, "heights": wrong})


def test_rejects_rows_of_unequal_shares(program: Any):
    with pytest.raises(lorac.InputMismatch, match="'pieces' has size 7 on axis 0, which does not divide"):
        program(**{**_call(3), "pieces": torch.zeros(7, 4)})
