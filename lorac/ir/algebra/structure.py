"""The algebra of weight formulas: which structure a traced formula has, found node by node.

A formula is traced to an aten graph over ``W`` (out, in), ``b`` (out,) and the variant's parameters. Each matrix-valued
node may get a ``Form``, a sum of recognised parts::

    c ∘ base·D ∘ d  +  Σ Bᵢ·Aᵢ  +  Σ sparse(rowsⱼ, colsⱼ, valuesⱼ)      base: W, rows of it, the identity, or nothing

Rules buy speed only. A node without a form is still computed by its own aten op, so taking any rule away leaves every
result and makes it slower. Each rule names the identity it uses; none knows a method. Rules that fire keep the
original nodes: a ``Form`` is an annotation, new nodes are made only for the factors it speaks of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
WEIGHT, IDENTITY = "W", "I"


@dataclass(frozen=True)
class Form:
    """A matrix as a sum of recognised parts; every operand is a node of the same graph.

    Attributes:
        base: ``"W"``, ``"I"``, the node that is some rows of W, or None.
        c: column (n, 1) scaling the base's rows, None for 1.
        d: row (1, m) scaling the base's columns, None for 1, and where there are blocks: those hold it.
        blocks: those of D (n, k, k), block-diagonal with two blocks or more, None for the identity.
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
    """The state of one analysis: the graph, the forms found so far, and a way to make new nodes.

    ``like`` gives new constants their dtype and device; it is not W, which a form should not read without need.
    ``keep_factors``: products stay low-rank even where the product itself is cheaper to apply.
    """

    graph: fx.Graph
    anchor: fx.Node
    like: fx.Node
    keep_factors: bool = False
    forms: dict[fx.Node, Form] = field(default_factory=dict)
    misses: list[str] = field(default_factory=list)

    def form(self, value: object) -> Form | None:
        """The form of an operand, or None where it is opaque."""
        return self.forms.get(value) if isinstance(value, fx.Node) else None

    def emit(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node ``op(*args)`` before the anchor, with its value's shape known."""
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(op, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = op(*values[0], **values[1])
        return node

    def times(self, left: Any, right: Any) -> Any:
        """left ∘ right, where None stands for 1."""
        if left is None:
            return right
        return left if right is None else self.emit(aten.mul.Tensor, left, right)

    def pays(self, node: fx.Node, rank: int, n: int, m: int) -> bool:
        """Whether factors of this rank of an n x m matrix are cheaper to apply than the matrix, or kept anyway."""
        if self.keep_factors or rank * (n + m) <= n * m:
            return True
        self.misses.append(f"{node.name}: inner size {rank} of a {n} x {m} product saves nothing")
        return False


RuleFunction = Callable[[Analysis, fx.Node], Form | None]


@dataclass(frozen=True)
class AlgebraRule:
    """One identity: the ops it looks at and what it makes of them."""

    name: str
    ops: tuple[object, ...]
    build: RuleFunction


def shape_of(value: Any) -> tuple[int, ...]:
    """Shape of an operand; () for numbers."""
    return tuple(value.meta["val"].shape) if isinstance(value, fx.Node) else ()


def analyse(
    graph: fx.Graph, weight: fx.Node | None, rules: Sequence[AlgebraRule], *, keep_factors: bool = False
) -> Analysis:
    """Find the form of every node of ``graph``; ``weight`` is the placeholder that is W."""
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
        form = _first_form(found, node, by_op.get(node.target, ()))
        if form is not None:
            found.forms[node] = form
    return found


def _first_form(found: Analysis, node: fx.Node, rules: Iterable[AlgebraRule]) -> Form | None:
    """What the first rule that has an answer makes of a node."""
    built = (rule.build(found, node) for rule in rules)
    return next((form for form in built if form is not None), None)
