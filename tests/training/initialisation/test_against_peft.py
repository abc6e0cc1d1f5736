"""Each start that PEFT has, next to PEFT's own: the same factors, the same rest of the base, the same ranks."""

from __future__ import annotations

import copy
import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

import lorac
from lorac.testing import assert_close
from lorac.training import initialisation as starts
from tests import peft_files
from tests.limits import assert_sketched
from tests.training.loops import data, host

TARGETS = ["q_proj", "k_proj", "down_proj"]
COMMON: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS}
LORA = lorac.LoRA(r=2, alpha=3, targets=tuple(TARGETS))


def layers(wrapped: Any, begun: lorac.Adapter) -> Any:
    """PEFT's layer, lorac's tensors and the base's weight, site by site."""
    for path, own in begun.tensors.items():
        layer = wrapped.base_model.model.get_submodule(path)
        yield layer, own, layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def rest(model: nn.Module, path: str, own: dict[str, Tensor]) -> Tensor:
    weight: Any = model.get_submodule(path).weight
    return weight.detach() - own["start_B"] @ own["start_A"]


def assert_same_start(model: nn.Module, wrapped: Any, begun: lorac.Adapter, *, close: Any = assert_close) -> None:
    """The product and what is left of the base; of components that may point either way the factors do not agree."""
    for path, (layer, own, a, b) in zip(begun.tensors, layers(wrapped, begun), strict=True):
        close(own["lora_B"] @ own["lora_A"], b @ a)
        close(rest(model, path, own), layer.base_layer.weight.detach())
        assert begun.variant.at_path(path).method.scale == layer.scaling["default"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("init", "start"), [("pissa", starts.PiSSA()), ("olora", starts.OLoRA())])
def test_of_weights(init: str, start: starts.Initialiser) -> None:
    model = host("tiny_llama")
    wrapped = peft_files.wrap(model, LoraConfig(**COMMON, init_lora_weights=init))
    assert_same_start(model, wrapped, start(LORA, model))


def test_pissa_by_rounds() -> None:
    """Of weights whose components fall off, as trained ones' do: both sketches then find the same."""
    model = host("tiny_llama")
    for parameter in model.parameters():
        if parameter.ndim == 2:
            u, s, vh = torch.linalg.svd(parameter.detach(), full_matrices=False)
            parameter.data.copy_(u * (s * 0.5 ** torch.arange(len(s))) @ vh)
    wrapped = peft_files.wrap(model, LoraConfig(**COMMON, init_lora_weights="pissa_niter_16"))
    assert_same_start(model, wrapped, starts.PiSSA(rounds=16)(LORA, model), close=assert_sketched)


@pytest.mark.medium("the other mode", cases=["kpm"])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's module wants attrs for one decorator, which the standard library's does as well."""
    monkeypatch.setitem(
        sys.modules, "attr", sys.modules.get("attr") or SimpleNamespace(dataclass=dataclasses.dataclass)
    )
    from peft.tuners.lora.corda import preprocess_corda

    model, batches = host("tiny_llama"), data("tiny_llama", 12, rows=1)
    config = LoraConfig(**COMMON, init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode))
    copied: Any = copy.deepcopy(model)
    preprocess_corda(copied, config, lambda: [copied(**batch) for batch in batches])  # type: ignore[arg-type]
    wrapped = get_peft_model(copied, config)
    begun = starts.CorDA(mode=mode)(LORA, model, batches)
    assert_same_start(model, wrapped, begun, close=assert_sketched)
    for _, own, a, b in layers(wrapped, begun):  # each component as long as PEFT's, in A and in B
        assert_sketched(own["lora_A"].norm(dim=1), a.norm(dim=1))
        assert_sketched(own["lora_B"].norm(dim=0), b.norm(dim=0))


def fall_off(model: nn.Module) -> None:
    """Make what lies along later axes ever smaller, so that components differ by any decomposition."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(0.7 ** torch.arange(len(parameter))[:, None])
            parameter.data.mul_(0.7 ** torch.arange(parameter.shape[1]))


@pytest.mark.medium("the other direction", cases=["A2rBr"])
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr"])
def test_lora_ga(direction: Any) -> None:
    """Each vector up to its sign; of r = 16 PEFT's decomposition, of 4·r columns, is whole."""
    model, batches = host("tiny_llama"), data("tiny_llama", 3, rows=4, length=16)
    settings = LoraGAConfig(direction=direction)
    config = LoraConfig(**COMMON | {"r": 16, "lora_alpha": 24}, init_lora_weights="lora_ga", lora_ga_config=settings)
    copied: Any = copy.deepcopy(model)
    copied.enable_input_require_grads()  # PEFT counts its batches by hooks that torch warns of otherwise
    preprocess_loraga(copied, config, lambda: [copied(**batch).loss.backward() for batch in batches])  # type: ignore[arg-type]
    wrapped = get_peft_model(copied, config)
    fresh = lorac.LoRA(r=16, alpha=24, targets=LORA.targets)
    begun = starts.LoRAGA(peft=True, direction=direction)(fresh, model, batches)
    for path, (layer, own, a, b) in zip(begun.tensors, layers(wrapped, begun), strict=True):
        signs = [
            (mine * theirs).sum(axis).sign() for mine, theirs, axis in ((own["lora_A"], a, 1), (own["lora_B"], b, 0))
        ]
        assert_sketched(own["lora_A"] * signs[0][:, None], a)
        assert_sketched(own["lora_B"] * signs[1], b)
        assert_close(rest(model, path, own) + 1.5 * own["lora_B"] @ own["lora_A"], weight(layer, a, b))


def weight(layer: Any, a: Tensor, b: Tensor) -> Tensor:
    """PEFT's whole weight at the start, which is the base's."""
    return layer.base_layer.weight.detach() + layer.scaling["default"] * b @ a  # type: ignore[no-any-return]


@pytest.mark.medium("one rank for all", cases=["2.0"])
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva(rho: float) -> None:
    """The same ranks and scales; the components, where they fall off, as near as PEFT's own sketches come to them."""
    model, batches = host("tiny_llama"), data("tiny_llama", 1, rows=4, length=16)
    fall_off(model)
    config = LoraConfig(**COMMON, init_lora_weights="eva", eva_config=EvaConfig(rho=rho, tau=0.999))
    wrapped: Any = peft_files.wrap(model, config)
    with torch.random.fork_rng(devices=[]):
        initialize_lora_eva_weights(wrapped, batches, show_progress_bar=False)
    begun = starts.EVA(rho=rho)(LORA, model, batches)
    for path, (layer, own, a, _) in zip(begun.tensors, layers(wrapped, begun), strict=True):
        assert own["lora_A"].shape == a.shape
        assert begun.variant.at_path(path).scale == layer.scaling["default"]  # type: ignore[attr-defined]
        assert bool((torch.cosine_similarity(own["lora_A"], a).abs() > 0.99).all())
    assert (rho == 1) == (not wrapped.peft_config["default"].rank_pattern)
