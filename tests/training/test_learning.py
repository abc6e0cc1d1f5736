"""Every method learns, by a plain loop and by Trainer, with checkpointing and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.testing import assert_close
from tests import zoo
from tests.training.loops import by_trainer, data, host, plain_loop, trained, variant

METHODS = ("lora", "dora", "shira", "hydra")
HOSTS = [
    pytest.param("tiny_llama", 5e-3, id="llama"),
    pytest.param("minilm", 5e-3, id="minilm", marks=pytest.mark.slow),
]
STEPS, FALL = 10, 0.95


def checkpointed(compiled: Any, reentrant: bool = False) -> None:
    """Turn the host's own gradient checkpointing on."""
    compiled.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        compiled.enable_input_require_grads()


@pytest.mark.medium("LoRA, and test_every_method.py has SHiRA", cases=["llama-shira-plain"])
@pytest.mark.slow("a low-rank method and a sparse one", keep=["llama-lora-checkpointed", "llama-shira-plain"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "lr"), HOSTS)
def test_a_plain_loop_learns(name: str, lr: float, method: str, checkpointing: bool) -> None:
    model = host(name)
    mark = zoo.fingerprint(model)
    compiled = lorac.compile(model, {"a": variant(method, name)})
    if checkpointing:
        checkpointed(compiled)
    frozen = {key: p.detach().clone() for key, p in compiled.named_parameters() if not p.requires_grad}
    before = [tensor.detach().clone() for tensor in trained(compiled)]
    assert {id(t) for t in trained(compiled)} <= {id(t) for t in compiled.adapters["a"].parameters()}

    losses = plain_loop(compiled, data(name, STEPS, distinct=False), lr=lr, decay=0.1)
    assert losses[-1] <= FALL * losses[0], losses
    assert all(not torch.equal(now, then) for now, then in zip(trained(compiled), before, strict=True))
    assert all(torch.equal(dict(compiled.named_parameters())[key], tensor) for key, tensor in frozen.items())
    assert zoo.fingerprint(model) == mark


@pytest.mark.slow("plain loops, and one method", keep=["llama-lora-checkpointed"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "lr"), HOSTS)
def test_trainer_learns(name: str, lr: float, method: str, checkpointing: bool, tmp_path: Path) -> None:
    model = host(name)
    mark = zoo.fingerprint(model)
    compiled = lorac.compile(model, {"a": variant(method, name)})
    batches = data(name, STEPS, distinct=False)
    losses = by_trainer(compiled, batches, tmp_path, lr=lr, checkpointing=checkpointing)
    assert len(losses) == STEPS
    assert losses[-1] <= FALL * losses[0], losses
    assert zoo.fingerprint(model) == mark


@pytest.mark.slow("test_trainer_learns with it")
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-hooks", "reentrant"])
@pytest.mark.parametrize("fields", [{}, {"dropout": 0.1}], ids=["whole", "dropout"])
@pytest.mark.parametrize("method", ["lora", "hydra"])
def test_checkpointing_changes_no_gradient(method: str, fields: dict[str, float], reentrant: bool) -> None:
    model = host("tiny_llama")
    adapters = {name: variant(method, "tiny_llama", **fields) for name in ("a", "b")}
    compiled = lorac.compile(model, adapters, active="a")
    plain_loop(compiled, data("tiny_llama", 2), lr=1e-2)
    compiled.swap("b")
    plain_loop(compiled, data("tiny_llama", 2), lr=1e-2)
    batch = data("tiny_llama", 1)[0]

    def gradients(choice: Any) -> list[torch.Tensor | None]:
        compiled.train()
        compiled.zero_grad()
        torch.manual_seed(0)
        compiled(**batch, adapters=choice).loss.backward()
        return [None if t.grad is None else t.grad.clone() for t in trained(compiled)]

    choices = ["b", "a", {"a": 0.7, "b": 0.3}]  # "b" is active, the others are for one call
    plain = [gradients(choice) for choice in choices]
    checkpointed(compiled, reentrant)
    for choice, expected in zip(choices, plain, strict=True):
        for found, wanted in zip(gradients(choice), expected, strict=True):
            assert (found is None) == (wanted is None)
            if found is not None and wanted is not None:
                assert_close(found, wanted)
