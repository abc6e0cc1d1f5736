"""Mistakes in training loops of one's own: rows of ``tests/test_mistakes.py``."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import nn

import lorac
from lorac import training
from tests.mistakes import Mistake, Tiny, World, example, lora

ROUTED = {"r": 2, "experts": 3, "top_k": 1, "targets": ["q_proj"]}
EXPERTS = torch.tensor([0, 1])


def _trained(w: World, adapters: Any = None, **rest: Any) -> Any:
    given = adapters or {"a": lora()}
    return w.compile(given, active=dict.fromkeys(given, 1.0), **rest).train()


def _optimizer(compiled: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([tensor for tensor in compiled.parameters() if tensor.requires_grad], lr=1e-2)


def _step(compiled: Any, optimizer: Any) -> None:
    compiled(**example()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _rule(w: World, kind: Any, adapters: Any = None, **settings: Any) -> Any:
    compiled = _trained(w, adapters)
    return kind(compiled, _optimizer(compiled), **settings)


def _step_by_closure(w: World, *, closure: bool) -> None:
    compiled = _trained(w)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    training.Preconditioned(compiled, optimizer, reg=0.1)
    loss = compiled(**example()).square().mean()
    loss.backward()
    optimizer.step(lambda: loss) if closure else optimizer.step()


def _step_without_an_adapter(w: World, *, removes_rule: bool) -> None:
    compiled = _trained(w, {"a": lora(), "b": lora()})
    optimizer = _optimizer(compiled)
    rule = training.LoRAPlus(compiled, optimizer)
    compiled.swap("a")
    compiled.remove_adapter("b")
    if removes_rule:
        rule.remove()
    _step(compiled, optimizer)


def _go_on(w: World, r: int, name: str = "a") -> None:
    states = []
    for adapters in ({"a": lora()}, {name: lora(r)}):
        compiled = _trained(w, adapters)
        optimizer = _optimizer(compiled)
        training.name_optimizer_state(compiled, optimizer)
        if states:
            optimizer.load_state_dict(states[0])
        _step(compiled, optimizer)
        states.append(optimizer.state_dict())


def _gate_loss(w: World, experts: torch.Tensor = EXPERTS, adapter: Any = None, **rest: Any) -> Any:
    compiled = _trained(w, {"a": adapter or lorac.MeteoRA(**ROUTED)}, **rest)
    compiled(**example())
    return training.gate_loss(compiled, experts)


def _sampled_loss(
    w: World, aux: Any = ("log_prob",), draws: int = 2, mean: Any = lambda y: y.flatten(1).mean(1)
) -> Any:
    compiled = _trained(w, {"a": lorac.ReMix(**ROUTED)}, aux=["log_prob"])
    return training.sampled_selection_loss(compiled, example(), mean, draws=draws)


def _galore(w: World, adapter: Any = None, rank: int = 2) -> Any:
    compiled = _trained(w, {"a": adapter or lorac.Full(targets=["q_proj"])})
    return training.GaLoreAdamW(training.galore_groups(compiled, rank=rank), lr=1e-3)


def _relora(w: World, every: int = 2, **adapters: Any) -> Any:
    return _rule(w, training.ReLoRA, {"a": lora(), **adapters}, into="sum", every=every)


SUM = {"sum": lora(8, alpha=8)}
LOOPS = [
    Mistake(
        "a rule over the optimizer of another model",
        lambda w: training.LoRAPlus(_trained(w), _optimizer(Tiny())),
        lambda w, said: _rule(w, training.LoRAPlus),
    ),
    Mistake(
        "a rule of a method that no adapter has",
        lambda w: _rule(w, training.ProximalGates, threshold=0.1),
        lambda w, said: _rule(w, training.ProximalGates, {"a": lorac.SoRA(targets=["q_proj"])}, threshold=0.1),
    ),
    Mistake(
        "a rule on a model that was not compiled",
        lambda w: training.LoRAPlus(Tiny(), _optimizer(Tiny())),
        lambda w, said: _rule(w, training.LoRAPlus),
    ),
    Mistake(
        "a rule on a program",
        lambda w: training.LoRAPlus(w.program, _optimizer(Tiny())),
        lambda w, said: _rule(w, training.LoRAPlus),
    ),
    Mistake(
        "a rule on what is baked",
        lambda w: training.LoRAPlus(w.baked, _optimizer(Tiny())),
        lambda w, said: [_rule(w, training.LoRAPlus), _trained(w, mode="fused")],
    ),
    Mistake(
        "a closure where the rule reads gradients",
        lambda w: _step_by_closure(w, closure=True),
        lambda w, said: _step_by_closure(w, closure=False),
    ),
    Mistake(
        "removing an adapter that a rule has",
        lambda w: _step_without_an_adapter(w, removes_rule=False),
        lambda w, said: _step_without_an_adapter(w, removes_rule=True),
    ),
    Mistake("a ratio below zero", lambda w: _rule(w, training.LoRAPlus, ratio=-4.0)),
    Mistake(
        "nested ranks of a method without them",
        lambda w: _rule(w, training.NestedRanks),
        lambda w, said: _rule(w, training.NestedRanks, {"a": lorac.DyLoRA(r=2, targets=["q_proj"])}),
    ),
    Mistake("stages of rising ranks", lambda w: _rule(w, training.Squeeze, stages=((2, 2), (4, 2)))),
    Mistake(
        "restarts into an adapter that is not there",
        _relora,
        lambda w, said: [_relora(w, **SUM), _relora(w, sum=lorac.Full(targets=["q_proj"]))],
    ),
    Mistake("restarts after no step", lambda w: _relora(w, 0, **SUM)),
    Mistake(
        "restarts into too small a rank",
        lambda w: _relora(w, sum=lora(1)),
        lambda w, said: _relora(w, sum=lorac.Full(targets=["q_proj"])),
    ),
    Mistake("a first factor that there is not", lambda w: training.AlternatingFactors(first="C")),  # type: ignore[arg-type]
    Mistake("the state of an adapter of another rank", lambda w: _go_on(w, 3)),
    Mistake("the state of an adapter of another name", lambda w: _go_on(w, 2, "b")),
    Mistake(
        "names for the optimizer of another model",
        lambda w: training.name_optimizer_state(_trained(w), _optimizer(Tiny())),
        lambda w, said: _go_on(w, 2),
    ),
    Mistake("GaLore of no rank", lambda w: _galore(w, rank=0)),
    Mistake("GaLore of a LoRA", lambda w: _galore(w, lora()), lambda w, said: _galore(w)),
    Mistake(
        "a loss of gates without gates",
        lambda w: _gate_loss(w, adapter=lora()),
        lambda w, said: _gate_loss(w, aux=["router"]),
    ),
    Mistake(
        "a loss of gates that are not emitted",
        _gate_loss,
        lambda w, said: _gate_loss(w, aux=["router"]),
    ),
    Mistake("experts of more rows", lambda w: _gate_loss(w, torch.arange(3), aux=["router"])),
    Mistake("an expert that there is not", lambda w: _gate_loss(w, EXPERTS + 8, aux=["router"])),
    Mistake("one draw", lambda w: _sampled_loss(w, draws=1)),
    Mistake("a loss for all rows together", lambda w: _sampled_loss(w, mean=lambda y: y.mean())),
    Mistake("pruning gates of a LoRA", lambda w: training.prune_gates(w.eager.adapters["sql"])),
    Mistake(
        "parts of a model that was not compiled",
        lambda w: training.shard_base(Tiny()),
        lambda w, said: _trained(w),
    ),
    Mistake("parts for one process", lambda w: training.shard_base(_trained(w))),
    Mistake(
        "a copy of a model that trains",
        lambda w: copy.deepcopy(_trained(w)),
        lambda w, said: _trained(w).export(target="eager"),
    ),
    Mistake(
        "a pickle of a model that trains",
        lambda w: torch.save(_trained(w), io.BytesIO()),
        lambda w, said: _trained(w).export(target="eager"),
    ),
    Mistake(
        "PEFT's adapter over a compiled model",
        lambda w: _wrap(_trained(w))(**example()),
        lambda w, said: w.compile({"a": _configuration()}),
    ),
]  # fmt: skip


def _configuration() -> Any:
    import peft

    return peft.LoraConfig(target_modules=["q_proj"])


def _wrap(model: nn.Module) -> Any:
    import peft

    return peft.get_peft_model(model, _configuration())
