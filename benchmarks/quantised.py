"""Perplexity of a model over quantised weights, next to the same model in float, in ONNX Runtime, on one text.

    python -m benchmarks.quantised [--model smollm2] [--characters 20000] [--only NAME ...] [--genai FOLDER]

The text is Python's own help (`pydoc_data.topics`). Each window of tokens is read alone, and every token but a window's
first is predicted. GPTQ learns from other text: sources of Python's library, or what the model writes. Next to lorac's
sides are models of onnxruntime-genai's builder, and the values of llama.cpp's Q4_0, which the `gguf` package computes,
in products of float32. Targets: int8 within 0.5 % of float's perplexity; int4 within 15 % of it, at <= 1.1 of the bytes
and of the time per token of the same without layers in eight bits, and no slower than float at any length.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import math
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _genai, common

FLOAT, AGAIN, NEAREST, GGUF = "float32", "float32, A/A", "int4, int4 head", "gguf Q4_0"
UNMIXED, GPTQ, OWN_TEXTS = "int4, not mixed", "int4, gptq", "int4, gptq, own texts"
SIDES: dict[str, dict[str, Any]] = {
    FLOAT: {},
    AGAIN: {},
    "int8": {"weights": "int8"},
    NEAREST: {"weights": "int4", "head": "int4", "mixed": False},
    f"{NEAREST}, zero points": {"weights": "int4", "head": "int4", "mixed": False, "symmetric": False},
    UNMIXED: {"weights": "int4", "mixed": False},
    "int4": {"weights": "int4"},
    "int4, k_quant": {"weights": "int4", "algorithm": "k_quant"},
    GPTQ: {"weights": "int4", "algorithm": "gptq"},
    OWN_TEXTS: {"weights": "int4", "algorithm": "gptq"},
    f"{GPTQ}, int4 head": {"weights": "int4", "algorithm": "gptq", "head": "int4"},
    "int4, float32 products": {"weights": "int4", "accuracy_level": 1},
    GGUF: {},
}
BUILT = {"genai int4": "rtn", "genai int4, k_quant": "k_quant", "genai int4, k_quant_mixed": "k_quant_mixed"}
"""Side -> how onnxruntime-genai's builder chooses codes."""
MODEL = common.Option("model", "smollm2", smoke="tiny", help="the host", choices=("smollm2", *common.LLAMAS))
LENGTHS = (1, 32, 128, 512)
"""The numbers of tokens of the calls that are timed."""
Logits = Callable[[Any], Any]
"""Ids (1, length) -> logits (1, length, vocabulary)."""


def sides(given: argparse.Namespace) -> list[str]:
    """Return the sides that are measured: all that can be, or float and those that are named."""
    every = [*SIDES, *(BUILT if _genai.found(given) else ())]
    return [side for side in every if side in {FLOAT, AGAIN, *given.only}]


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, float]:
    """One side's perplexity, the bytes of its weights, and the CPU-seconds of writing it and of a token."""
    model, tokenize = _model(given)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        logits, size = (_build if job[0] in BUILT else _compile)(job[0], model, tokenize, given, Path(folder))
        written = time.process_time() - begun
        found = [_loss(logits(window), window) for window in _windows(tokenize(_text(given)), given)]
        loss = sum(total for total, _ in found) / sum(count for _, count in found)
        ids = tokenize(_text(given))
        calls = {str(length): functools.partial(logits, ids[:, :length]) for length in LENGTHS}
        seconds = common.alternate(calls, given.rounds, clock=common.CLOCKS["cpu"])
    return {"perplexity": math.exp(loss), "bytes": float(size), "seconds": seconds, "written": written}


def _compile(
    side: str, model: Any, tokenize: Callable[[str], Any], given: argparse.Namespace, folder: Path
) -> tuple[Logits, int]:
    import lorac

    options, rounded = dict(SIDES[side]), 0
    if "weights" in options:
        options = {"accuracy_level": given.accuracy, "block_size": given.block, **options}
    if side.startswith(GPTQ) and side != OWN_TEXTS:
        source = "\n".join(inspect.getsource(module)[: given.calibration // 3] for module in (argparse, json, textwrap))
        options["calibration"] = [{"input_ids": window} for window in _windows(tokenize(source), given)]
    if side == GGUF:
        rounded = _round_as_gguf(model)
    compiled = lorac.compile(model, target="onnxruntime", self_test=False, threads=given.threads, **options)
    size = sum(held.size for name, held in compiled.engine.files.items() if name.endswith(".data"))
    return lambda ids: compiled(input_ids=ids).logits, rounded or size


def _round_as_gguf(model: Any) -> int:
    """Replace matrices by what Q4_0 makes of them; return the bytes that its blocks take."""
    import torch
    from gguf import GGMLQuantizationType, quants

    size = 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter.shape[1] % 32 == 0:
                blocks = quants.quantize(parameter.numpy(), GGMLQuantizationType.Q4_0)
                parameter.copy_(torch.from_numpy(quants.dequantize(blocks, GGMLQuantizationType.Q4_0)))
                size += blocks.nbytes
    return size


def _build(
    side: str, model: Any, tokenize: Callable[[str], Any], given: argparse.Namespace, folder: Path
) -> tuple[Logits, int]:
    import numpy as np
    import onnxruntime as ort
    import torch

    assert _genai.found(given)
    common.save_host(model, folder / "model", given)
    told = (
        f"algo_config={BUILT[side]}",
        f"accuracy_level={given.accuracy}",
        f"block_size={given.block}",
    )
    _genai.build(folder / "model", folder / "built", "int4", options=told)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = given.threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(folder / "built" / "model.onnx", settings, providers=["CPUExecutionProvider"])
    config = model.config  # the builder names the size of a head, where it gave its number before
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    past = {
        one.name: np.zeros((1, one.shape[1], 0, size), np.float32)
        for one in session.get_inputs()
        if one.name.startswith("past_key_values")
    }

    def logits(ids: Any) -> Any:
        inputs = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64), **past}
        return torch.from_numpy(session.run(["logits"], inputs)[0])

    return logits, sum(file.stat().st_size for file in (folder / "built").glob("*.data"))


