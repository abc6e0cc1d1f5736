"""The structure of a traced weight formula, found node by node.

A formula is traced to an aten graph over ``W`` (out, in), ``b`` (out,) and the variant's parameters. Each matrix-valued
node may get a ``Form``, a sum of recognised terms::

    c ∘ base·D ∘ d  +  Σ Bᵢ·Aᵢ  +  Σ sparse(rowsⱼ, colsⱼ, valuesⱼ)      base: W, rows of it, the identity, or nothing

Rules only save time. A node without a form is computed by its own aten op, so that without any rule every result is the
same, and slower. Each rule states its identity; none depends on a method. Rules keep the original nodes: a ``Form`` is
an annotation, and new nodes are made only for its operands.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

aten = torch.ops.aten
WEIGHT, IDENTITY = "W", "I"
Op = Callable[..., object]
"""An op of torch, or another function that a graph calls."""


@dataclass(frozen=True)
class Form:
    """A matrix as a sum of recognised terms; every operand is a node of the same graph.

    Attributes:
        base: ``"W"``, ``"I"``, a node with some rows of W, or None.
        c: column (n, 1) that scales the base's rows, None for 1.
        d: row (1, m) that scales the base's columns, None for 1 or where ``blocks`` include it.
        blocks: the blocks of D (n, k, k), block-diagonal with two blocks or more; None for the identity.
        low: pairs (B (n, r), A (r, m)).
        sparse: triples (rows (k,), cols (k,), values (k,)), added up.
    """

    base: str | fx.Node | None = None
    c: fx.Node | None = None
    d: fx.Node | None = None
    low: tuple[tuple[fx.Node, fx.Node], ...] = ()
    sparse: tuple[tuple[fx.Node, fx.Node, fx.Node], ...] = ()
    blocks: fx.Node | None = None


@dataclass
class Analysis:
    """The state of one analysis: the graph, and the forms found so far.

    Attributes:
        graph: the traced formula.
        anchor: the formula's output node, before which new nodes are inserted.
        like: a node that gives new constants their dtype and device; not W, which a form should not read needlessly.
        keep_factors: products stay low-rank even if the product itself is cheaper to apply.
        misses: why cheaper forms were not found.
    """

    graph: fx.Graph
    anchor: fx.Node
    like: fx.Node
    keep_factors: bool = False
    forms: dict[fx.Node, Form] = field(default_factory=dict)
    misses: list[str] = field(default_factory=list)

    def form(self, value: object) -> Form | None:
        """Return the form of an operand; None if it has no form."""
        return self.forms.get(value) if isinstance(value, fx.Node) else None

    def emit(self, op: Op, *args: object, **kwargs: object) -> fx.Node:
        """Insert a node ``op(*args, **kwargs)`` before the anchor."""
        with self.graph.inserting_before(self.anchor):
            return call_op(self.graph, op, *args, **kwargs)

    def times(self, left: fx.Node | None, right: fx.Node | None) -> fx.Node | None:
        """Return left ∘ right, where None stands for 1."""
        if left is None or right is None:
            return left if right is None else right
        return self.emit(aten.mul.Tensor, left, right)

    def pays(self, node: fx.Node, rank: int, n: int, m: int) -> bool:
        """Return whether to keep factors of this rank of an n x m matrix: they are cheaper, or always kept."""
        if self.keep_factors or rank * (n + m) <= n * m:
            return True
        self.misses.append(f"{node.name}: inner size {rank} of a {n} x {m} product saves nothing")
        return False


RuleFunction = Callable[[Analysis, fx.Node], Form | None]


def call_op(graph: fx.Graph, op: Op, *args: object, **kwargs: object) -> fx.Node:
    """Insert a node ``op(*args)`` at a graph's insertion point, with the fake value of its result."""
    node = graph.call_function(op, args, kwargs)  # type: ignore[arg-type]  # fx checks the arguments itself
    values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])  # type: ignore[type-var]  # likewise
    node.meta["val"] = op(*values, **named)
    return node


@dataclass(frozen=True, eq=False)
class AlgebraRule:
    """One identity: the ops to which it applies, and the function that builds a form."""

    name: str
    ops: tuple[object, ...]
    build: RuleFunction


def shape_of(value: object) -> tuple[int, ...]:
    """Return the shape of an operand; () for a number."""
    return tuple(value.meta["val"].shape) if isinstance(value, fx.Node) else ()


def analyse(
    graph: fx.Graph, weight: fx.Node | None, rules: Sequence[AlgebraRule], *, keep_factors: bool = False
) -> Analysis:
    """Find the form of every node of ``graph``; ``weight`` is the placeholder of W."""
    anchor = next(iter(reversed(graph.nodes)))
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    found = Analysis(graph, anchor, next(node for node in inputs if node is not weight), keep_factors)
    if weight is not None:
        found.forms[weight] = Form(base=WEIGHT)
    by_op: dict[object, list[AlgebraRule]] = {}
    for rule in rules:
        for op in rule.ops:
            by_op.setdefault(op, []).append(rule)
    for node in list(graph.nodes):
        built = (rule.build(found, node) for rule in by_op.get(node.target, ()))
        if (form := next((form for form in built if form is not None), None)) is not None:
            found.forms[node] = form
    return found
