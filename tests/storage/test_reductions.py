"""Reductions that were stored prepare adapters to the bit as those that were traced, and trace nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import lorac
from lorac import Adapter
from lorac.adapters import preparation as preparing
from lorac.adapters.preparation import Preparer
from lorac.frontend.base_weights import make_base_reader
from lorac.storage.reductions import check_sizes, reduction_from_json

METHODS: dict[str, Any] = {
    "lora": lorac.LoRA(r=3, targets=["0"]),
    "dora": lorac.DoRA(r=2, targets=["0"]),
    "shira": lorac.SHiRA(r=1, targets=["0"]),
    "vera": lorac.VeRA(r=2, targets=["0"]),
    "loha": lorac.LoHa(r=2, targets=["0"]),
    "oft": lorac.OFT(block_size=3, targets=["0"]),
    "chain": lorac.Chain(parts=(lorac.LoRA(r=2), lorac.BAT(r=2)), targets=["0"]),
}


def _host() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 6)).eval()


def _adapter(name: str) -> Adapter:
    adapter = lorac.compile(_host(), {name: METHODS[name]}).adapters[name]
    with torch.no_grad():
        for tensor in adapter.parameters():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape))
    return adapter


@pytest.mark.parametrize("name", METHODS)
def test_stored_reductions_prepare_the_same_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, host = _adapter(name), _host()
    traced = Preparer(lorac.sites(host), make_base_reader(host))
    stored = json.loads(json.dumps(traced.stored_reductions([adapter])))
    assert len(stored) == 1
    expected = traced.prepare(adapter)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a formula was traced")

    monkeypatch.setattr(preparing, "reduce_weight", refuse)
    monkeypatch.setattr(preparing, "_REDUCTIONS", {})
    read = Preparer(lorac.sites(host), make_base_reader(host))
    read.stored = stored
    found = read.prepare(adapter)
    assert found.reasons == expected.reasons
    assert type(found.changes["0"]) is type(expected.changes["0"])
    for one, two in zip(_tensors(found.changes["0"]), _tensors(expected.changes["0"]), strict=True):
        assert torch.equal(one, two)
    assert read.stored_reductions([adapter]) == stored


def _tensors(change: Any) -> list[torch.Tensor]:
    tensors = [value for name, value in sorted(vars(change).items())]
    parts = [part for value in tensors for part in (value.values() if isinstance(value, Mapping) else (value,))]
    return [part for part in parts if isinstance(part, torch.Tensor)]


@pytest.mark.parametrize(("name", "own"), [("lora", lorac.LoRA), ("chain", lorac.BAT)])
def test_stores_no_reductions_of_methods_from_outside(name: str, own: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """An artifact does not answer for it, nor for one that it is part of."""
    host, adapter = _host(), _adapter(name)
    monkeypatch.setattr(own, "__module__", "mine")
    assert Preparer(lorac.sites(host), make_base_reader(host)).stored_reductions([adapter]) == {}


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("aten.new_zeros.default", [{"node": "w"}, [1 << 20, 1 << 20]]),
        ("aten.arange.default", [1 << 40]),
        ("aten.expand.default", [{"node": "b"}, [1 << 30, 6]]),
    ],
)
def test_rejects_huge_sizes_before_allocating(op: str, args: list[Any]) -> None:
    nodes = [{"input": "w"}, {"input": "b"}, {"name": "big", "op": op, "args": args, "kwargs": {}}]
    stored = {
        "form": "dense",
        "rank": 0,
        "reads_weight": False,
        "common": [],
        "params": [],
        "shared": [],
        "reasons": [],
    }
    reduction = reduction_from_json({**stored, "outputs": ["weight"], "nodes": [*nodes, {"output": [{"node": "big"}]}]})
    with pytest.raises(lorac.ArtifactError, match="far too large"):
        check_sizes(reduction, (6, 12), [])


def test_a_reduction_names_no_other_ops() -> None:
    stored: dict[str, Any] = {"form": "dense", "rank": 0, "reads_weight": False}
    stored |= {key: [] for key in ("common", "params", "shared", "reasons", "outputs")}
    call = {"name": "x", "op": "aten.from_file.default", "args": ["/etc/passwd"], "kwargs": {}}
    with pytest.raises(lorac.ArtifactError, match="', an op that "):
        reduction_from_json({**stored, "nodes": [call]})
    with pytest.raises(lorac.ArtifactError, match="'magic'"):
        reduction_from_json({**stored, "form": "magic", "nodes": []})
