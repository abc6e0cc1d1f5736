"""Do MeteoRA's gates send each token to the LoRA of its kind?

    python -m experiments.meteora_gates [--seeds 3] [--steps 200] [--smoke]

A small Llama over words learns prose (Python's own help topics), code (its standard library) and digits (aeon's
recordings of motions, as their files write them) together; a LoRA is trained for each kind, and then, as in the paper,
the gates alone, on the language model's loss and 50 times the gates'. Held out is the last tenth of each kind. What is
counted are pairs of a token and a gate, one gate in each linear layer: the share whose largest logit is that of the
token's own kind. The first layer's q, k and v see nothing but the word itself.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sysconfig
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

import lorac
from examples.models import package_folder
from experiments._finding import Expected, Finding, Table
from experiments._study import Experiment, Fault, main
from lorac.training import gate_loss

KINDS = ("prose", "code", "digits")
LENGTH, ROWS, RANK = 64, 8, 4
VOCABULARY, OTHERS = 1024, 64
STEPS = 200
Texts = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Figures:
    """What one seed gives.

    Attributes:
        right: share of (token, gate) pairs that are right, of all gates.
        by_kind: of the tokens of each kind.
        by_layer: of each layer's gates.
        losses: side -> the language model's loss on held-out text, the mean over kinds.
    """

    right: float
    by_kind: Mapping[str, float]
    by_layer: Mapping[str, float]
    losses: Mapping[str, float]


def texts() -> dict[str, torch.Tensor]:
    """Kind -> its words as numbers: the most frequent of all, the others by how they begin.

    A word is a name, a digit, a sign, or a line's end with the next one's indentation.
    """
    from pydoc_data.topics import topics

    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    motions = package_folder("aeon") / "datasets/data/BasicMotions/BasicMotions_TRAIN.ts"
    written = {
        "prose": "\n".join(topics.values()),
        "code": "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in library[:60]),
        "digits": motions.read_text(encoding="utf-8").partition("@data\n")[2],
    }
    words = {kind: re.findall(r"\d|[^\W\d]+|\n *|[^\w\s]", text[:400_000]) for kind, text in written.items()}
    counts = Counter(word for found in words.values() for word in found)
    rest = VOCABULARY - OTHERS
    numbers = {word: number for number, (word, _) in enumerate(counts.most_common(rest))}
    return {
        kind: torch.tensor([numbers.get(word, rest + ord(word[0]) % OTHERS) for word in found])
        for kind, found in words.items()
    }


def split(given: Texts) -> tuple[Texts, Texts]:
    """Split off the last tenth."""
    cuts = {kind: len(text) * 9 // 10 for kind, text in given.items()}
    return {k: text[: cuts[k]] for k, text in given.items()}, {k: text[cuts[k] :] for k, text in given.items()}


def batch(given: Texts, generator: torch.Generator, rows: int = ROWS) -> torch.Tensor:
    """Pieces of text (rows·kinds, LENGTH), kind after kind."""
    pieces = []
    for text in given.values():
        starts = torch.randint(len(text) - LENGTH, (rows,), generator=generator)
        pieces += [text[start : start + LENGTH] for start in starts.tolist()]
    return torch.stack(pieces)


def told(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the language model's loss."""
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(model: Any, loss: Callable[[], torch.Tensor], steps: int, rate: float) -> None:
    """Train everything that requires gradients with AdamW and weight decay."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.01)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    model.eval()


def host(seed: int) -> Any:
    """Return the Llama, fresh."""
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **sizes))


def study(seed: int, steps: int) -> Figures:
    """Train the base, the LoRAs and the gates, and hold them against held-out text."""
    known, held_out = split(texts())
    generator = torch.Generator().manual_seed(seed)
    model = host(seed)
    train(model, lambda: told(model, batch(known, generator)), 2 * steps, 3e-3)
    experts = []
    for kind in KINDS:
        one: Any = lorac.compile(model, {kind: lorac.LoRA(r=RANK, alpha=2 * RANK)})
        own = {kind: known[kind]}
        train(one, lambda one=one, own=own: told(one, batch(own, generator, 2 * ROWS)), steps // 2, 3e-3)  # type: ignore[misc]  # the defaults bind the loop's values
        experts.append(one.adapters[kind])
    routed: Any = lorac.compile(model, {"meteora": lorac.MeteoRA.from_loras(experts, seed=seed)}, aux=["router"])
    kinds = torch.arange(len(KINDS)).repeat_interleave(ROWS)

    def both() -> torch.Tensor:
        return told(routed, batch(known, generator)) + gate_loss(routed, kinds)

    train(routed, both, steps, 1e-2)
    return measured(model, experts, routed, held_out)


@torch.no_grad()
def measured(model: Any, experts: list[lorac.Adapter], routed: Any, held_out: Texts) -> Figures:
    """Return the figures, on the same pieces for all sides."""
    ids = batch(held_out, torch.Generator().manual_seed(0), 4 * ROWS)
    by_kind = dict(zip(KINDS, ids.chunk(len(KINDS)), strict=True))
    single: Any = lorac.compile(model, {adapter.name: adapter for adapter in experts})
    losses: dict[str, list[float]] = {"base": [], "its own LoRA": [], "routed": []}
    right = {}
    for index, (kind, own) in enumerate(by_kind.items()):
        losses["base"].append(told(model, own).item())
        single.swap(kind)
        losses["its own LoRA"].append(told(single, own).item())
        losses["routed"].append(told(routed, own).item())
        for path, logits in routed.aux["router"].items():
            right[kind, path] = (logits.argmax(-1) == index).double().mean().item()
    layers = sorted({path.split(".")[2] for _, path in right})
    return Figures(
        statistics.fmean(right.values()),
        {kind: statistics.fmean(v for (k, _), v in right.items() if k == kind) for kind in KINDS},
        {n: statistics.fmean(v for (_, path), v in right.items() if path.split(".")[2] == n) for n in layers},
        {side: statistics.fmean(values) for side, values in losses.items()},
    )


def find(given: argparse.Namespace) -> Finding:
    """Return how often the gates are right, and the losses beside LoRAs chosen by hand."""
    found = [study(seed, given.steps) for seed in range(given.seeds)]
    shares = {
        "all": [one.right for one in found],
        **{kind: [one.by_kind[kind] for one in found] for kind in KINDS},
        **{f"layer {n}": [one.by_layer[n] for one in found] for n in found[0].by_layer},
    }
    losses = {side: [one.losses[side] for one in found] for side in found[0].losses}
    return Finding(
        [
            Table(RIGHT, "share of pairs of token and gate", shares),
            Table(LOSS, "the mean over prose, code and digits", losses),
        ],
        EXPECTED,
    )


def open_all(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    """Return a weight of 1 for every expert."""
    return 0 * logits + 1


RIGHT, LOSS = "right", "loss on held-out text"
EXPECTED = [Expected(RIGHT, 0.8, "all"), Expected(LOSS, "routed", "base", "section 4")]
EXPERIMENT = Experiment(
    claim="Trained gates send each token to the LoRA of its kind.",
    source="Xu et al., MeteoRA, arXiv 2405.13053, section 4",
    find=find,
    steps=STEPS,
    seeds=3,
    fails_by="gates that send tokens to the LoRA of another kind",
    fault=Fault(
        "every expert acts whole, and no gate weighs it",
        lambda: patch("lorac.variants.meteora.top_k_softmax", open_all),
    ),
)

if __name__ == "__main__":
    main(EXPERIMENT, "meteora_gates", __doc__)
