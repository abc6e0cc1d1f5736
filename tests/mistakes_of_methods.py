"""Mistakes with single methods, with training and with compiled models, as those of ``tests/mistakes.py``."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import nn

import lorac
from lorac.analysis.entanglement import internal_entropy
from lorac.testing import conformance
from lorac.training import (
    ALLoRA,
    AlternatingFactors,
    AltLoRA,
    GaLoreAdamW,
    LoRAPlus,
    LoRAPro,
    NestedRanks,
    Preconditioned,
    ReLoRA,
    Squeeze,
    galore_groups,
    gate_loss,
    gate_penalty,
    leave_one_out,
    rank_stages,
    reduce_rank,
    thresholds,
)
from tests.mistakes import Mistake, Tiny, World, lora

QUERY = {"targets": ["q_proj"]}
"""A linear layer 24 -> 28."""


def _fits(w: World, variant: Any) -> Any:
    return w.compile({"a": variant})


def _sized(method: Any, wrong: dict[str, Any], *right: dict[str, Any]) -> Mistake:
    """Sizes that a layer does not admit, and others that it does."""
    return Mistake(
        f"{method.__name__} with {', '.join(f'{name}={value}' for name, value in wrong.items())}",
        lambda w: _fits(w, method(**QUERY, **wrong)),
        lambda w, said: [_fits(w, method(**QUERY, **sizes)) for sizes in right],
    )


def _grouped() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 4, 1, groups=2), nn.Conv1d(4, 4, 1))


def _locked() -> nn.Module:
    model = Tiny()
    model.lock = threading.Lock()
    return model


def _shown_by_copying(w: World, said: str) -> None:
    try:
        copy.deepcopy(_locked())
    except TypeError as error:
        assert str(error) in said
    w.compile({"a": lora()})


def _trained(w: World, variant: Any, **optimizer: Any) -> tuple[Any, Any]:
    compiled = w.compile({"a": variant})
    return compiled, torch.optim.SGD([p for p in compiled.parameters() if p.requires_grad], lr=0.1)


def _both(w: World, into: Any) -> tuple[Any, Any]:
    """A LoRA of rank 2 next to what is to take its sum."""
    compiled = w.compile({"a": lora(), "sum": into}, active={"a": 1.0, "sum": 1.0})
    return compiled, torch.optim.SGD([p for p in compiled.parameters() if p.requires_grad], lr=0.1)


def _one_factor(w: World) -> tuple[Any, Any]:
    compiled, optimizer = _trained(w, lora())
    compiled.adapters["a"].tensors[next(iter(compiled.adapters["a"].tensors))]["lora_A"].requires_grad_(False)
    return compiled, optimizer


def _exchanged(w: World) -> None:
    compiled, optimizer = _trained(w, lora())
    LoRAPro(compiled, optimizer)
    compiled.remove_adapter("a")
    optimizer.step()


def _nested(w: World, **rest: Any) -> None:
    NestedRanks(*_trained(w, lorac.DyLoRA(r=2, **QUERY)), **rest).remove()


def _halves(w: World, targets: str) -> Any:
    made = w.compile({"content": lorac.PLP(r=2, targets=["q_proj"]), "style": lorac.PLP(r=2, targets=[targets])})
    return lorac.PLP.join(*made.adapters.values(), name="both")


def _budgeted(w: World, **allowed: Any) -> Any:
    with lorac.budget(**allowed):
        return lorac.load_adapter(w.path("sql"))


def _adapter(w: World, variant: Any) -> Any:
    return w.compile({"a": variant}).adapters["a"]


def _stepped(w: World, *, closure: bool = False, alike: bool = False, reg: float = 0.0) -> None:
    """One step of a LoRA whose factors are away from their start, in one direction alone if they are to be alike."""
    compiled, optimizer = _trained(w, lora())
    with torch.no_grad():
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.fill_(1.0) if alike else parameter.normal_()

    def loss() -> torch.Tensor:
        answer = compiled(**w.inputs).square().mean()
        answer.backward()
        return answer

    with Preconditioned(compiled, optimizer, reg=reg):
        if not closure:
            loss()
        optimizer.step(loss if closure else None)


def _saved(w: World, variant: Any, name: str, **rest: Any) -> None:
    lorac.save_adapter(_adapter(w, variant), w.path(f"saved_{name}"), model=w.model, **rest)


METHODS = [
    _sized(lorac.BAT, {"r": 3}, {"r": 4}),
    _sized(lorac.BOFT, {"block_size": 5}, {"block_size": 4}, {"block_size": 0, "block_num": 6}),
    _sized(lorac.FourierFT, {"n_frequency": 10_000}, {"n_frequency": 100}),
    _sized(lorac.WaveFT, {"n_frequency": 10_000}, {"n_frequency": 100}),
    _sized(lorac.C3A, {"block_size": 5}, {"block_size": 4}),
    _sized(lorac.GraLoRA, {"k": 3, "r": 6}, {"k": 2, "r": 6}),
    _sized(lorac.HRA, {"r": 40, "apply_GS": True}, {"r": 24, "apply_GS": True}, {"r": 40}),
    _sized(lorac.LoLDU, {"r": 40}, {"r": 24}),
    _sized(lorac.LoRAXS, {"r": 40}, {"r": 24}),
    _sized(lorac.PSOFT, {"r": 40}, {"r": 24}),
    _sized(lorac.MiSS, {"r": 50}, {"r": 24}),
    _sized(lorac.MiSS, {"r": 4, "mini": True, "mini_r": 5}, {"r": 4, "mini": True, "mini_r": 4}),
    _sized(lorac.OFT, {"block_size": 1, "r": 0}, {"block_size": 4, "r": 0}),
    _sized(lorac.Poly, {"n_splits": 3}, {"n_splits": 2}),
    _sized(lorac.RoAd, {"group_size": 6}, {"group_size": 4}),
    _sized(lorac.RoAd, {"group_size": 7}, {"group_size": 4}),
    _sized(lorac.VBLoRA, {"vector_length": 5}, {"vector_length": 4}),
    _sized(lorac.VBLoRA, {"vector_length": 4, "topk": 0}, {"vector_length": 4, "topk": 1}),
    Mistake(
        "a full matrix for a convolution of groups",
        lambda w: lorac.compile(_grouped(), {"a": lorac.TeRA(targets=["0", "1"])}),
        lambda w, said: lorac.compile(_grouped(), {"a": lorac.TeRA(targets=["0", "1"], exclude=["0"])}),
    ),
    Mistake(
        "a trained bias that D scales",
        lambda w: lorac.GLoRAHadamard(bias="all"),
        lambda w, said: lorac.GLoRAHadamard(bias="all", config_D_E="none"),
    ),
    Mistake("blocks that do not divide a rank", lambda w: lorac.GraLoRA(r=5), lambda w, said: lorac.GraLoRA(r=6)),
    Mistake("a task that is not there", lambda w: lorac.Poly(task=1), lambda w, said: lorac.Poly(task=1, n_tasks=2)),
    Mistake(
        "a chain of what edits no weight",
        lambda w: lorac.Chain(parts=(lorac.LoRA(), lorac.Hydra())),
        lambda w, said: lorac.Chain(parts=(lorac.LoRA(), lorac.variants()["dora"]())),
    ),
    Mistake("halves at other layers", lambda w: _halves(w, "out_proj"), lambda w, said: _halves(w, "q_proj")),
    Mistake(
        "a start that is misspelt",
        lambda w: _fits(w, lorac.AdapterTune(init="smal", targets="all-blocks")),
    ),
    Mistake(
        "routing between no LoRAs",
        lambda w: lorac.MeteoRA.from_loras([]),
        lambda w, said: lorac.MeteoRA.from_loras([w.eager.adapters["sql"]]),
    ),
    Mistake(
        "a rank for LoRAs that have one",
        lambda w: lorac.MeteoRA.from_loras([w.eager.adapters["sql"]], r=4),
        lambda w, said: lorac.MeteoRA.from_loras([w.eager.adapters["sql"]]),
    ),
]

TRAINING = [
    Mistake(
        "training what only answers",
        lambda w: NestedRanks(w.program, None),
        lambda w, said: lorac.compile(w.model, {"a": lorac.DyLoRA(r=2, **QUERY)}, target="eager").train(),
    ),
    Mistake(
        "a rule without an adapter of its method",
        lambda w: NestedRanks(w.eager, None),
        lambda w, said: w.compile({"a": lorac.DyLoRA(**{**QUERY, "r": 2})}),
    ),
    Mistake(
        "a rule for an optimizer of nothing",
        lambda w: NestedRanks(
            _trained(w, lorac.DyLoRA(r=2, **QUERY))[0], torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        ),
        lambda w, said: _nested(w),
    ),
    Mistake(
        "ranks that no layer has",
        lambda w: _nested(w, ranks=[3]),
        lambda w, said: (_nested(w, ranks=[1, 2]), _nested(w, ranks=None)),
    ),
    Mistake("thresholds that fall", lambda w: thresholds(2.0, 1.0, 3)),
    Mistake("a spacing that there is not", lambda w: thresholds(0.0, 1.0, 3, "log")),
    Mistake(
        "a geometric spacing from 0",
        lambda w: thresholds(0.0, 1.0, 3, "exp_linear"),
        lambda w, said: thresholds(first=0.1, last=1.0, count=3, spacing="exp_linear"),
    ),
    Mistake(
        "moments twice",
        lambda w: AltLoRA((made := _trained(w, lora()))[0], torch.optim.AdamW(made[1].param_groups)),
    ),
    Mistake("a factor without the other", lambda w: LoRAPro(*_one_factor(w))),
    Mistake("a damping below 0", lambda w: LoRAPro(*_trained(w, lora()), damping=-1.0)),
    Mistake("a rule over what is gone", _exchanged),
    Mistake("a factor that there is not", lambda w: AlternatingFactors(first="C")),
    Mistake(
        "ALLoRA with a scale",
        lambda w: ALLoRA(*_trained(w, lorac.LoRA(r=2, alpha=4, **QUERY))),
        lambda w, said: ALLoRA(*_trained(w, lorac.LoRA(r=2, alpha=2, **QUERY))).remove(),
    ),
    Mistake("a ratio of 0", lambda w: LoRAPlus(*_trained(w, lora()), ratio=0.0)),
    Mistake(
        "restarts into nothing",
        lambda w: ReLoRA(*_trained(w, lora()), into="sum", every=2),
        lambda w, said: ReLoRA(*_both(w, lorac.Full(**QUERY)), into="sum", every=2).remove(),
    ),
    Mistake(
        "restarts into too little",
        lambda w: ReLoRA(*_both(w, lorac.LoRA(r=1, **QUERY)), into="sum", every=2),
        lambda w, said: ReLoRA(*_both(w, lorac.LoRA(r=8, **QUERY)), into="sum", every=2).remove(),
    ),
    Mistake("stages that rise", lambda w: Squeeze(*_trained(w, lora()), stages=((1, 2), (2, 2)))),
    Mistake("stages without a step", lambda w: rank_stages(8, 1, 2)),
    Mistake(
        "squeezing to nothing",
        lambda w: reduce_rank(w.eager.adapters["sql"], 0),
        lambda w, said: reduce_rank(w.eager.adapters["sql"], rank=1),
    ),
    Mistake(
        "GaLore over a LoRA",
        lambda w: galore_groups(w.compile({"a": lora()})),
        lambda w, said: w.compile({"a": lorac.Full(**QUERY)}),
    ),
    Mistake(
        "a side that there is not",
        lambda w: GaLoreAdamW([{"params": [nn.Parameter(torch.ones(2, 2))], "rank": 1, "proj_type": "up"}]),
    ),
    Mistake(
        "vectors projected",
        lambda w: GaLoreAdamW([{"params": [nn.Parameter(torch.ones(2))], "rank": 1}]),
        lambda w, said: GaLoreAdamW([{"params": [nn.Parameter(torch.ones(2))]}]),
    ),
    Mistake(
        "a gate's loss without its logits",
        lambda w: gate_loss(w.compile({"a": lorac.MeteoRA(**QUERY)}), torch.tensor([0])),
        lambda w, said: w.compile({"a": lorac.MeteoRA(**QUERY)}, aux=["router"]),
    ),
    Mistake("one draw alone", lambda w: leave_one_out(torch.ones(1), torch.ones(1))),
    Mistake("a regulariser below 0", lambda w: Preconditioned(*_trained(w, lora()), reg=-1.0)),
    Mistake(
        "a penalty without gates", lambda w: gate_penalty(w.compile({"a": lorac.SoRA(r=2, **QUERY)}, active=None), 0.1)
    ),
]

BESIDES = [
    Mistake(
        "LoRA-C at a kernel that is not square",
        lambda w: lorac.compile(nn.Sequential(nn.Conv2d(4, 4, (3, 1))), {"a": lorac.LoRAC(targets=["0"])}),
        lambda w, said: lorac.compile(nn.Sequential(nn.Conv2d(4, 4, (3, 1))), {"a": lorac.LoRA(targets=["0"])}),
    ),
    Mistake(
        "a ring of unequal factors",
        lambda w: _fits(w, lorac.TLoRA(residual="ttv", dims=((4, 7), (2, 3, 4)), **QUERY)),
        lambda w, said: _fits(w, lorac.TLoRA(residual="ttv", dims=((4, 7), (4, 6)), **QUERY)),
    ),
    Mistake(
        "an update that is no matrix",
        lambda w: lorac.LoRAXS.from_update({"layers.0.q_proj": torch.ones(28)}, name="a", r=2),
        lambda w, said: lorac.LoRAXS.from_update({"layers.0.q_proj": torch.ones(28, 24)}, name="a", r=2),
    ),
    Mistake(
        "a chain of adapters that edit no weight",
        lambda w: lorac.Chain.of(_adapter(w, lorac.MeteoRA(r=1, **QUERY)), name="both"),
        lambda w, said: lorac.Chain.of(*w.eager.adapters.values(), name="both"),
    ),
    Mistake(
        "routing between LoRAs with a bias",
        lambda w: lorac.MeteoRA.from_loras([_adapter(w, lora(lora_bias=True))]),
        lambda w, said: lorac.MeteoRA.from_loras([_adapter(w, lora())]),
    ),
    Mistake(
        "ranks of their own, saved for PEFT",
        lambda w: _saved(w, lorac.HiRA(r=2, rank_pattern={"layers.0.q_proj": 1}, **QUERY), "ranks"),
        lambda w, said: (
            _saved(w, lorac.HiRA(r=2, rank_pattern={"layers.0.q_proj": 1}, **QUERY), "ranks", format="native"),
            _saved(w, lorac.HiRA(r=2, **QUERY), "one_rank"),
        ),
    ),
    Mistake(
        "a step that computes its gradients itself",
        lambda w: _stepped(w, closure=True),
        lambda w, said: _stepped(w),
    ),
    Mistake(
        "factors that have no inverse",
        lambda w: _stepped(w, alike=True),
        lambda w, said: _stepped(w, alike=True, reg=0.1),
    ),
    Mistake(
        "a conformance suite of a method without defaults",
        lambda w: list(conformance(lorac.Chain)),
        lambda w, said: (
            conformance(lorac.Chain(parts=(lorac.LoRA(r=1),))),
            conformance(lorac.Chain, parts=(lorac.LoRA(r=1),)),
        ),
    ),
    Mistake(
        "interleaving unequal numbers of sites",
        lambda w: internal_entropy(torch.eye(4, 8), order="interleaved", out_dims=(2, 2), in_dims=(2, 2, 2)),
        lambda w, said: internal_entropy(torch.eye(4, 8), order="row_major", out_dims=(2, 2), in_dims=(2, 2, 2)),
    ),
]

AFTERWARDS = [
    Mistake(
        "a stage that there is not",
        lambda w: w.program.graph["main"].after("fuse"),
        lambda w, said: w.program.graph["main"].after(w.program.graph["main"].stages[-1]),
    ),
    Mistake(
        "a module that is not in the graph",
        lambda w: w.program.graph["main"].at("layer.0"),
        lambda w, said: (str(w.program.graph).index("layers.0"), w.program.graph["main"].at("layers.0")),
    ),
    Mistake(
        "exporting what was loaded",
        lambda w: lorac.load(w.path("compiled")).export("eager"),
        lambda w, said: w.compile(adapters=lorac.load(w.path("compiled")).adapters),
    ),
    Mistake("a model that cannot be copied", lambda w: lorac.compile(_locked(), {"a": lora()}), _shown_by_copying),
    Mistake("no time to read a file", lambda w: _budgeted(w, seconds=0), lambda w, said: _budgeted(w, seconds=10)),
    Mistake("no room to read a file", lambda w: _budgeted(w, bytes=0), lambda w, said: _budgeted(w, bytes=1 << 20)),
    Mistake(
        "a method that PEFT does not have, saved for PEFT",
        lambda w: _saved(w, lorac.MeteoRA(r=1, **QUERY), "no_peft"),
        lambda w, said: (
            _saved(w, lorac.MeteoRA(r=1, **QUERY), "no_peft", format="native"),
            lorac.save_adapter(
                lorac.freeze_router(_adapter(w, lorac.MeteoRA(r=1, **QUERY)), [1, 0, 0, 0.5]),
                w.path("frozen"),
                model=w.model,
            ),
        ),
    ),
    Mistake(
        "places that PEFT does not have, saved for PEFT",
        lambda w: _saved(w, lorac.SHiRA(ratio=0.01, **QUERY), "share"),
        lambda w, said: (
            _saved(w, lorac.SHiRA(ratio=0.01, **QUERY), "share", format="native"),
            _saved(w, lorac.SHiRA(r=1, **QUERY), "rank"),
        ),
    ),
    Mistake(
        "layers that PEFT's type does not adapt, saved for PEFT",
        lambda w: _saved(w, lorac.SHiRA(r=1, targets=["conv"]), "conv"),
        lambda w, said: (
            _saved(w, lorac.SHiRA(r=1, targets=["conv"]), "conv", format="native"),
            _saved(w, lorac.LoRA(r=1, targets=["conv"]), "lora"),
        ),
    ),
    Mistake(
        "components whose example inputs are not by name",
        lambda w: lorac.compile({"a": w.model}, example_inputs=w.inputs).graph,
        lambda w, said: str(lorac.compile({"a": w.model}, example_inputs={"a": w.inputs}).graph),
    ),
]

MORE = [*METHODS, *TRAINING, *BESIDES, *AFTERWARDS]
