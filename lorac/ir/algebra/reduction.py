"""The reduction of a formula to its normal form: a trace, its analysis, and a small graph that computes the tensors.

The result, a ``Reduction``, is a graph (W, b, *params) -> tensors of one normal form, differentiable and valid for all
values of the parameters. It runs once when an adapter is added, and in every training step. Dropout between the
factors of a formula is inserted into such a graph.
"""

import enum
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from lorac.ir.algebra import operands
from lorac.ir.algebra.affine import weight_formula
from lorac.ir.algebra.rules import RULES
from lorac.ir.algebra.structure import WEIGHT, AlgebraRule, Analysis, Form, analyse, shape_of
from lorac.ir.traces.functions import record_function
from lorac.ir.traces.gate import tracing
from lorac.third_party_output import suppress_third_party_output

Params = SimpleNamespace
"""The argument ``p`` of a formula, with one tensor attribute per parameter of the variant."""

aten = torch.ops.aten

LOW_RANK, SPARSE, DELTA, DENSE, BRANCH = "low-rank", "sparse", "delta", "dense", "branch"
_TOKENS, _OTHER_TOKENS = 5, 7
"""Numbers of tokens in the examples over which a branch is traced; at least 2."""
FACTOR = 1 << 44
"""More values than any adapter has: numbers of values carry the index of their factor as a multiple of it."""


