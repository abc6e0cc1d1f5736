"""The cost of a hybrid's step in ONNX Runtime, next to a plain export of one step by transformers' own exporter.

    python -m benchmarks.hybrids [--only lfm2 bamba ...] [--width 1024] [--rank 16] [--rounds 41] [--clock cpu]

A step adds one token of one row behind 64 others. The plain export has the base alone, and transformers' cache as
inputs and outputs of fixed sizes: it can do this step and no other. "attention" is a decoder of as many layers that
only attend.
Targets: lorac's base <= 1.15 of the plain export, for each hybrid.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

PLAIN, BASE, AGAIN, LIVE = "plain export", "base", "base, A/A", "live"
SIDES = (PLAIN, BASE, AGAIN, LIVE)
TOKENS, LAYERS = 64, 3
_MAMBA = {"mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_d_state": 16}
_MIXED: Mapping[str, str] = {"lfm2": "conv", "qwen3_next": "linear_attention"}
"""Family -> its kind of layers that mix tokens; the layer in the middle attends."""
FAMILIES: Mapping[str, tuple[str, Callable[[int], Mapping[str, Any]]]] = {
    "attention": ("Llama", lambda width: {}),
    "lfm2": ("Lfm2", lambda width: {"block_multiple_of": 16}),
    "bamba": (
        "Bamba",
        lambda width: {"attn_layer_indices": [1], "mamba_n_heads": width // 32, "mamba_d_head": 64, **_MAMBA},
    ),
    "falcon_h1": (
        "FalconH1",
        lambda width: {"mamba_d_ssm": 2 * width, "mamba_n_heads": width // 32, "mamba_d_head": 64, **_MAMBA},
    ),
}
"""Family -> its class, and what its configuration has besides sizes that all have."""
TARGET = 1.15


def _model(family: str, width: int) -> Any:
    """Return a random model of some layers."""
    import torch
    import transformers

    name, more = FAMILIES[family]
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512}
    if family in _MIXED:
        sizes["layer_types"] = [_MIXED[family], "full_attention", _MIXED[family]]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, **more(width))
    return getattr(transformers, f"{name}ForCausalLM")(config).float().eval()


def prepare(given: argparse.Namespace) -> None:
    """Write what the sides of each family load."""
    import lorac

    for family in given.only:
        folder = Path(given.folder, family)
        if (folder / "done").exists():
            continue
        model = _model(family, given.width)
        folder.mkdir(parents=True, exist_ok=True)
        _export_step(model, folder / "step.onnx")
        lorac.compile(model, {}, target="onnxruntime", cache=True, self_test=False).save(folder / BASE)
        eager = lorac.compile(model, {"a": lorac.LoRA(r=given.rank, targets=["q_proj", "v_proj"])})
        common.away_from_init(eager.adapters["a"], seed=1)
        adapters = {"a": eager.adapters["a"]}
        live = lorac.compile(model, adapters, target="onnxruntime", mode="live", cache=True, self_test=False)
        live.save(folder / LIVE)
        (folder / "done").touch()


def _export_step(model: Any, path: Path) -> None:
    """Export one step, with transformers' cache behind a prompt as its inputs and outputs."""
    import torch

    from lorac.third_party_output import suppress_third_party_output

    ids = torch.arange(TOKENS)[None] + 5
    with torch.no_grad():
        output = model(ids, use_cache=True)
    name = next(key for key in ("cache", "past_key_values") if key in output)
    with suppress_third_party_output():  # transformers says that its exporter is new
        common.plain_export(model, path, {"input_ids": ids[:, -1:], name: output[name]})


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, float]:
    """Seconds per step of the sides of a family, in one process."""
    import lorac

    folder = Path(given.folder, job[0])
    loaded = {BASE: lorac.load(folder / BASE), AGAIN: lorac.load(folder / BASE), LIVE: lorac.load(folder / LIVE)}
    sides = {PLAIN: _plain_step(folder / "step.onnx", loaded[BASE].engine.options)}
    sides |= {name: _step(compiled) for name, compiled in loaded.items()}
    return common.alternate(sides, given.rounds, clock=common.CLOCKS[given.clock])


def _plain_step(path: Path, options: Any) -> common.Side:
    """Return a call of the exported step, with ones in its cache."""
    import numpy as np
    import onnxruntime as ort

    from lorac.backends.onnxruntime.inference_session import session_options

    session = ort.InferenceSession(path, session_options(options))
    kinds = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(bool)": np.bool_}
    inputs = {value.name: np.ones(value.shape, kinds[value.type]) for value in session.get_inputs()}
    return lambda: session.run(None, inputs)


def _step(compiled: Any) -> common.Side:
    """Return a call that adds a token to a row behind a prompt."""
    import torch

    from lorac.frontend.components import MAIN_GRAPH
    from lorac.ir.slots.choice import UNSET
    from lorac.target.kv_cache import DecodeStep

    cache = compiled.engine.new_cache(MAIN_GRAPH, 1, 8 * TOKENS)
    one, ids = torch.full((1, 1), 7), torch.arange(TOKENS)[None] + 5

    def add(tokens: Any) -> Any:
        step = DecodeStep(ids=tokens, counts=[tokens.shape[1]], wanted=torch.full((1, 1), tokens.shape[1] - 1))
        return compiled.switch.with_choice(UNSET, lambda bound, _: bound.decode(MAIN_GRAPH, cache, step))

    add(ids)
    return lambda: add(one)


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Each side's step, and its ratio to the plain export's, by family."""
    rows, ratios = [], {}
    for (family,), seconds in found.items():
        for side in SIDES:
            held = f"<= {TARGET}" if side == BASE and family != "attention" else ""
            ratio = seconds[side] / seconds[PLAIN]
            rows.append((family, side, f"{seconds[side] * 1e6:.0f}", f"{ratio:.3f}", held))
        ratios[family] = seconds[AGAIN] / seconds[BASE]
    promised = [row[:2] for row in rows]
    columns = ("family", "side", "us per step", "of the plain export", "target")
    return [common.Table(f"hybrids, a step behind {TOKENS} tokens", columns, rows, promised, ratios)]


BENCHMARK = common.Benchmark(
    name="hybrids",
    text=__doc__,
    options=(
        common.Option("only", tuple(FAMILIES), smoke=("attention", "lfm2"), help="these families", choices=[*FAMILIES]),
        common.Option("width", 1024, smoke=64, help="of the hidden states"),
        common.RANK,
        common.rounds(41),
        common.CLOCK,
    ),
    jobs=lambda given: [(family,) for family in given.only],
    measure=measure,
    tables=tables,
    rooms=common.PROGRAM,
    prepare=prepare,
)

if __name__ == "__main__":
    BENCHMARK.main()