def _loss(logits: Any, window: Any) -> tuple[float, int]:
    """Sum of −log p over the tokens of a window but its first, and how many they are."""
    import torch.nn.functional as F

    wanted = window[0, 1:]
    return float(F.cross_entropy(logits[0, :-1].double(), wanted, reduction="sum")), len(wanted)


def _text(given: argparse.Namespace) -> str:
    import pydoc_data.topics

    return "\n".join(pydoc_data.topics.topics.values())[: given.characters]


def _model(given: argparse.Namespace) -> tuple[Any, Callable[[str], Any]]:
    """Return the host, and what makes ids (1, tokens) of a text."""
    if given.model in common.LLAMAS:
        import torch

        vocabulary = common.LLAMAS[given.model]["vocab_size"]
        return common.llama(given), lambda text: torch.tensor([[ord(letter) % vocabulary for letter in text]])
    from examples.models import smollm2

    model, tokenizer = smollm2()
    return model, lambda text: tokenizer(text, return_tensors="pt").input_ids


def _windows(ids: Any, given: argparse.Namespace) -> list[Any]:
    """Return ids in windows (1, window) of more than one."""
    return [window for window in ids.split(given.window, dim=1) if window.shape[1] > 1]


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Perplexity and bytes of each side, and the time of calls of one sequence by its length, next to float's."""
    whole, measured = found[(FLOAT,)], sides(given)
    losses, times, again = [], [], {}
    for side in measured:
        one = found[(side,)]
        ratio = {what: one[what] / whole[what] for what in ("perplexity", "bytes")}
        figures = (f"{one['perplexity']:.3f}", f"{ratio['perplexity']:.3f}", f"{one['bytes'] / 1e6:.1f}")
        losses.append((side, *figures, f"{ratio['bytes']:.3f}", f"{one['written']:.0f}"))
        faster = {length: whole["seconds"][length] / seconds for length, seconds in one["seconds"].items()}
        pairs = zip(one["seconds"].values(), faster.values(), strict=True)
        times.append((side, *(f"{seconds * 1e3:.1f} ({of_float:.2f})" for seconds, of_float in pairs)))
        again |= {**ratio, **faster} if side == AGAIN else {}
    rows, notes = [(side,) for side in measured], [_genai.note(given)]
    title = f"{given.characters} characters in windows of {given.window} tokens, accuracy level {given.accuracy}"
    columns = ("weights", "perplexity", "of float's", "MB", "of float's bytes", "CPU s to write")
    lengths = [f"{length} tokens" for length in LENGTHS]
    return [
        common.Table(title, columns, losses, rows, again, notes),
        common.Table("CPU ms of a call (float's time over it)", ("weights", *lengths), times, rows, again),
    ]


BENCHMARK = common.Benchmark(
    name="quantised",
    text=__doc__,
    options=(
        MODEL,
        common.layers(20),
        common.rounds(30),
        common.Option("characters", 20_000, smoke=200, help="of the text"),
        common.Option("calibration", 7_500, smoke=300, help="characters of other text that GPTQ reads"),
        common.Option("window", 256, smoke=64, help="tokens that are read together"),
        common.Option("accuracy", 4, smoke=4, help="the accuracy level of products"),
        common.Option("block", 32, smoke=32, help="values that share a scale"),
        common.Option("threads", 2, smoke=1, help="of a session"),
        common.Option("only", (*SIDES, *BUILT), smoke=("int8", GPTQ, GGUF), help="sides to measure next to float's"),
        _genai.OPTION,
    ),
    jobs=lambda given: [(side,) for side in sides(given)],
    measure=measure,
    tables=tables,
    rooms=("lorac/backends", "lorac/passes"),
)

if __name__ == "__main__":
    BENCHMARK.main()