@dataclass(frozen=True)
class Reduction:
    """A formula in its normal form.

    Attributes:
        form: ``"low-rank"``, ``"sparse"``, ``"delta"``, ``"dense"`` or ``"branch"``.
        graph: the graph that computes the form's tensors from (W (out, in), b (out,), *params); for a branch, the
            traced branch itself, (x, y, *params) -> y'.
        params: names of the parameters, in the graph's order.
        outputs: the operands (``lorac.ir.algebra.operands``) of the tensors it returns. low-rank: the pair, and scales
            other than 1; sparse: rows, cols, values (k,); delta: the added matrix; dense: the weight. Also the bias, if
                the formula changes it.
        shared: names of the parameters that all sites share.
        common: the outputs that depend on shared parameters alone: one tensor for all sites of a shape.
        rank: R of a low-rank form, else 0.
        reads_weight: whether the tensors depend on W.
        reasons: why no cheaper form was found.
        dropped: for an affine branch, the branch with dropout between its factors, (x, y, *params, rate) -> y'
            (``lorac.ir.algebra.reduction``); else None.
    """

    form: str
    graph: fx.GraphModule
    params: tuple[str, ...]
    outputs: tuple[str, ...]
    rank: int = 0
    reads_weight: bool = False
    shared: tuple[str, ...] = ()
    common: frozenset[str] = frozenset()
    reasons: tuple[str, ...] = ()
    dropped: fx.GraphModule | None = None

    def __call__(self, weight: Tensor, bias: Tensor, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the form's tensors by operand."""
        values = self.graph.forward(weight, bias, *tensors)  # a direct call: nothing hooks into the graph
        return dict(zip(self.outputs, values, strict=True))

    def follow(self, numbers: Sequence[Tensor], factors: list[float]) -> dict[str, Tensor] | None:
        """Return which values of the parameters stand where in the form's tensors.

        Args:
            numbers: for each parameter the numbers of its values, from 1 to below ``FACTOR``.
            factors: numbers by which values are multiplied, beginning with 1; missing ones are appended.

        Returns:
            operand -> the numbers, each with the index of its factor times ``FACTOR`` added; None if any step is not a
            view of a parameter or the only product of a parameter with a number.
        """
        nodes = [*self.graph.graph.nodes]
        places = [node for node in nodes if node.op == "placeholder"]
        found: dict[object, Tensor] = dict(zip(places[2:], numbers, strict=True))
        for node in nodes:
            own = found.get(node.args[0]) if node.op == "call_function" else None
            if own is None or not isinstance(node.target, OpOverload):
                continue
            if node.target.is_view and isinstance(view := node.target(own, *node.args[1:], **node.kwargs), Tensor):
                found[node] = view
            elif node.target is aten.mul.Tensor and isinstance(factor := node.args[1], int | float):
                if int(own.max()) >= FACTOR:  # two products in a row round twice
                    return None
                factors += [] if factor in factors else [factor]
                found[node] = own + factors.index(factor) * FACTOR
        [results] = [node.args[0] for node in nodes if node.op == "output"]
        outputs = {name: found[node] for name, node in zip(self.outputs, results, strict=True) if node in found}
        return outputs if len(outputs) == len(self.outputs) else None


def reduce_weight(
    formula: Callable[[Tensor, Tensor, Params], tuple[Tensor, Tensor]],
    weight: tuple[int, int],
    params: Mapping[str, Tensor],
    dtype: torch.dtype,
    rules: Sequence[AlgebraRule] = RULES,
    shared: Collection[str] = (),
    *,
    keep_factors: bool = False,
) -> Reduction:
    """Reduce a weight formula (W, b, p) -> (W', b').

    Args:
        formula: a pure function of torch ops (``lorac.ir.algebra.formulas.Formula`` refuses others).
        weight: shape (out, in) of W.
        params: one example tensor per parameter (on any device; only shape and dtype are read).
        dtype: dtype in which the formula computes.
        rules: the algebra's table.
        shared: names of the parameters that all sites share.
        keep_factors: keep products low-rank at any rank, for callers that read the factors.
    """
    names = tuple(params)
    with tracing(), suppress_third_party_output(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        w, b = torch.empty(weight, dtype=dtype), torch.empty(weight[0], dtype=dtype)
        fakes = [mode.from_tensor(t) for t in params.values()]

        def traced(w: Tensor, b: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            return formula(w, b, Params(**dict(zip(names, tensors, strict=True))))

        graph = record_function(traced, w, b, *fakes)
        return _classify(graph, names, rules, shared, keep_factors=keep_factors)


def reduce_rows(
    formula: Callable[[Params], Tensor], weight: tuple[int, int], params: Mapping[str, Tensor]
) -> Reduction:
    """Reduce a formula of rows (n, out), appended to an embedding (out, in), to a low-rank form of rank 0 plus rows."""
    out, size = weight

    def lay_out(w: Tensor, b: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = formula(Params(**dict(zip(params, tensors, strict=True))))
        return rows.new_zeros(size, 0), rows.new_zeros(0, out), rows

    with tracing(), suppress_third_party_output(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in params.values()]
        graph = record_function(lay_out, torch.empty(weight), torch.empty(out), *fakes)
    return Reduction(LOW_RANK, graph, tuple(params), (operands.A, operands.B, operands.VIRTUAL))


def reduce_branch(
    formula: Callable[[Tensor, Tensor, Params], Tensor],
    weight: tuple[int, int],
    params: Mapping[str, Tensor],
    dtype: torch.dtype,
    rules: Sequence[AlgebraRule] = RULES,
    *,
    keep_factors: bool = False,
) -> Reduction:
    """Reduce a branch formula (x, y, p) -> y' of a linear site; an affine branch is reduced as a weight formula."""
    names = tuple(params)
    with tracing(), suppress_third_party_output(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out_features, in_features = weight
        fakes = [mode.from_tensor(t) for t in params.values()]

        def traced(x: Tensor, y: Tensor, *tensors: Tensor) -> Tensor:
            return formula(x, y, Params(**dict(zip(names, tensors, strict=True))))

        def trace(tokens: int) -> fx.GraphModule:
            x, y = (torch.empty(tokens, features, dtype=dtype) for features in (in_features, out_features))
            return record_function(traced, x, y, *fakes, pre_dispatch=True)

        branch = trace(_TOKENS)
        affine = weight_formula(branch, weight)
        if affine is None:
            return Reduction(BRANCH, branch, names, ("y",), reasons=("not affine in x and y",))
        other = weight_formula(trace(_OTHER_TOKENS), weight)
        if other is None or other.code != affine.code:
            return Reduction(BRANCH, branch, names, ("y",), reasons=("it reads the number of tokens",))
        reduced = _classify(affine, names, rules, keep_factors=keep_factors)
        return replace(reduced, dropped=insert_inner_dropout(branch))


def _classify(
    module: fx.GraphModule,
    names: tuple[str, ...],
    rules: Sequence[AlgebraRule],
    shared: Collection[str] = (),
    *,
    keep_factors: bool = False,
) -> Reduction:
    graph = module.graph
    w, b, *inputs = [n for n in graph.nodes if n.op == "placeholder"]
    output = next(iter(reversed(graph.nodes)))
    new_weight, new_bias = output.args[0]
    found = analyse(graph, w, rules, keep_factors=keep_factors)
    form = found.form(new_weight)
    reasons = tuple(found.misses)
    common = {node for name, node in zip(names, inputs, strict=True) if name in shared}
    if form is not None and form.base == WEIGHT and not form.sparse:
        kind, tensors = LOW_RANK, _emit_low_rank(found, form, w, common)
        rank = sum(int(a.meta["val"].shape[0]) for _, a in form.low)
    elif form is not None and form.base == WEIGHT and form == Form(WEIGHT, sparse=form.sparse):
        columns = (found.emit(aten.cat.default, list(parts), 0) for parts in zip(*form.sparse, strict=True))
        kind, tensors, rank = SPARSE, dict(zip(("rows", "cols", "values"), columns, strict=True)), 0
    else:
        added = _find_addend(found, new_weight, w)
        kind, name = (DENSE, operands.WEIGHT) if added is None else (DELTA, operands.DELTA)
        tensors, rank = {name: new_weight if added is None else added}, 0
        reasons = (*reasons, "the formula's result has no recognised structure" if form is None else "mixed structure")
    if new_bias is not b:
        tensors[operands.BIAS] = new_bias
    output.args = (tuple(tensors.values()),)
    shared_outputs = frozenset(name for name, node in tensors.items() if _depends_only_on(node, common))
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return Reduction(kind, module, names, tuple(tensors), rank, bool(w.users), tuple(shared), shared_outputs, reasons)


def _find_addend(found: Analysis, new_weight: fx.Node, w: fx.Node) -> fx.Node | None:
    """Return D of W' = W + D, if D does not depend on W; else None."""
    if new_weight.target is not aten.add.Tensor or new_weight.kwargs:
        return None
    of_weight = {w}
    of_weight.update(node for node in found.graph.nodes if not of_weight.isdisjoint(node.all_input_nodes))
    for base, added in (new_weight.args[:2], new_weight.args[1::-1]):
        if not isinstance(added, fx.Node) or added in of_weight or shape_of(added) != shape_of(w):
            continue
        if found.form(base) == Form(WEIGHT):
            return added
    return None


def _emit_low_rank(found: Analysis, form: Form, w: fx.Node, common: set[fx.Node]) -> dict[str, fx.Node]:
    scales = {operands.C: form.c, operands.D: form.d}
    factors = None
    if len(form.low) == 1:
        # (h∘B)·(g∘A): B and A that depend only on shared parameters are one tensor for all sites.
        (b, h), (a, g) = (_strip_scale(factor, common) for factor in form.low[0])
        if all(_depends_only_on(core, common) for core in (b, a)):
            factors, scales[operands.G], scales[operands.H] = (a, b), g, h
    if len(form.low) == 1 and factors is None:
        factors = form.low[0][1], form.low[0][0]
    elif form.low and factors is None:
        a = found.emit(aten.cat.default, [a for _, a in form.low], 0)
        factors = a, found.emit(aten.cat.default, [b for b, _ in form.low], 1)
    if factors is not None:
        pair = [found.emit(aten.t.default, factor) for factor in factors]
    else:
        rows, columns = w.meta["val"].shape
        pair = [found.emit(aten.new_zeros.default, w, shape) for shape in ([columns, 0], [0, rows])]
    tensors = dict(zip((operands.A, operands.B), pair, strict=True))
    for name, scale in scales.items():
        if scale is not None:
            tensors[name] = found.emit(aten.view.default, scale, [-1])
    if form.blocks is not None:
        tensors[operands.T] = found.emit(aten.transpose.int, form.blocks, 1, 2)
    return tensors


def _strip_scale(matrix: fx.Node, common: set[fx.Node]) -> tuple[fx.Node, fx.Node | None]:
    """Split a matrix (n, m) into a matrix and the column (n, 1) that scales its rows; None for no column."""
    if matrix.target is not aten.mul.Tensor or _depends_only_on(matrix, common):
        return matrix, None
    for core, scale in (matrix.args[:2], matrix.args[1::-1]):
        if not isinstance(core, fx.Node) or not isinstance(scale, fx.Node):
            continue
        shapes = shape_of(core), shape_of(scale)
        if shapes == (shape_of(matrix), (shape_of(matrix)[0], 1)) and _depends_only_on(core, common):
            return core, scale
    return matrix, None


def _depends_only_on(node: fx.Node, common: set[fx.Node]) -> bool:
    """Return whether a node depends on at least one input, and only on inputs in ``common``."""
    todo, read = [node], set()
    while todo:
        inner = todo.pop()
        if inner.op == "placeholder":
            read.add(inner)
        todo.extend(inner.all_input_nodes)
    return bool(read) and read <= common


_PRODUCTS = {aten.linear.default, aten.matmul.default, aten.mm.default}
DROPOUT_RATE = "rate"
"""The name of the last input of a graph from ``insert_inner_dropout``."""


class _ProductStage(enum.IntEnum):
    """The number of products between the tokens and a value."""

    TOKENS = 1
    """No product: a value computed from x or y."""
    BETWEEN = 2
    """One product: a value computed from the result of a product."""
    AFTER = 3
    """Two products or more: dropout was applied to an operand of the second product."""


def insert_inner_dropout(branch: fx.GraphModule) -> fx.GraphModule | None:
    """Return the branch (x, y, *params, rate) -> y' with dropout between its factors; None if there is no such place.

    Args:
        branch: an affine branch, traced over x (tokens, in) and y (tokens, out); the result takes any number of tokens.
    """
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = [node for node in branch.graph.nodes if node.op == "placeholder"]
    copied |= {node: graph.node_copy(node) for node in inputs}
    rate = graph.placeholder(DROPOUT_RATE)
    stages = dict.fromkeys(inputs[:2], _ProductStage.TOKENS)
    for node in branch.graph.nodes:
        if node in copied:
            continue
        product, known = node.target in _PRODUCTS, dict(copied)
        inner = (operand for operand in node.all_input_nodes if stages.get(operand) is _ProductStage.BETWEEN)
        if product and (operand := next(inner, None)) is not None:
            known[operand] = graph.call_function(F.dropout, (copied[operand], rate))
        copied[node] = graph.node_copy(node, known.__getitem__)
        # A value that depends only on parameters has no stage.
        if found := [stages[operand] for operand in node.all_input_nodes if operand in stages]:
            stages[node] = _ProductStage(min(max(found) + product, _ProductStage.AFTER))
    return fx.GraphModule(branch, graph) if any(node.target is F.dropout for node in graph.nodes) else None


def run_with_dropout(dropped: fx.GraphModule, x: Tensor, y: Tensor, params: tuple[Tensor, ...], rate: float) -> Tensor:
    """Run a graph from ``insert_inner_dropout`` on x (…, in) and y (…, out); return y' (…, out)."""
    rows, tokens = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    output: Tensor = dropped(rows, tokens, *params, rate)
    return output.view(y.shape)
