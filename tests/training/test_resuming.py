"""One's own loop that goes on from files: moments on the tensors they were of, and the draws that would have come."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorac
from lorac.testing import assert_close
from tests.training.every_rule import through_a_file
from tests.training.loops import data, host, trained
from tests.zoo import ZOO

SAVED, STEPS = 2, 4
ADAPTERS: dict[str, Any] = {
    "bottlenecks": lambda: {"a": lorac.Bottleneck(dropout=0.2, reduction_factor=4.0)},
    "replaced": lambda: {"a": lorac.LoRA(r=2, targets=["query", "key"], bias="all", modules_to_save=["classifier"])},
    "two": lambda: {"z": lorac.LoRA(r=2, targets=["query", "value"]), "a": lorac.LoRA(r=2, targets=["key", "query"])},
    "shared": lambda: {"a": lorac.VeRA(r=4, dropout=0.1, targets=["query", "key"])},
}


def started(adapters: Any, model: nn.Module) -> tuple[Any, Any]:
    compiled: Any = lorac.compile(model, adapters, active=dict.fromkeys(adapters, 1.0))
    return compiled, torch.optim.AdamW(trained(compiled), lr=1e-2)


def go_on(compiled: Any, optimizer: Any, steps: range) -> None:
    compiled.train()
    for batch in data("tiny_bert", STEPS)[steps.start : steps.stop]:
        optimizer.zero_grad()
        compiled(**batch).loss.backward()
        optimizer.step()


def values(compiled: Any) -> dict[tuple[str, ...], Tensor]:
    found: dict[tuple[str, ...], Tensor] = {}
    for name, adapter in compiled.adapters.items():
        found |= {(name, path, key): t for path, own in adapter.tensors.items() for key, t in own.items()}
        found |= {(name, key): tensor for key, tensor in adapter.replaced.items()}
    return {key: tensor.detach().clone() for key, tensor in found.items()}


@pytest.mark.medium("two adapters", keep=["two"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_loop_resumes_from_files_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = host("tiny_bert")
    torch.manual_seed(0)
    compiled, optimizer = started(ADAPTERS[name](), model)
    go_on(compiled, optimizer, range(SAVED))
    for own, adapter in compiled.adapters.items():
        lorac.save_adapter(adapter, tmp_path / f"{own}.safetensors", format="native")
    saved = through_a_file({"optimizer": optimizer.state_dict(), "random": torch.get_rng_state()})
    go_on(compiled, optimizer, range(SAVED, STEPS))

    read = {file.stem: lorac.load_adapter(file) for file in sorted(tmp_path.iterdir())}
    resumed, other = started(read, model)
    other.load_state_dict(saved["optimizer"])
    torch.manual_seed(100)
    torch.set_rng_state(saved["random"])
    go_on(resumed, other, range(SAVED, STEPS))
    found, expected = values(resumed), values(compiled)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_order_of_parameters_does_not_depend_on_the_order_of_adapters() -> None:
    model = ZOO["plain_mlp"].model()
    lora = lorac.LoRA(r=2, targets=["up", "down"])
    one: Any = lorac.compile(model, {"z": lora, "a": lora})
    other: Any = lorac.compile(model, {"a": lora})
    other.add_adapter(lora, "z")
    orders = [[name for name, p in net.named_parameters() if p.requires_grad] for net in (one, other)]
    assert orders[0] == orders[1] == sorted(orders[0], key=lambda name: name.split(".")[1])


class Recomputing(nn.Module):
    """Two layers with dropout between; they, or one after the other, may be computed again in backward."""

    def __init__(self, *, layers: bool = False, reentrant: bool = False) -> None:
        super().__init__()
        self.reentrant = reentrant
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(6, 8).double(), nn.Linear(8, 6).double()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        steps = (self._first, self.second)
        for step in steps:
            x = checkpoint(step, x, use_reentrant=self.reentrant) if self.layers else step(x)
        return x

    def _first(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.first(x), 0.3, self.training)


@pytest.mark.parametrize("recomputed", ["layers", "call"])
def test_checkpointing_draws_the_same_numbers(recomputed: str) -> None:
    """The model's own and the adapters'; other ones would make gradients of another loss."""
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    adapters = {
        "r": lorac.ReMix(r=2, experts=3, top_k=1, targets="all-linear"),
        "z": lorac.Bottleneck(targets=("second",), dropout=0.4, reduction_factor=2.0),
    }

    def gradients(*, layers: bool, call: bool) -> list[Tensor]:
        model = Recomputing(layers=layers)
        options: Any = {"active": {"r": 1.0, "z": 1.0}, "example_inputs": (x,), "aux": ["log_prob"]}
        compiled: Any = lorac.compile(model, adapters, **options)
        for number, tensor in enumerate(trained(compiled.train())):
            tensor.data.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
        torch.manual_seed(5)
        total = torch.zeros((), dtype=torch.float64)
        for rows in (x, 2 * x):
            output = checkpoint(compiled, rows, use_reentrant=False) if call else compiled(rows)
            total = total + output.square().sum()
        total.backward()
        return [tensor.grad for tensor in trained(compiled) if tensor.grad is not None]

    plain, other = (
        gradients(layers=False, call=False),
        gradients(layers=recomputed == "layers", call=recomputed == "call"),
    )
    assert len(plain) == len(other) > 4
    for found, expected in zip(other, plain, strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_are_recomputed_with_the_choice_of_their_call(reentrant: bool) -> None:
    """Calls with different adapters may precede one backward pass; nothing of a call outlives its graph."""
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lora = lorac.LoRA(r=2, targets="all-linear")

    def gradients(*, layers: bool) -> list[Tensor | None]:
        model = Recomputing(layers=layers, reentrant=reentrant)
        compiled: Any = lorac.compile(model, {"a": lora, "b": lora}, active="a", example_inputs=(x,))
        for number, tensor in enumerate(trained(compiled.train())):
            tensor.data.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
        torch.manual_seed(5)
        given = x.clone().requires_grad_()
        outputs = [compiled(given, adapters=name) for name in ("a", "b", {"a": 0.5, "b": 2.0})]
        torch.stack([output.square().sum() for output in outputs]).sum().backward()
        alive = [weakref.ref(output) for output in outputs]
        del outputs
        assert not any(output() is not None for output in alive)
        return [tensor.grad for tensor in trained(compiled)]

    for found, expected in zip(gradients(layers=True), gradients(layers=False), strict=True):
        assert found is not None and expected is not None
        assert_close(found, expected)
