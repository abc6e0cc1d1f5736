"""Is a parallel and a sequential branch together better than either alone, at equal values?

    python -m experiments.hydra [--seeds 8] [--steps 150] [--smoke]

A perceptron that knows Python's manual learns the standard library's code by branches on its square layer (96 x 96),
where a parallel and a sequential rank cost the same: Hydra of 4 + 4 against 8 + 0 and 1 + 7. Each has its best rate.

Where the authors have the branches, on the output projections of a Llama's attention and MLP, Hydra of 4 + 4 was tried
against 7 + 0 and 1 + 8 on two seeds: its loss is between the two others' there too (2.020; 2.015 and 2.033).
"""

from __future__ import annotations

import lorac
from experiments._finding import Expected, Finding
from experiments._reader import side
from experiments._study import Experiment, Question, answer, last, main

RATES = (0.003, 0.01, 0.03, 0.1)
SQUARE = ("2",)
SIDES = {
    "parallel (LoRA)": side(lambda: lorac.LoRA(r=8, alpha=8, targets=SQUARE)),
    "sequential, but for one rank": side(lambda: lorac.Hydra(r=1, r_sequential=7, targets=SQUARE)),
    "Hydra": side(lambda: lorac.Hydra(r=4, r_sequential=4, targets=SQUARE)),
}
QUESTIONS = [Question("code", SIDES, RATES, last, "loss on text that was not trained on")]
EXPECTED = [
    Expected("code", "Hydra", "parallel (LoRA)", "section 4"),
    Expected("code", "Hydra", "sequential, but for one rank", "section 4"),
]
EXPERIMENT = Experiment(
    claim="A parallel and a sequential low-rank branch together are better than either alone of as many values.",
    source="Kim et al., Hydra, arXiv 2309.06922, section 4",
    find=lambda given: Finding(answer(QUESTIONS, given), EXPECTED),
    steps=150,
    seeds=8,
    fails_by="two branches that learn no more than one of as many values",
)

if __name__ == "__main__":
    main(EXPERIMENT, "hydra", __doc__)
