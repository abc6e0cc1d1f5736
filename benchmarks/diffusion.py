"""A U-Net of Stable Diffusion 1.5's shape with two LoRAs: what compiling takes, and a step next to others' steps.

    python -m benchmarks.diffusion [--blocks 4] [--latents 32] [--rounds 5] [--processes 3] [--clock cpu]

Random weights, 3.4 GB in float32; LoRAs of rank 16 on all projections of the attentions and their MLPs, both active. A
step is one call with two rows, as guidance makes them, and a timestep for both. Programs are compiled once, in one
process after another, and written; steps are of pairs of programs that are loaded, the base and another side. Targets:
compiled within 4 minutes and 2.5 times the bytes of the model, and live / base <= 1.08.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

BASE, LIVE, PLAIN, EAGER = "base", "live", "plain export", "eager"
AGAIN = f"{BASE}, A/A"
COMPILED, SIDES = (PLAIN, BASE, LIVE), (AGAIN, LIVE, PLAIN, EAGER)
WIDTHS = {4: (320, 640, 1280, 1280), 2: (32, 64)}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
SECONDS, MEMORY, RATIO = 240, 2.5, 1.08


def _unet(given: argparse.Namespace) -> Any:
    import diffusers
    import torch

    torch.manual_seed(0)
    widths = WIDTHS[given.blocks]
    down = ("CrossAttnDownBlock2D",) * (len(widths) - 1) + ("DownBlock2D",)
    return diffusers.UNet2DConditionModel(
        block_out_channels=widths,
        down_block_types=down,
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * (len(widths) - 1)),
        cross_attention_dim=768 if given.blocks > 2 else 48,
        layers_per_block=2 if given.blocks > 2 else 1,
    ).eval()


def _inputs(given: argparse.Namespace) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 4, given.latents, given.latents, generator=generator),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 77, 768 if given.blocks > 2 else 48, generator=generator),
    }


# ── Compiling ────────────────────────────────────────────────────────────────────────────────────────────────────────
def prepare(given: argparse.Namespace) -> None:
    """Write the programs, each in a process of its own, with what making them took."""
    for side in COMPILED:
        folder = _folder(given, side)
        if (folder / "figures.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        if not given.processes:
            _write(side, given)
            continue
        settings = {name: value for name, value in vars(given).items() if name not in {"json", "worker"}}
        worker = json.dumps({"job": ["write", side], **settings})
        command = [sys.executable, "-m", "benchmarks.diffusion", "--worker", worker]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _folder(given: argparse.Namespace, side: str) -> Path:
    return Path(given.folder, side.replace(" ", "-"))


def _write(side: str, given: argparse.Namespace) -> None:
    import diffusers
    import torch

    diffusers.UNet2DConditionModel  # noqa: B018  (imported with what it needs)
    common.forget_peak()
    before = common.peak()
    unet, folder = _unet(given), _folder(given, side)
    size = sum(parameter.nbytes for parameter in unet.parameters()) / 2**20
    common.forget_peak()
    begun, spent = time.perf_counter(), time.process_time()
    if side == PLAIN:
        free = torch.export.Dim.AUTO
        shapes = ({0: free, 2: free, 3: free}, {0: free}, {0: free, 1: free})
        example = tuple(_inputs(given).values())
        with torch.no_grad():
            torch.onnx.export(unet, example, folder / "plain.onnx", dynamic_shapes=shapes, dynamo=True, verbose=False)
    else:
        compiled = _compile(unet, side, given)
    took = {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - spent}
    figures = {**took, "peak": common.peak() - before, "size": size}
    if side != PLAIN:
        compiled.save(folder / "artifact")
    (folder / "figures.json").write_text(json.dumps(figures))


def _compile(unet: Any, side: str, given: argparse.Namespace) -> Any:
    import lorac

    if side == BASE:
        return lorac.compile(unet, target="onnxruntime")
    variant = lorac.LoRA(r=given.rank, alpha=given.rank, targets=TARGETS)
    fresh = lorac.compile(unet, {"one": variant, "two": variant}).adapters
    for seed, adapter in enumerate(fresh.values()):
        common.away_from_init(adapter, seed)
    return lorac.compile(unet, dict(fresh), target="onnxruntime", active={"one": 0.7, "two": 0.3})


# ── A step ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def jobs(given: argparse.Namespace) -> Sequence[common.Job]:
    return [*(("compile", side) for side in COMPILED), *(("step", side) for side in SIDES)]


def measure(job: common.Job, given: argparse.Namespace) -> Mapping[str, Any]:
    """Read what compiling took, or measure the base and another side."""
    kind, side = job
    if kind == "write":
        _write(side, given)
        return {}
    if kind == "compile":
        return json.loads((_folder(given, side) / "figures.json").read_text())
    sides = {BASE: _side(BASE, given), side: _side(side, given)}
    seconds = common.alternate(sides, given.rounds, warm_up=1, clock=common.CLOCKS[given.clock])
    return {"base": seconds[BASE], "seconds": seconds[side], "ratio": seconds[side] / seconds[BASE]}


def _side(side: str, given: argparse.Namespace) -> Callable[[], Any]:
    import torch

    import lorac

    inputs = _inputs(given)
    if side == EAGER:
        unet = _unet(given)

        def run() -> Any:
            with torch.no_grad():
                return unet(**inputs)

        return run
    if side == PLAIN:
        return _session(_folder(given, PLAIN) / "plain.onnx", inputs)
    compiled = lorac.load(_folder(given, LIVE if side == LIVE else BASE) / "artifact")
    if side == LIVE:
        compiled.swap({"one": 0.7, "two": 0.3})
    return lambda: compiled(**inputs)


def _session(path: Path, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """Return a side that runs a file of torch's exporter, with the session's options that lorac has."""
    import onnxruntime as ort

    from lorac.backends.onnxruntime.inference_session import session_options
    from lorac.backends.onnxruntime.options import OnnxRuntimeOptions

    session = ort.InferenceSession(path, session_options(OnnxRuntimeOptions()))
    named = dict(zip((i.name for i in session.get_inputs()), (v.numpy() for v in inputs.values()), strict=True))
    return lambda: session.run(None, named)


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Return what compiling takes, and each side next to the base."""
    made = {side: found[("compile", side)] for side in COMPILED}
    rows = [
        (
            side,
            f"{one['seconds']:.0f}",
            f"{one['cpu']:.0f}",
            f"{one['peak']:.0f}",
            f"{one['peak'] / one['size']:.2f}",
        )
        for side, one in made.items()
    ]
    title = (
        f"from a model of {made[BASE]['size']:.0f} MiB to a program; targets <= {SECONDS} s and {MEMORY} of its bytes"
    )
    steps = {side: found[("step", side)] for side in SIDES}
    second = [
        (side, f"{one['base']:.3f}", f"{one['seconds']:.3f}", f"{one['ratio']:.3f}") for side, one in steps.items()
    ]
    label = f"a step of 2 x 4 x {given.latents} x {given.latents}; target: live <= {RATIO} of the base"
    again = {"a step": steps[AGAIN]["ratio"]}
    promised = [[(side,) for side in sides] for sides in (COMPILED, SIDES)]
    return [
        common.Table(title, ("side", "s", "CPU s", "peak MiB, with the model", "of its bytes"), rows, promised[0], {}),
        common.Table(label, ("side", "base s", "s", "ratio"), second, promised[1], again),
    ]


BENCHMARK = common.Benchmark(
    name="diffusion",
    text=__doc__,
    options=(
        common.Option("blocks", 4, smoke=2, help="of the U-Net, 4 as in Stable Diffusion", choices=tuple(WIDTHS)),
        common.Option("latents", 32, smoke=8, help="height and width of the latents"),
        common.rounds(5),
        common.RANK,
        common.CLOCK,
    ),
    jobs=jobs,
    measure=measure,
    tables=tables,
    rooms=common.PROGRAM,
    prepare=prepare,
)

if __name__ == "__main__":
    BENCHMARK.main()
