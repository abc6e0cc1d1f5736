"""A model whose tensors have no values is rejected where values are needed, and its sites are listed all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from torch import nn

import lorac
from lorac.testing import assert_close

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
LORA = {"a": lorac.LoRA(r=2, targets=["0"])}


def loaded() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).eval()


HOSTS: dict[str, Callable[[Path], nn.Module]] = {
    "cpu": lambda _: cpu_offload(loaded(), execution_device=torch.device("cpu")),
    "disk": lambda folder: disk_offload(loaded(), str(folder), execution_device=torch.device("cpu")),
    "part": lambda folder: dispatch_model(
        loaded(), {"0": "cpu", "1": "cpu", "2": "disk"}, main_device="cpu", offload_dir=str(folder)
    ),
    "meta": lambda _: loaded().to("meta"),
}


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@pytest.mark.parametrize("host", HOSTS)
def test_rejects_a_model_without_values(host: str, target: str, tmp_path: Path) -> None:
    """accelerate's hooks give a layer its values for one call: an adapter's part would be computed without them."""
    model, where = HOSTS[host](tmp_path), "2.weight" if host == "part" else "0.weight"
    says = "is on the meta device" if host == "meta" else "is offloaded: accelerate loads its values"
    with pytest.raises(lorac.BaseNeeded, match=f"'{where}' {says}"):
        lorac.compile(model, LORA, target=target, example_inputs=(X,))
    assert lorac.sites(model).keys() == {"0", "2"}


def test_rejects_merging_and_extracting_without_values() -> None:
    model, adapter = loaded(), lorac.compile(loaded(), LORA).adapters["a"]
    with pytest.raises(lorac.BaseNeeded, match=r"'0.weight' is on the meta device"):
        lorac.merge_into(loaded().to("meta"), {"a": adapter})
    with pytest.raises(lorac.BaseNeeded, match=r"'0.weight' is on the meta device"):
        lorac.extract(model, loaded().to("meta"), rank=2)


@torch.no_grad()
def test_compiles_a_model_whose_offload_was_removed() -> None:
    model = HOSTS["cpu"](Path())
    expected = model(X)
    assert_close(lorac.compile(remove_hook_from_module(model, recurse=True), LORA)(X), expected)
