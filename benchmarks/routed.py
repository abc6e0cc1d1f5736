"""The cost of routed methods per call in ONNX Runtime, next to the same base, MeteoRA as a loop, and PEFT's X-LoRA.

    python -m benchmarks.routed [--layers 20] [--experts 8] [--rank 8] [--rounds 15] [--clock cpu]

Targets: MeteoRA, 8 experts of rank 8, top 2, <= 1.35 of the base at (1, 128), where the floor of its arithmetic is
1.15, and <= 1/4 of the seconds that a plain loop in eager adds to its own base, which takes the experts one after the
other as the first release did; X-LoRA off <= 1.03, on <= 2.2. FlyLoRA's gate, 8 of 32 ranks, adds <= 0.4 of the base at
width 256 to what 32 ranks cost without it. "gathered" is MeteoRA with the factors of each token's experts gathered: the
same answers by less arithmetic and more copies.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common

SHAPES = ((1, 1), (1, 128), (8, 32))
WIDE, NARROW = ("wide",), ("narrow",)
PEFT = "eager, PEFT's X-LoRA"
SIDES = {
    WIDE: ("base", "A/A", "MeteoRA", "gathered", "X-LoRA", "X-LoRA, off", "eager base", "eager loop", PEFT),
    NARROW: ("base", "A/A", "FlyLoRA, all ranks", "FlyLoRA"),
}
LOOP = "the loop's overhead"
GATE = "the gate alone"


def prepare(given: argparse.Namespace) -> None:
    """Compile every side once and save it; processes load them."""
    import lorac

    folder = Path(given.folder)
    if (folder / "done").exists():
        return
    for job in (WIDE, NARROW):
        model = common.llama(_of(job, given))
        lorac.compile(model, {}, target="onnxruntime").save(folder / job[0] / "base")
        for name, variant in _variants(job, given).items():
            eager = lorac.compile(model, {"a": variant})
            common.away_from_init(eager.adapters["a"], seed=1)
            emitted = lorac.compile(model, {"a": eager.adapters["a"]}, target="onnxruntime")
            emitted.save(folder / job[0] / name)
    for expert in range(given.experts):
        common.save_peft(folder / "peft" / str(expert), given)
    (folder / "done").touch()


def _of(job: common.Job, given: argparse.Namespace) -> argparse.Namespace:
    """Return the options of a job's host."""
    model = "narrow" if job == NARROW and given.model != "tiny" else given.model
    return argparse.Namespace(**{**vars(given), "model": model})


def _variants(job: common.Job, given: argparse.Namespace) -> Mapping[str, Any]:
    import lorac

    if job == NARROW:
        ranks = 4 * given.rank
        return {
            "FlyLoRA, all ranks": lorac.FlyLoRA(r=ranks, top_k=ranks),
            "FlyLoRA": lorac.FlyLoRA(r=ranks, top_k=given.rank),
        }
    experts = {"r": given.rank, "alpha": given.rank, "experts": given.experts}
    mixed = {"r": given.rank, "experts": given.experts, "hidden_size": common.LLAMAS[given.model]["hidden_size"]}
    return {
        "MeteoRA": lorac.MeteoRA(**experts),
        "gathered": _gathered()(**experts),
        "X-LoRA": lorac.XLoRA(hidden="model.norm", **mixed),
    }


def _gathered() -> Any:
    """MeteoRA as a class of its own, which gathers."""
    import torch

    import lorac

    @dataclass(frozen=True, kw_only=True)
    class Gathered(lorac.BranchVariant):
        """``y' = y + s·Σ_j w_j·B_j·(A_j·x)`` over factors gathered for each token."""

        r: int = 8
        alpha: float = 8
        experts: int = 8
        top_k: int = 2
        name = "gathered"

        def params(self, site: Any) -> Any:
            alike = lorac.MeteoRA(r=self.r, alpha=self.alpha, experts=self.experts, top_k=self.top_k)
            return alike.params(site)

        def branch(self, x: Any, y: Any, p: Any, ctx: Any) -> Any:
            values, index = torch.topk(torch.nn.functional.linear(x, p.moe_gate), self.top_k)
            down = p.lora_A.unflatten(0, (self.experts, self.r))[index]
            up = p.lora_B.T.unflatten(0, (self.experts, self.r))[index]
            hidden = (down @ x[..., None, :, None]) * values.softmax(-1)[..., None, None]
            moved = hidden.flatten(-3).unsqueeze(-2) @ up.flatten(-3, -2)
            return y + (self.alpha / self.r) * moved.squeeze(-2)

    return Gathered


