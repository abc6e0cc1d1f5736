"""An adapter applied by its formula alone, site by site: the meaning of a file without any compiler."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

import lorac
from lorac import Adapter, Site, WeightVariant, load_adapter, save_adapter
from lorac.testing import eager_checks as checks
from tests import parity, peft_files
from tests.zoo import ZOO


def applied(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Return a copy of `model` with every site's weight W' and every replacement in place."""
    model = copy.deepcopy(model)
    for name, tensor in adapter.replaced.items():
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        old = getattr(owner, leaf)
        value = tensor.to(old.dtype)
        setattr(owner, leaf, nn.Parameter(value) if isinstance(old, nn.Parameter) else value)
    sites = lorac.sites(model)
    new = {path: _site(model, sites[path], adapter) for path in adapter.tensors}
    for path, module in new.items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
    return model


@torch.no_grad()
def _site(model: nn.Module, site: Site, adapter: Adapter) -> nn.Module:
    variant = adapter.variant.at(site)
    assert isinstance(variant, WeightVariant)
    module = copy.deepcopy(model.get_submodule(site.path))
    assert isinstance(module.weight, Tensor)
    dtype = module.weight.dtype
    cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in adapter.tensors[site.path].items()}
    tensors = SimpleNamespace(**cast)
    weight = variant.weight(site.present(module.weight), tensors)
    bias: Any = getattr(module, "bias", None)
    zeros = torch.zeros(site.out_features, dtype=dtype)
    if site.conv and site.conv.groups > 1:  # the formula may leave the blocks
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        module.groups = 1
        module.weight = nn.Parameter(weight.reshape(site.kernel))
    else:
        module.weight = nn.Parameter(site.store(weight).contiguous())
    if bias is not None or hasattr(tensors, "lora_bias"):
        module.bias = nn.Parameter(variant.new_bias(zeros if bias is None else bias, tensors))
    return module


@torch.no_grad()
def call(model: nn.Module, inputs: dict[str, Tensor]) -> object:
    return model.eval()(**inputs)


def assert_same(model: nn.Module, adapter: Adapter, oracle: PeftModel, inputs: dict[str, Tensor]) -> None:
    """Assert that the adapter means to lorac what PEFT computes."""
    parity.assert_parity(
        call(applied(model, adapter), inputs),
        call(oracle, inputs),
        call(model, inputs),
        names=None if len(inputs) == 1 else ["logits"],
    )


def assert_round_trip(name: str, folder: Path, config: PeftConfig, **options: Any) -> Adapter:
    """Assert that PEFT -> lorac -> PEFT -> lorac computes the same throughout; return the adapter as first read."""
    model = ZOO[name].fresh(torch.float64)
    inputs = ZOO[name].inputs(dtype=torch.float64)
    return round_trip(model, inputs, folder, config, **options)


def round_trip(
    model: nn.Module, inputs: dict[str, Tensor], folder: Path, config: PeftConfig, **options: Any
) -> Adapter:
    first, second, third = folder / "first", folder / "second", folder / "third"
    outputs = None if len(inputs) == 1 else ("logits",)
    oracle = peft_files.make_peft(
        model,
        first,
        config,
        inputs=inputs,
        outputs=outputs,
        **options,
    )
    adapter = load_adapter(first, model)
    assert_same(model, adapter, oracle, inputs)

    save_adapter(adapter, second, model=model)
    assert_close(call(peft_files.load_peft(model, second), inputs), call(oracle, inputs))
    again = load_adapter(second, model)
    assert_equal(again, adapter)

    save_adapter(load_adapter(first), third)  # nothing needs the model
    assert_equal(load_adapter(third, model), adapter)
    assert_close(call(peft_files.load_peft(model, third), inputs), call(oracle, inputs))
    return adapter


def assert_close(y: object, y_ref: object) -> None:
    got, ref = parity.named_outputs(y), parity.named_outputs(y_ref)
    for name, value in ref.items():
        checks.assert_close(got[name], value)


def assert_equal(one: Adapter, other: Adapter) -> None:
    """Assert the same method and the same tensors bit for bit; targets may be written otherwise."""
    assert type(one.variant) is type(other.variant)
    assert set(one.tensors) == set(other.tensors)
    for path, tensors in other.tensors.items():
        assert set(one.tensors[path]) == set(tensors)
        for name, tensor in tensors.items():
            assert one.tensors[path][name].dtype == tensor.dtype
            assert torch.equal(one.tensors[path][name], tensor), (path, name)
    assert set(one.replaced) == set(other.replaced)
    for name, tensor in other.replaced.items():
        assert torch.equal(one.replaced[name], tensor), name
