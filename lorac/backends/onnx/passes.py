"""Passes over emitted programs: each has a name, reports what it did, and leaves a program that is verified.

They are to ONNX what ``lorac.passes`` is to captured graphs. A dialect lists the passes that it wants as data
(``Dialect.fusions``, ``Dialect.finish``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnxscript.rewriter import pattern

from lorac.backends.onnx.claims import modules_of
from lorac.backends.onnx.pattern_pass import make_rewrite_pass
from lorac.errors import CompileError
from lorac.ir.graph.passes import PassResult, Skip
from lorac.target.dialect import Dialect

PassObserver = Callable[[str, PassResult], None]
"""(name of a pass, its result) -> None; called after each pass."""


@dataclass(frozen=True)
class OnnxPass(ABC):
    """One rewrite of an emitted program; its options are the dataclass's fields.

    A pass may run twice: the second run changes nothing and says so.

    Attributes:
        name: what reports and messages call it.
    """

    name: ClassVar[str]

    @abstractmethod
    def apply(self, model: ir.Model) -> PassResult:
        """Edit a program in place, and report whether it changed and what was left as it was."""


@dataclass(frozen=True)
class PatternPass(OnnxPass):
    """A pass made of onnxscript's rewrite rules."""

    @abstractmethod
    def rules(self, skips: list[Skip]) -> Iterable[pattern.RewriteRule]:
        """Return the rules; a rule appends to ``skips`` what it matches and leaves alone."""

    def apply(self, model: ir.Model) -> PassResult:
        skips: list[Skip] = []
        result = make_rewrite_pass(self.rules(skips))(model)
        return PassResult(result.modified, tuple(dict.fromkeys(skips)))


OnnxDialect = Dialect[OnnxPass]
"""Dialect of a target that reads ONNX files."""


def run_passes(model: ir.Model, passes: Sequence[OnnxPass], observe: PassObserver | None = None) -> None:
    """Run passes over a program in order; verify the program after each that changed it.

    Raises:
        CompileError: a pass left a program that reads a value which nothing computes.
    """
    for step in passes:
        result = step.apply(model)
        if result.changed:
            verify_model(model, after=step.name)
        if observe is not None:
            observe(step.name, result)


def verify_model(model: ir.Model, after: str) -> None:
    """Check that every value that a program reads exists where it is read.

    It is an input, an initializer, or an output of an earlier node of the same graph or of a graph around it.

    Raises:
        CompileError: naming the pass, the value and the node that reads it.
    """
    known = {value for value in (*model.graph.inputs, *model.graph.initializers.values())}
    _verify_graph(model.graph, known, after)


def _verify_graph(graph: ir.Graph, outer: set[ir.Value], after: str) -> None:
    known = {*outer, *graph.inputs, *graph.initializers.values()}
    for node in graph:
        _verify_reads(node.inputs, known, after, f"{node.op_type} '{node.name}'")
        inner_graphs = (a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH)
        for inner in inner_graphs:
            _verify_graph(inner, known, after)
        known.update(node.outputs)
    _verify_reads(graph.outputs, known, after, f"graph '{graph.name}'")


def _verify_reads(values: Iterable[ir.Value | None], known: set[ir.Value], after: str, reader: str) -> None:
    for value in values:
        if value is not None and value not in known:
            raise CompileError(
                f"after the pass '{after}' {reader} reads '{value.name}', which nothing before it computes",
                code="verification_failed",
            )


def module_around(node: ir.Node) -> str:
    """Return the path of the module that a node comes from, or the node's name where none is noted."""
    modules = modules_of(node.metadata_props)
    return modules[-1] if modules else str(node.name)
