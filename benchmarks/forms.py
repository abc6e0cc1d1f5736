"""The emitter's form of each computation compared with other forms of it, and the bandwidth of one core.

    python -m benchmarks.forms [--layers 40] [--rows 1 8 64 512] [--rounds 9] [--threads 2] [--processes 3]

Sums, norms and the products of slots, at the sizes of SmolLM2 with a LoRA of rank 16. Each form is a graph of its own:
so many copies as there are layers, every one over weights of its own, so that no cache holds them. Target: no other
form is faster than the emitted one at few rows and at many; a form that is faster at some rows and slower at others is
not taken.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from benchmarks import common

HIDDEN, INNER, PACKED, RANK = 576, 1536, 960, 16
"""SmolLM2's: of the residual stream, of the MLP, of q|k|v; and the adapter's rank."""
ROWS = ("1", "8", "64", "512")
AGAIN = "A/A"
_MICROSOFT = "com.microsoft"


@dataclass
class Writer:
    """A graph in the making: every copy of a form reads what the one before it gave, and weights of its own.

    Attributes:
        nodes: in order.
        weights: initializers, which ONNX Runtime lays out anew while it loads.
        slots: inputs, which it reads as they lie.
    """

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)
    slots: dict[str, Any] = field(default_factory=dict)
    _random: Any = field(default_factory=lambda: np.random.default_rng(0))

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Return a node; the name of what it gives, or a list of several."""
        names = [f"v{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def weight(self, *shape: int) -> str:
        """Return a constant of small random values."""
        return self._held(self.weights, shape)

    def slot(self, *shape: int) -> str:
        """Return an input of small random values."""
        return self._held(self.slots, shape)

    def sizes(self, *numbers: int) -> str:
        """Return a constant list of whole numbers, made once."""
        name = "sizes_" + "_".join(map(str, numbers))
        self.weights[name] = np.array(numbers, np.int64)
        return name

    def _held(self, where: dict[str, Any], shape: Sequence[int]) -> str:
        name = f"w{len(self.weights)}_{len(self.slots)}"
        where[name] = self._random.standard_normal(shape, np.float32) * np.float32(0.02)
        return name


Form = Callable[[Writer, str, str], tuple[str, str]]
"""Writes one copy: (writer, residual stream, what a layer adds to it) -> the next two."""


# ── Sums and norms ───────────────────────────────────────────────────────────────────────────────────────────────────
def _add_rms(w: Writer, x: str, y: str) -> tuple[str, str]:
    total = w.op("Add", x, y)
    return total, w.op("SimplifiedLayerNormalization", total, w.weight(HIDDEN), axis=-1, epsilon=1e-5)


def _skip_rms(w: Writer, x: str, y: str) -> tuple[str, str]:
    norm, _, _, total = w.op(
        "SkipSimplifiedLayerNormalization", x, y, w.weight(HIDDEN), outputs=4, domain=_MICROSOFT, epsilon=1e-5
    )
    return total, norm


def _add_norm(w: Writer, x: str, y: str) -> tuple[str, str]:
    total = w.op("Add", x, y)
    return total, w.op("LayerNormalization", total, w.weight(HIDDEN), w.weight(HIDDEN), axis=-1, epsilon=1e-5)


def _skip_norm(w: Writer, x: str, y: str) -> tuple[str, str]:
    scale, shift = w.weight(HIDDEN), w.weight(HIDDEN)
    norm, _, _, total = w.op("SkipLayerNormalization", x, y, scale, shift, outputs=4, domain=_MICROSOFT, epsilon=1e-5)
    return total, norm


# ── Products of slots ────────────────────────────────────────────────────────────────────────────────────────────────
def _adapted(w: Writer, x: str, base: str, size: int, width: int, rank: int) -> str:
    """``x·A·B + base``, on rows."""
    return w.op("Gemm", w.op("MatMul", x, w.slot(size, rank)), w.slot(rank, width), base)


def _on_rows(w: Writer, x: str, y: str) -> tuple[str, str]:
    """Return an adapted projection behind an attention, which gives and takes (batch, length, features)."""
    rows = w.op("Reshape", y, w.sizes(-1, HIDDEN))
    found = _adapted(w, rows, w.op("MatMul", rows, w.weight(HIDDEN, HIDDEN)), HIDDEN, HIDDEN, RANK)
    return x, w.op("Reshape", found, w.sizes(1, -1, HIDDEN))


def _in_full(w: Writer, x: str, y: str) -> tuple[str, str]:
    low = w.op("MatMul", y, w.slot(HIDDEN, RANK))
    base = w.op("MatMul", y, w.weight(HIDDEN, HIDDEN))
    return x, w.op("Add", base, w.op("MatMul", low, w.slot(RANK, HIDDEN)))


def _sum_after(w: Writer, x: str, y: str) -> tuple[str, str]:
    """Return an adapted projection into the residual stream."""
    found = _adapted(w, y, w.op("MatMul", y, w.weight(HIDDEN, HIDDEN)), HIDDEN, HIDDEN, RANK)
    return w.op("Add", x, found), found


def _sum_within(w: Writer, x: str, y: str) -> tuple[str, str]:
    found = _adapted(w, y, w.op("Gemm", y, w.weight(HIDDEN, HIDDEN), x), HIDDEN, HIDDEN, RANK)
    return found, found


def _one_block(w: Writer, x: str, y: str) -> tuple[str, str]:
    """gate|up of two adapters in one product, zeros between their factors, then parted."""
    base = w.op("MatMul", y, w.weight(HIDDEN, 2 * INNER))
    found = _adapted(w, y, base, HIDDEN, 2 * INNER, 2 * RANK)
    return _gated(w, x, *w.op("Split", found, w.sizes(INNER, INNER), outputs=2, axis=-1))


def _by_member(w: Writer, x: str, y: str) -> tuple[str, str]:
    base = w.op("MatMul", y, w.weight(HIDDEN, 2 * INNER))
    parts = w.op("Split", base, w.sizes(INNER, INNER), outputs=2, axis=-1)
    low = w.op("MatMul", y, w.slot(HIDDEN, 2 * RANK))
    lows = w.op("Split", low, w.sizes(RANK, RANK), outputs=2, axis=-1)
    made = [w.op("Gemm", u, w.slot(RANK, INNER), part) for u, part in zip(lows, parts, strict=True)]
    return _gated(w, x, *made)


def _gated(w: Writer, x: str, gate: str, up: str) -> tuple[str, str]:
    inner = w.op("Mul", w.op("QuickGelu", gate, domain=_MICROSOFT, alpha=1.0), up)
    return x, w.op("MatMul", inner, w.weight(INNER, HIDDEN))


def _as_it_lies(w: Writer, x: str, y: str) -> tuple[str, str]:
    """Return the second product of q|k|v's slots, of which the first HIDDEN columns go on."""
    base = w.op("MatMul", y, w.weight(HIDDEN, PACKED))
    low = w.op("MatMul", y, w.slot(HIDDEN, 3 * RANK))
    return _first(w, x, w.op("Gemm", low, w.slot(3 * RANK, PACKED), base))


def _transposed(w: Writer, x: str, y: str) -> tuple[str, str]:
    base = w.op("MatMul", y, w.weight(HIDDEN, PACKED))
    low = w.op("MatMul", y, w.slot(HIDDEN, 3 * RANK))
    return _first(w, x, w.op("Gemm", low, w.slot(PACKED, 3 * RANK), base, transB=1))


def _first(w: Writer, x: str, packed: str) -> tuple[str, str]:
    return x, w.op("Split", packed, w.sizes(HIDDEN, PACKED - HIDDEN), outputs=2, axis=-1)[0]


FORMS: Mapping[str, Mapping[str, Form]] = {
    "sum and RMS norm": {"Add, SimplifiedLayerNormalization": _add_rms, "SkipSimplifiedLayerNormalization": _skip_rms},
    "sum and layer norm": {"Add, LayerNormalization": _add_norm, "SkipLayerNormalization": _skip_norm},
    "between attentions": {"on rows": _on_rows, "in full": _in_full},
    "residual sum": {"Add": _sum_after, "Gemm's C": _sum_within},
    "gate|up": {"one block-diagonal B": _one_block, "a B for each": _by_member},
    "q|k|v's B": {"(rank, features)": _as_it_lies, "(features, rank)": _transposed},
}
"""Computation -> its forms; the first is the one that the emitter writes."""
_IN_FULL = {"between attentions"}
"""Those whose values have a batch and a length of their own."""


# ── Measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────
def measure(job: common.Job, given: argparse.Namespace) -> dict[str, Any]:
    """One thing that is written, in all its forms: rows -> form -> microseconds a copy."""
    (what,) = job
    forms = dict(FORMS[what])
    forms[AGAIN] = next(iter(forms.values()))
    sessions = {name: _session(form, what, given) for name, form in forms.items()}
    found: dict[str, Any] = {}
    for rows in given.rows:
        sides = {name: _side(session, slots, what, int(rows)) for name, (session, slots) in sessions.items()}
        seconds = common.alternate(sides, given.rounds)
        found[rows] = {name: value / given.layers * 1e6 for name, value in seconds.items()}
    return found


def _session(form: Form, what: str, given: argparse.Namespace) -> tuple[Any, Mapping[str, Any]]:
    """Return a session over so many copies of a form, one behind the other, and what its slots hold."""
    from lorac.backends.onnxruntime.inference_session import session_options
    from lorac.backends.onnxruntime.options import OnnxRuntimeOptions

    writer, values = Writer(), ("x", "y")
    for _ in range(given.layers):
        values = form(writer, *values)
    shape = [1, "length", HIDDEN] if what in _IN_FULL else ["rows", HIDDEN]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, array.shape) for n, array in writer.slots.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in {*values} - {"x", "y"}]
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in writer.weights.items()]
    graph = helper.make_graph(writer.nodes, "forms", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(_MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    settings = session_options(OnnxRuntimeOptions(threads=given.threads))
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is to run what is written
    return ort.InferenceSession(model.SerializeToString(), settings), writer.slots


def _side(session: Any, slots: Mapping[str, Any], what: str, rows: int) -> common.Side:
    """Return a run with everything bound, as the engine runs."""
    shape = (1, rows, HIDDEN) if what in _IN_FULL else (rows, HIDDEN)
    bound, taken = session.io_binding(), {value.name for value in session.get_inputs()}
    values = {name: np.random.default_rng(1).standard_normal(shape, np.float32) for name in ("x", "y")}
    for name, array in {**values, **slots}.items():
        if name in taken:
            bound.bind_cpu_input(name, array)
    for output in session.get_outputs():
        bound.bind_output(output.name)

    def run() -> None:
        session.run_with_iobinding(bound)

    return run


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Every form, and how much of the emitted one's time it takes."""
    rows = [(what, form, *_cells(found[(what,)], what, form, given)) for what in given.only for form in FORMS[what]]
    columns = ("what", "form", *(f"us, {count} rows" for count in given.rows), *(f"ratio, {n}" for n in given.rows))
    promised = [(what, form) for what in given.only for form in FORMS[what]]
    a_a = {
        f"{what}, {count}": times[AGAIN] / times[_emitted(what)]
        for (what,), by_rows in found.items()
        for count, times in by_rows.items()
    }
    title = f"a copy of each form, {given.layers} behind one another, {given.threads} threads; the first is emitted"
    noise = f"A/A between {min(a_a.values()):.2f} and {max(a_a.values()):.2f}"
    return [common.Table(title, columns, rows, promised, a_a, [noise])]


def _emitted(what: str) -> str:
    return next(iter(FORMS[what]))


def _cells(by_rows: Mapping[str, Any], what: str, form: str, given: argparse.Namespace) -> list[str]:
    times = [f"{by_rows[count][form]:.1f}" for count in given.rows]
    return times + [f"{by_rows[count][form] / by_rows[count][_emitted(what)]:.2f}" for count in given.rows]


BENCHMARK = common.Benchmark(
    name="forms",
    text=__doc__,
    options=(
        common.layers(40),
        common.rounds(9),
        common.Option("rows", ROWS, smoke=("1", "8"), help="of every product"),
        common.Option("threads", 2, smoke=1, help="of every session"),
        common.Option("only", tuple(FORMS), smoke=tuple(FORMS), help="these"),
    ),
    jobs=lambda given: [(what,) for what in given.only],
    measure=measure,
    tables=tables,
    rooms=("lorac/backends/onnx",),
)

if __name__ == "__main__":
    BENCHMARK.main()
