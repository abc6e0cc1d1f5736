"""peft_type SHIRA, read and written, against PEFT's outputs in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ShiraConfig

from lorac import Adapter, BaseNeeded, SHiRA, load_adapter, save_adapter
from tests import peft_files
from tests.formats.oracle import assert_equal, assert_round_trip, assert_same
from tests.peft_files import change_tensors, configure
from tests.refusing import refuses
from tests.zoo import ZOO


@pytest.mark.medium("plain models", cases=["tiny_*"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("plain_mlp", {"r": 2, "target_modules": ["up", "down"]}),
        ("plain_mlp", {"r": 1, "target_modules": ["up", "head"], "random_seed": 7}),
        ("plain_mlp", {"r": 1, "target_modules": ["up"], "modules_to_save": ["head"]}),
        ("tiny_llama", {"r": 3, "target_modules": r".*\.(q|down)_proj"}),
        ("tiny_bert", {"r": 2, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
        ("tiny_llama", {"r": 2, "target_modules": "all-linear", "fan_in_fan_out": True}),
    ],
)
def test_parity_and_round_trip(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    adapter = assert_round_trip(name, tmp_path, ShiraConfig(**config))
    assert isinstance(adapter.variant, SHiRA)
    for tensors in adapter.tensors.values():
        assert tensors["indices"].dtype == torch.int64
        assert tensors["indices"].shape == (2, tensors["values"].numel())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, inputs = ZOO["plain_mlp"].fresh(torch.float64), ZOO["plain_mlp"].inputs()
    config = ShiraConfig(r=2, target_modules=["up", "down"])
    peft_files.make_peft(model, tmp_path / "f", config, inputs=inputs)
    return tmp_path / "f"


def test_indices_written_as_floats_on_windows(folder: Path) -> None:
    model, inputs = ZOO["plain_mlp"].fresh(torch.float64), ZOO["plain_mlp"].inputs()
    before = load_adapter(folder, model)
    for path in ("up", "down"):
        change_tensors(folder, {f"model.{path}.shira_indices": before.tensors[path]["indices"].float()})
    assert_equal(load_adapter(folder, model), before)
    assert_same(model, before, peft_files.load_peft(model, folder), inputs)


def test_custom_masks_are_in_the_file(folder: Path) -> None:
    """PEFT does not serialise a mask function; the positions are all that is needed."""
    before = load_adapter(folder)
    configure(folder, mask_type="mine")
    assert_equal(load_adapter(folder), before)


def test_positions_outside_the_weight(folder: Path) -> None:
    indices = load_adapter(folder).tensors["up"]["indices"].clone()
    indices[1, 0] = 10
    change_tensors(folder, {"model.up.shira_indices": indices.int()})
    with refuses("wrong_index", match=r"indices at 'up' holds \(\d+, 10\), outside the shape \(14, 10\)"):
        load_adapter(folder, ZOO["plain_mlp"].model())


def test_fractional_and_negative_positions(folder: Path) -> None:
    indices = load_adapter(folder).tensors["up"]["indices"]
    one_below = indices.int()
    one_below[0, 3] = -1
    twice = indices.int()
    twice[:, 3] = twice[:, 4]
    for wrong, match in (
        (indices.float() + 0.5, "not whole numbers"),
        (one_below, r"indices at 'up' holds \(-1, \d+\), outside"),
        (twice, "1 positions of indices at 'up' are given twice"),
    ):
        change_tensors(folder, {"model.up.shira_indices": wrong})
        for model in (None, ZOO["plain_mlp"].model()):
            with refuses("wrong_index", match=match):
                load_adapter(folder, model)


def test_values_that_do_not_fit(folder: Path) -> None:
    change_tensors(folder, {"model.up.shira_weight": torch.zeros(47)})
    with refuses("shape_mismatch", match=r"'up' do not belong together: shira_weight \(47,\)"):
        load_adapter(folder)


def test_r_of_the_configuration(folder: Path) -> None:
    configure(folder, r=7)
    with refuses("shape_mismatch", match="r = 7"):
        load_adapter(folder)


def test_numbers_of_values_that_peft_cannot_load(tmp_path: Path) -> None:
    model = ZOO["plain_mlp"].model()
    tensors = {"indices": torch.tensor([[0, 1], [2, 3]]), "values": torch.ones(2)}
    adapter = Adapter("x", SHiRA(ratio=0.1, targets=("up",)), {"up": tensors})
    with refuses("shape_mismatch"):  # 14 values, says the ratio
        save_adapter(adapter, tmp_path / "x", model=model)
    tensors = {"indices": torch.stack([torch.arange(14), torch.zeros(14, dtype=torch.int64)]), "values": torch.ones(14)}
    adapter = Adapter("x", SHiRA(ratio=0.1, targets=("up",)), {"up": tensors})
    with refuses("unsupported_field", match=r"not r·\(out \+ in\)"):
        save_adapter(adapter, tmp_path / "x", model=model)
    with pytest.raises(BaseNeeded, match="pass model="):
        save_adapter(adapter, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_peft_adapts_nn_linear_only(tmp_path: Path) -> None:
    model = ZOO["tiny_gpt2"].model()
    count = 48 + 144
    tensors = {
        "indices": torch.stack([torch.arange(count) // 48, torch.arange(count) % 48]),
        "values": torch.ones(count),
    }
    path = "transformer.h.0.attn.c_attn"
    adapter = Adapter("x", SHiRA(r=1, targets=(path,)), {path: tensors})
    with refuses("site_unsupported", match="which is GPT-2's Conv1D"):
        save_adapter(adapter, tmp_path / "x", model=model)
