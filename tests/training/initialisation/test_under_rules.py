"""Rules on adapters that a start took something out of the base for: as on a plain LoRA over the base that is left."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import lorac
from lorac import training
from lorac.testing import assert_close
from lorac.training.initialisation import PiSSA
from tests.training.every_rule import TARGETS, Host, batch, train
from tests.training.loops import trained

LORA = lorac.LoRA(r=4, alpha=8, targets=TARGETS)
RULES = {
    "altlora": training.AltLoRA,
    "lora_plus": training.LoRAPlus,
    "lora_pro": training.LoRAPro,
    "preconditioned": training.Preconditioned,
}


def compiled_of(host: Any, adapter: Any) -> Any:
    return lorac.compile(host, {"a": adapter}, example_inputs=batch(0)).train()  # type: ignore[attr-defined]  # eager


@pytest.mark.medium("one rule", keep=["altlora"])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_as_on_a_lora_over_the_base_that_is_left(name: str) -> None:
    host = Host()
    begun = PiSSA()(LORA, host)
    left, plain = copy.deepcopy(host), lorac.Adapter("a", LORA)
    for path, own in begun.tensors.items():
        plain.tensors[path] = {key: own[key].detach().clone() for key in ("lora_A", "lora_B")}
        with torch.no_grad():
            left.get_submodule(path).weight.sub_(own["start_B"] @ own["start_A"])
    found = {}
    for model, adapter in ((host, begun), (left, plain)):
        compiled = compiled_of(model, adapter)
        optimizer = torch.optim.SGD(trained(compiled), lr=0.05)
        with RULES[name](compiled, optimizer):
            train(compiled, optimizer, range(4))
        found[adapter.variant.name] = compiled.adapters["a"].tensors
    for path, own in found["residual"].items():
        assert not torch.equal(own["lora_B"], begun.tensors[path]["lora_B"])
        for key in ("lora_A", "lora_B"):
            assert_close(own[key].detach(), found["lora"][path][key].detach())


@pytest.mark.parametrize("rule", [training.ALLoRA, lambda c, o: training.Squeeze(c, o, stages=((4, 1), (2, 1)))])
def test_rejects_a_rule_that_rebuilds_the_change(rule: Any) -> None:
    host = Host()
    compiled = compiled_of(host, PiSSA()(LORA, host))
    optimizer = torch.optim.SGD(trained(compiled), lr=0.05)
    with pytest.raises(lorac.AdapterNotFound, match="no adapter is of method lora"):
        rule(compiled, optimizer)
    assert not optimizer._optimizer_step_pre_hooks
