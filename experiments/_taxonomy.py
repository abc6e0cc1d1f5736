"""The page of all ways of training an adapter: families, forms and costs from the code, losses from the experiment."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments._lora_variants import LEFT_OUT, ways
from experiments._statistics import interval
from experiments.lorafactory import AT_LORAS, BEST, LORA, TIME, VALUES
from lorac.cli.models import method_rows
from lorac.variants import variants

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "LoRA": ("lora",),
    "Rank: expansion": ("bat*", "fourierft*", "full*", "hira", "loha", "lokr", "plp*", "shira*", "tlora*"),
    "Rank: sharing": ("miss*", "randlora", "tera*", "vblora", "vera", "pvera*"),
    "Rank: budgeting": ("adalora", "dylora*", "sora"),
    "Optimization: stability": ("rsLoRA", "LoRA+", "Riemannian"),
    "Optimization: alignment with full fine-tuning": ("dora", "LoRA-Pro", "AltLoRA*", "AltLoRA+*", "ALLoRA*"),
    "Initialisation: from weights": ("PiSSA", "MiLoRA", "OLoRA", "loldu*"),
    "Initialisation: from gradients": ("LoRA-GA", "LoRA-One", "LoRA-SB"),
    "Initialisation: from activations": ("CorDA", "EVA"),
    "Mixture of experts": ("flylora*",),
}
"""The survey's axes -> ways of training; with a star those that the survey does not place. Others are other forms."""
HEAD = """# Families of methods

Every method that fits a small perceptron, and LoRA's own rules and first values,
learn the same code in {steps} steps, each at its best learning rate. [Methods](methods.md) has formulas, files and
papers; [Architecture](architecture.md#the-one-idea) says how each form runs.

The families are the axes of *A Unified Study of LoRA Variants*, [arXiv 2601.22708](https://arxiv.org/abs/2601.22708).
A star marks those that the survey does not place; they stand where they come nearest.

- *form*: on that perceptron's kind of layer, as in [Methods](methods.md). Low-rank forms run next to the weight and are
  swapped by rebinding, per call or per row; sparse, delta and dense ones in a merged weight; branches as a subgraph.
- *values*: trained, and *time* of the shortest training over LoRA's, compilation included, on one core.
- *loss*: after training at the *best rate*, the mean over {seeds} seeds, less LoRA's {lora:.3f}; in bold where the 95 %
  interval of the paired differences leaves 0 out. *At LoRA's rate* is the same at {rate:.2g}.

| family | way | form | merges | values | time | best rate | loss | at LoRA's rate |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
FOOT = """
*Made by `python -m experiments.lorafactory --page docs/taxonomy.md` from the code and the last whole run of that
[experiment](experiments.md#lorafactory).*
"""


def write_page(path: Path) -> None:
    """Write the page from the result that is kept, whatever code it was run with; without single scores leave it."""
    from experiments.__main__ import RESULTS

    result = json.loads((RESULTS / "lorafactory.json").read_text(encoding="utf-8"))
    tables = {table["title"]: table for table in result["tables"]}
    if LORA not in tables[BEST]["scores"]:
        print(f"{path} stays as it is: the run's single scores are lost; python -m experiments lorafactory --again")
        return
    lora, rate = statistics.fmean(tables[BEST]["scores"][LORA]), tables[BEST]["rates"][LORA]
    head = HEAD.format(steps=result["steps"], seeds=result["seeds"], lora=lora, rate=rate)
    left_out = "\n".join(f"- {name}: {why}" for name, why in LEFT_OUT.items())
    tail = f"\nOf the methods for linear layers, these were left out:\n\n{left_out}\n{FOOT}"
    path.write_text(head + "\n".join(_rows(tables)) + "\n" + tail, encoding="utf-8")


def _rows(tables: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    known = {row.name: row for row in method_rows(variants().values())}
    placed = [(family, name) for family, names in FAMILIES.items() for name in names]
    known_names = {name.rstrip("*") for _, name in placed}
    placed += [("Other forms", f"{name}*") for name in ways() if name not in known_names]
    for family, starred in placed:
        name = starred.rstrip("*")
        if name not in tables[VALUES]["scores"]:
            continue  # a method newer than the run
        row, values, time = known[ways()[name].method.name], tables[VALUES], tables[TIME]
        cells = (
            family,
            f"{name}\\*" if starred != name else name,
            row.form,
            "yes" if row.merges else "no",
            f"{values['scores'][name][0]:,}",
            f"{time['scores'][name][0]:.1f}",
            f"{tables[BEST]['rates'][name]:.2g}",
            *(_difference(tables[title]["scores"], name) for title in (BEST, AT_LORAS)),
        )
        yield f"| {' | '.join(cells)} |"


def _difference(scores: Mapping[str, list[float]], name: str) -> str:
    low, high = interval(scores[name], scores[LORA])
    text = f"{statistics.fmean(scores[name]) - statistics.fmean(scores[LORA]):+.3f}"
    return f"**{text}**" if low > 0 or high < 0 else text
