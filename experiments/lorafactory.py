"""Is LoRA at its best rate as good as its variants at theirs, and does their order change without a sweep?

    python -m experiments.lorafactory [--seeds 5] [--steps 100] [--smoke]
    python -m experiments.lorafactory --page docs/taxonomy.md

Every method of lorac's that fits a perceptron which reads characters, and LoRA's other rules and first values, learn
code by the same steps and batches, at the rank that comes nearest to the number of values of LoRA of rank 8. Each is
tried at rates √10 apart, on other seeds, until its best one lies between two that are worse. "Better" and "worse" than
LoRA is what separates by the 95 % interval of the paired differences. "Of LoRA's size" are those that train at most a
quarter more or fewer values than LoRA. How far two orders agree is Spearman's correlation, of a seed's order with the
mean losses over the other seeds.

Runs are kept one by one in .cache/experiments/lorafactory, so that a run that was stopped goes on, and are shared out
to a process for each core. ``--page`` writes the page of families, forms and costs from the last whole run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments._finding import Expected, Finding, Table
from experiments._lora_variants import count_values, ways
from experiments._runs import Run, Runs, kept_runs
from experiments._statistics import interval
from experiments._study import CHOOSERS, CHOOSING, Experiment, main

RATES = tuple(10 ** (exponent / 2) for exponent in range(-9, 6))
FIRST = range(4, 7)
"""The rates that are tried first: 0.003 to 0.03."""
BEST, AT_LORAS, AT_TENTH = "each at its best rate", "all at LoRA's best rate", "all at a tenth of it"
SHARES, ORDERS, VALUES, TIME = "variants beside LoRA", "agreement of orders", "values trained", "time of a training"
LORA, SMOKE = "lora", ("lora", "dora", "ia3", "LoRA+", "PiSSA")


def best_rates(runs: Runs, names: Sequence[str], steps: int, tried: Sequence[int]) -> dict[str, float]:
    """Return the best rate of each way, after trying lower or higher ones where it lies at an edge."""
    spans, seeds = {name: (tried[0], tried[-1]) for name in names}, range(CHOOSING, CHOOSING + CHOOSERS)
    best, waiting = dict[str, int](), list(names)
    while waiting:
        spanned = {name: range(spans[name][0], spans[name][1] + 1) for name in waiting}
        runs.ask(Run(n, RATES[i], seed, steps) for n, span in spanned.items() for i in span for seed in seeds)
        for name, span in spanned.items():
            best[name] = min(span, key=lambda i: statistics.fmean(runs.losses(name, RATES[i], seeds, steps)))
            spans[name] = max(min(span[0], best[name] - 1), 0), min(max(span[-1], best[name] + 1), len(RATES) - 1)
        waiting = [name for name, span in spanned.items() if spans[name] != (span[0], span[-1])]
    return {name: RATES[index] for name, index in best.items()}


def find(given: argparse.Namespace) -> Finding:
    """Return the losses at each rate, how many are better than LoRA, and how far the orders agree."""
    names = SMOKE if given.smoke else tuple(ways())
    runs = Runs(None if given.smoke else kept_runs("lorafactory"))
    best = best_rates(runs, names, given.steps, FIRST if not given.smoke else FIRST[1:2])
    lora = RATES.index(best[LORA])
    rates = {BEST: best, AT_LORAS: dict.fromkeys(names, RATES[lora]), AT_TENTH: dict.fromkeys(names, RATES[lora - 2])}
    seeds = range(given.seeds)
    runs.ask(Run(name, at[name], seed, given.steps) for at in rates.values() for name in names for seed in seeds)
    found = {title: {n: runs.losses(n, at[n], seeds, given.steps) for n in names} for title, at in rates.items()}
    values = {name: count_values(ways()[name].method) for name in names}
    times = {n: min(seconds for run, (_, seconds) in runs.done.items() if run.way == n) for n in names}
    return Finding(
        [
            *(Table(title, "loss on the whole code", scores, rates[title]) for title, scores in found.items()),
            Table(SHARES, "share of them", _shares(found[BEST], values)),
            Table(
                ORDERS,
                "with the order at best rates",
                {title: _agree(one, found[BEST]) for title, one in found.items()},
            ),
            Table(VALUES, "by each", {name: [count] for name, count in values.items()}),
            Table(
                TIME, "the shortest, over LoRA's", {name: [seconds / times[LORA]] for name, seconds in times.items()}
            ),
        ],
        EXPECTED,
    )


def _shares(losses: dict[str, list[float]], values: dict[str, int]) -> dict[str, list[float]]:
    """Return the shares of variants that are better than LoRA, within noise of it, and worse."""
    apart = {name: interval(own, losses[LORA]) for name, own in losses.items() if name != LORA}
    alike = [name for name in apart if 0.75 <= values[name] / values[LORA] <= 1.25]
    shares = dict[str, list[float]]()
    for whose, names in (("all", list(apart)), ("of LoRA's size", alike)):
        better, worse = (sum(apart[name][1] < 0 for name in names), sum(apart[name][0] > 0 for name in names))
        counts = {"better": better, "within noise": len(names) - better - worse, "worse": worse}
        shares |= {f"{whose}: {what}": [count / len(names)] for what, count in counts.items()}
    return shares


def _agree(losses: dict[str, list[float]], at_best: dict[str, list[float]]) -> list[float]:
    """Return the correlation of each seed's order with that of the mean losses at best rates over the other seeds."""
    own, best = (torch.tensor([*one.values()], dtype=torch.float64) for one in (losses, at_best))
    found = []
    for seed in range(own.shape[1]):
        others = torch.cat([best[:, :seed], best[:, seed + 1 :]], 1).mean(1)
        places = [one.argsort().argsort().double() for one in (own[:, seed], others)]
        found.append(float(torch.corrcoef(torch.stack(places))[0, 1]))
    return found


EXPECTED = [
    Expected(SHARES, "all: better", 0.5, "section 5"),
    Expected(SHARES, "of LoRA's size: better", 0.5, "section 5"),
    Expected(ORDERS, AT_LORAS, BEST, "section 5"),
    Expected(ORDERS, AT_TENTH, BEST, "section 5"),
]
EXPERIMENT = Experiment(
    claim="At its best rate LoRA is no worse than most variants at theirs, whose order at one rate is another.",
    source="He et al., LoRAFactory, arXiv 2601.22708, section 5",
    find=find,
    steps=100,
    fails_by="variants that are mostly better than LoRA at their best rates, or one order at all rates",
)

if __name__ == "__main__":
    if "--page" in sys.argv:
        from experiments._taxonomy import write_page

        write_page(Path(sys.argv[sys.argv.index("--page") + 1]))
    else:
        main(EXPERIMENT, "lorafactory", __doc__)
