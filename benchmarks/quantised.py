"""Perplexity of a model over quantised weights beside the same model in float, in ONNX Runtime, on one text.

    python -m benchmarks.quantised [--model smollm2] [--characters 20000] [--window 256] [--accuracy 4]

The text is Python's own help (`pydoc_data.topics`). Each window of tokens is read alone, and every token but a window's
first is predicted. Targets: int8 within 1 % of float's perplexity; int4 under 0.2 of float's bytes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from benchmarks import common

FLOAT = "float32"
SIDES: dict[str, dict[str, Any]] = {
    FLOAT: {},
    f"{FLOAT}, A/A": {},
    "int8": {"weights": "int8"},
    "int4, symmetric": {"weights": "int4"},
    "int4, asymmetric": {"weights": "int4", "symmetric": False},
}
MODEL = common.Option("model", "smollm2", smoke="tiny", help="the host", choices=("smollm2", *common.LLAMAS))


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, float]:
    """One side's perplexity, and the bytes of its weights."""
    import lorac

    model, ids = _model(given)
    options = dict(SIDES[job[0]])
    if "weights" in options:
        options |= {"accuracy_level": given.accuracy, "block_size": given.block}
    compiled = lorac.compile(model, target="onnxruntime", self_test=False, threads=given.threads, **options)
    size = sum(held.size for name, held in compiled.engine.files.items() if name.endswith(".data"))
    losses = [_loss(compiled(input_ids=window).logits, window) for window in ids]
    loss = sum(total for total, _ in losses) / sum(count for _, count in losses)
    return {"perplexity": math.exp(loss), "bytes": float(size)}


def _loss(logits: Any, window: Any) -> tuple[float, int]:
    """Sum of −log p over the tokens of a window but its first, and how many they are."""
    import torch.nn.functional as F

    wanted = window[0, 1:]
    return float(F.cross_entropy(logits[0, :-1].double(), wanted, reduction="sum")), len(wanted)


def _model(given: argparse.Namespace) -> tuple[Any, list[Any]]:
    """Return the host, and the text in windows of ids (1, window)."""
    import pydoc_data.topics

    import torch

    text = "\n".join(pydoc_data.topics.topics.values())[: given.characters]
    if given.model in common.LLAMAS:
        vocabulary = common.LLAMAS[given.model]["vocab_size"]
        model, ids = common.llama(given), torch.tensor([[ord(letter) % vocabulary for letter in text]])
    else:
        from examples.models import smollm2

        model, tokenizer = smollm2()
        ids = tokenizer(text, return_tensors="pt").input_ids
    return model, [window for window in ids.split(given.window, dim=1) if window.shape[1] > 1]


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Each side beside float."""
    whole = found[(FLOAT,)]
    ratios = {side: {what: found[(side,)][what] / whole[what] for what in ("perplexity", "bytes")} for side in SIDES}
    rows = [
        (
            side,
            f"{found[(side,)]['perplexity']:.3f}",
            f"{ratios[side]['perplexity']:.3f}",
            f"{found[(side,)]['bytes'] / 1e6:.1f}",
            f"{ratios[side]['bytes']:.3f}",
        )
        for side in SIDES
    ]
    columns = ("weights", "perplexity", "of float's", "MB", "of float's bytes")
    title = f"{given.characters} characters in windows of {given.window} tokens, accuracy level {given.accuracy}"
    return [common.Table(title, columns, rows, [(side,) for side in SIDES], ratios[f"{FLOAT}, A/A"])]


BENCHMARK = common.Benchmark(
    name="quantised",
    text=__doc__,
    options=(
        MODEL,
        common.layers(20),
        common.Option("characters", 20_000, smoke=200, help="of the text"),
        common.Option("window", 256, smoke=64, help="tokens that are read together"),
        common.Option("accuracy", 4, smoke=4, help="the accuracy level of products"),
        common.Option("block", 32, smoke=32, help="values that share a scale"),
        common.Option("threads", 2, smoke=1, help="of a session"),
    ),
    jobs=lambda given: [(side,) for side in SIDES],
    measure=measure,
    tables=tables,
)

if __name__ == "__main__":
    BENCHMARK.main()