def _looped(model: Any, given: argparse.Namespace) -> Any:
    """Return the model with a plain MeteoRA, expert by expert, in every linear layer but the head."""
    import torch

    class Looped(torch.nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base, generator = base, torch.Generator().manual_seed(1)

            def drawn(*shape: int) -> Any:
                return torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator))

            self.gate = drawn(given.experts, base.in_features)
            self.down = drawn(given.experts, given.rank, base.in_features)
            self.up = drawn(given.experts, base.out_features, given.rank)

        def forward(self, x: Any) -> Any:
            y, tokens = self.base(x), x.flatten(0, -2)
            values, index = torch.topk(tokens @ self.gate.T, 2)
            weights, added = values.softmax(-1), torch.zeros_like(y).flatten(0, -2)
            for expert in range(given.experts):
                rows, places = (index == expert).nonzero(as_tuple=True)
                if len(rows):
                    one = tokens[rows] @ self.down[expert].T @ self.up[expert].T
                    added.index_add_(0, rows, weights[rows, places, None] * one)
            return y + added.view_as(y)

    for path, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and path != "lm_head":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Looped(layer))
    return model


def _of_peft(model: Any, given: argparse.Namespace) -> Any:
    """PEFT's X-LoRA of the experts that ``prepare`` saved."""
    import peft

    folders = {str(expert): str(Path(given.folder, "peft", str(expert))) for expert in range(given.experts)}
    width = model.config.hidden_size
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=width, adapters=folders, xlora_depth=1)
    return peft.get_peft_model(model, config).eval()


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds per call of all sides, in one process: shape -> side -> seconds, by the clock that the options name."""
    import lorac

    _gathered()  # so that its artifact finds its method
    found, host = {}, _of(job, given)
    names = {"A/A": "base", "X-LoRA, off": "X-LoRA"}
    emitted = [name for name in SIDES[job] if not name.startswith("eager")]
    compiled: dict[str, Any] = {n: lorac.load(Path(given.folder, job[0], names.get(n, n))) for n in emitted}
    eager = {}
    if job == WIDE:
        compiled["X-LoRA, off"].swap(None)
        looped, mixed = _looped(common.llama(host), given), _of_peft(common.llama(host), given)
        eager = {"eager base": common.llama(host), "eager loop": looped, PEFT: mixed}
    for shape in SHAPES:
        inputs = common.tokens(host, shape)
        sides = {name: common.call(model, inputs) for name, model in compiled.items()}
        sides |= {name: common.torch_call(model, inputs) for name, model in eager.items()}
        found[common.label(shape)] = common.alternate(sides, given.rounds, clock=common.CLOCKS[given.clock])
    return found


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Ratios to the side's own base, per shape; then MeteoRA's overhead over the loop's, and what the gate adds."""
    columns = ("side / base", "ms", *map(common.label, SHAPES), "median ratio")
    made = []
    for job, what in ((WIDE, "8 experts and X-LoRA"), (NARROW, "FlyLoRA at a quarter of the ranks, width 256")):
        rows, ratios = [], {}
        for name in SIDES[job]:
            base = "eager base" if name.startswith("eager") else "base"
            ratios[name] = {shape: sides[name] / sides[base] for shape, sides in found[job].items()}
            milliseconds = " ".join(f"{sides[name] * 1e3:.1f}" for sides in found[job].values())
            rows.append(_row(f"{name} / {base}", milliseconds, ratios[name]))
        rows.append(_last(job, found[job]))
        promised = [(row[0],) for row in rows]
        made.append(common.Table(f"routed, per call: {what}", columns, rows, promised, ratios["A/A"]))
    return made


def _row(label: str, milliseconds: str, ratios: Mapping[str, float]) -> Sequence[str]:
    return (label, milliseconds, *(f"{r:.3f}" for r in ratios.values()), f"{statistics.median(ratios.values()):.3f}")


def _last(job: common.Job, by_shape: Mapping[str, Mapping[str, float]]) -> Sequence[str]:
    """Compare the seconds that MeteoRA and the loop add to their bases, and what FlyLoRA's gate adds."""
    if job == NARROW:
        return _row(GATE, "", {n: (s["FlyLoRA"] - s["FlyLoRA, all ranks"]) / s["base"] for n, s in by_shape.items()})
    added = {n: (s["MeteoRA"] - s["base"]) / (s["eager loop"] - s["eager base"]) for n, s in by_shape.items()}
    return _row(f"MeteoRA's overhead / {LOOP}", "", added)


BENCHMARK = common.Benchmark(
    name="routed",
    text=__doc__,
    options=(
        common.MODEL,
        common.layers(20),
        common.Option("experts", 8, smoke=3, help="of MeteoRA and X-LoRA"),
        common.Option("rank", 8, smoke=2, help="of each; FlyLoRA has four times as many, and takes as many"),
        common.rounds(15),
        common.CLOCK,
    ),
    jobs=lambda given: [WIDE, NARROW],
    measure=measure,
    tables=tables,
    rooms=common.PROGRAM,
    prepare=prepare,
)

if __name__ == "__main__":
    BENCHMARK.main()
