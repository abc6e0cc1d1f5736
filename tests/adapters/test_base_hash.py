"""The hash of the base: which changes alter it, and which do not."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lorac
from lorac.adapters.base_hash import check_base, check_copy, compute_base_hash, compute_tensor_hash
from lorac.adapters.fit import check_adapter
from lorac.frontend.model_view import ModelView
from tests.refusing import refuses
from tests.zoo import ZOO

PATHS = ("up", "down", "embed")


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return ZOO["plain_mlp"].fresh(dtype)


def test_only_adapted_weights_count() -> None:
    base = compute_base_hash(ModelView.of(model()), PATHS)
    assert base == compute_base_hash(ModelView.of(model()), (*reversed(PATHS), "up"))
    assert base != compute_base_hash(ModelView.of(model()), PATHS[:2])
    for name, counts in (("up.weight", True), ("embed.weight", True), ("up.bias", False), ("head.weight", False)):
        changed = model()
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[-1] += 1e-3
        assert (compute_base_hash(ModelView.of(changed), PATHS) != base) is counts, name


def test_hash_covers_the_parameters_of_a_module_without_sites() -> None:
    changed = ZOO["tiny_llama"].fresh()
    base = compute_base_hash(ModelView.of(changed), ["model.norm"])
    with torch.no_grad():
        changed.model.norm.weight[0] += 1e-3
    assert compute_base_hash(ModelView.of(changed), ["model.norm"]) != base


@pytest.mark.medium("the file's other hashes, which are of contents alone")
def test_hash_is_the_same_in_another_process() -> None:
    code = (
        "import torch; from lorac.adapters.base_hash import compute_base_hash;"
        "from lorac.frontend.model_view import ModelView; m = torch.nn.Sequential(torch.nn.Linear(3, 4));"
        "torch.nn.init.ones_(m[0].weight); print(compute_base_hash(ModelView.of(m), ['0']))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ones = nn.Sequential(nn.Linear(3, 4))
    nn.init.ones_(ones.get_parameter("0.weight"))
    assert found.stdout.strip() == compute_base_hash(ModelView.of(ones), ["0"])


def test_accepts_files_of_a_base_in_its_original_dtype_and_widened(tmp_path: Path) -> None:
    """ONNX Runtime computes in float32 on a CPU; files of the base in float32 and in half precision are both of it."""
    variant, inputs = lorac.LoRA(r=2, targets=["up"]), ZOO["plain_mlp"].inputs()
    other = ZOO["plain_mlp"].fresh(torch.float16)
    other.get_parameter("up.weight").data += 1
    for name, base in (("wide", model()), ("half", model(torch.float16)), ("other", other)):
        made = lorac.compile(base, {name: variant}, example_inputs=inputs)
        lorac.save_adapter(made.adapters[name], tmp_path / name, format="native", model=base)
    room = lorac.Reserve(targets=["up"], rank=2, adapters=2)
    with pytest.warns(lorac.LoracWarning, match="computes in float32"):
        compiled = lorac.compile(
            model(torch.float16), {"wide": tmp_path / "wide"}, target="onnxruntime", example_inputs=inputs, reserve=room
        )
    compiled.save(tmp_path / "compiled")
    again = lorac.load(tmp_path / "compiled")
    again.remove_adapter("wide")
    again.add_adapter(tmp_path / "wide")
    for one in (compiled, again):
        one.add_adapter(tmp_path / "half")
        with refuses("base_mismatch", match="recorded float16:.* this model has float16:"):
            one.add_adapter(tmp_path / "other")


def test_compares_a_copy_with_a_parameter_in_its_original_dtype() -> None:
    recorded = compute_tensor_hash(model().get_parameter("embed.weight"))
    made = lorac.compile(model(), {"a": lorac.LoRA(r=2, targets=["up"])}).adapters["a"]
    adapter = dataclasses.replace(made, provenance={"copies": {"embed.weight": recorded}})
    wide = ModelView.of(model(torch.float16).float())
    check_adapter(adapter, dataclasses.replace(wide, widened={"embed.weight": torch.float16}))
    with refuses("base_mismatch", match="a copy of 'embed.weight'"):
        check_adapter(adapter, wide)


def test_layout_and_device_do_not_count() -> None:
    turned = model()
    up = turned.get_submodule("up")
    up.weight = nn.Parameter(turned.get_parameter("up.weight").detach().t().contiguous().t())
    assert compute_base_hash(ModelView.of(turned), PATHS) == compute_base_hash(ModelView.of(model()), PATHS)


def test_hash_covers_all_parameters_of_a_block() -> None:
    blocks = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), nn.Sequential(nn.Linear(4, 3)))
    changed = copy.deepcopy(blocks)
    with torch.no_grad():
        changed.get_parameter("0.1.bias")[0] += 1
    assert compute_base_hash(ModelView.of(blocks), ["0"]) != compute_base_hash(ModelView.of(changed), ["0"])
    assert compute_base_hash(ModelView.of(blocks), ["1"]) == compute_base_hash(ModelView.of(changed), ["1"])


@pytest.mark.parametrize("recorded", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_same_weights_in_another_dtype(recorded: torch.dtype, own: torch.dtype) -> None:
    """A model in a wider dtype is compared exactly; in a narrower one nothing can be said."""
    mark = compute_base_hash(ModelView.of(model(recorded)), PATHS)
    assert mark.startswith(str(recorded).removeprefix("torch."))
    check_base("x", mark, ModelView.of(model(recorded).to(own)), PATHS)
    other = model(recorded)
    with torch.no_grad():
        other.get_parameter("up.weight")[0, 0] += 1
    if torch.promote_types(own, recorded) == own:
        with refuses("base_mismatch", match="'x' was made for other base weights"):
            check_base("x", mark, ModelView.of(other.to(own)), PATHS)
    else:
        check_base("x", mark, ModelView.of(other.to(own)), PATHS)


def test_mixed_dtypes() -> None:
    mixed = model()
    mixed.get_submodule("up").to(torch.bfloat16)
    mark = compute_base_hash(ModelView.of(mixed), PATHS)
    assert mark.startswith("mixed:")
    check_base("x", mark, ModelView.of(mixed), PATHS)
    check_base("x", mark, ModelView.of(model()), PATHS)  # cannot be told


@pytest.mark.parametrize("recorded", ["nonsense:" + 32 * "0", "float32:00", "Tensor:" + 32 * "0", "", "float32"])
def test_rejects_text_that_is_not_a_hash(recorded: str) -> None:
    with refuses("base_mismatch", match="lorac writes no such hash"):
        check_base("x", recorded, ModelView.of(model()), PATHS)
    with refuses("base_mismatch", match="lorac writes no such hash"):
        check_copy("x", "up.weight", recorded, model().get_parameter("up.weight"))
