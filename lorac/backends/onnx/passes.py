"""Passes over emitted ONNX programs: each has a name, and reports its changes and skips; the result is verified.

``lorac.passes`` has the passes over captured graphs. A dialect lists its passes over programs as data
(``Dialect.early_rewrites``, ``Dialect.late_rewrites``).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape
from onnxscript import rewriter
from onnxscript.rewriter import pattern

from lorac.backends.onnx.claims import modules_of
from lorac.errors import CompileError
from lorac.ir.graph.passes import PassResult
from lorac.target.dialect import Dialect

PassObserver = Callable[[str, PassResult], None]
"""(name of a pass, its result) -> None; called after each pass."""


@dataclass(frozen=True)
class OnnxPass(ABC):
    """One rewrite of an emitted program; its options are the dataclass's fields.

    A pass may run twice: the second run changes nothing and says so.

    Attributes:
        name: name of the pass in reports and messages.
    """

    name: ClassVar[str]

    @abstractmethod
    def apply(self, model: ir.Model) -> PassResult:
        """Edit a program in place; report whether it changed, and the parts that were skipped."""


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
    """Check that every value that a program reads exists before the node that reads it.

    Such a value is an input, an initializer, or an output of an earlier node, of the same graph or one around it.

    Raises:
        CompileError: a value does not exist; the message names the pass, the value and the node that reads it.
    """
    _verify_graph(model.graph, set(), after)


def _verify_graph(graph: ir.Graph, outer: set[ir.Value | None], after: str) -> None:
    known = {None, *outer, *graph.inputs, *graph.initializers.values()}
    for node in graph:
        if not known.issuperset(node.inputs):
            raise _unknown_value_error(node.inputs, known, after, f"{node.op_type} '{node.name}'")
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                _verify_graph(attribute.as_graph(), known, after)
        known.update(node.outputs)
    if not known.issuperset(graph.outputs):
        raise _unknown_value_error(graph.outputs, known, after, f"graph '{graph.name}'")


def _unknown_value_error(
    read: Iterable[ir.Value | None], known: set[ir.Value | None], after: str, reader: str
) -> CompileError:
    names = [value.name for value in read if value is not None and value not in known]
    return CompileError(
        f"after the pass '{after}' {reader} reads '{names[0]}', which nothing before it computes",
        code="verification_failed",
    )


def shared_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Return a graph's constant by name; add it to the graph first if it is missing."""
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    return graph.initializers[name]


def number_constant(graph: ir.Graph, numbers: float | Sequence[int], dtype: npt.DTypeLike = np.int64) -> ir.Value:
    """Return a graph's constant of some numbers, which all ops that read equal numbers share."""
    array = np.array(numbers, dtype)
    return shared_constant(graph, "_".join(map(str, (array.dtype, array.ndim, *array.reshape(-1)))), array)


class OpWriter:
    """A writer of ops with one output each, and of constants that they read.

    Args:
        graph: the graph that gets the constants.

    Attributes:
        tape: the ops that were written, which are not in the graph yet.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self.tape = graph, Tape()

    def op(self, name: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Write an op."""
        return self.tape.op(name, inputs, attributes)

    def numbers(self, *values: int) -> ir.Value:
        """Return a constant vector of integers."""
        return number_constant(self.graph, values)

    def number(self, value: float, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """Return a constant number."""
        return number_constant(self.graph, value, dtype.numpy())


def read_numbers(value: ir.Value | None) -> list[int]:
    """Return the numbers of a constant; an empty list for any other value."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return [] if tensor is None else tensor.numpy().reshape(-1).tolist()


def copy_node(node: ir.Node, inputs: Sequence[ir.Value | None], attributes: Iterable[ir.Attr] | None = None) -> ir.Node:
    """Return a node of the same op, name and metadata that reads other values, or has other attributes."""
    return ir.Node(
        node.domain,
        node.op_type,
        inputs,
        node.attributes.values() if attributes is None else attributes,
        num_outputs=len(node.outputs),
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )


def nested_nodes(node: ir.Node) -> Iterator[ir.Node]:
    """Yield the nodes of the graphs within a node (the branches of an If), at all depths."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()


def module_around(node: ir.Node) -> str:
    """Return the path of the innermost module that a node comes from, or the node's name if it has no module."""
    modules = modules_of(node.metadata_props)
    return modules[-1] if modules else str(node.name)


def make_rewrite_pass(rules: Iterable[pattern.RewriteRule]) -> ir.passes.InPlacePass:
    """Return a pass that applies rules in this order, with the result of onnxscript's own pass but faster."""
    return rewriter.RewritePass([_RulesByOp([*rules])])  # type: ignore[list-item]  # stands for a rule


class _RulesByOp:
    """Several rules as one rule, which tries at each node only the rules whose pattern ends with the node's op.

    This saves time: onnxscript tries every rule at every node, and sets up a match before it looks at the node's op.

    Args:
        rules: the rules, in the order in which they are tried.
    """

    def __init__(self, rules: list[pattern.RewriteRule]) -> None:
        self.rules = rules
        self._by_op: dict[str, list[pattern.RewriteRule]] = {}
        # After a match, onnxscript reads the options of the rule that matched. Before the first match it reads
        # `remove_nodes` to find out whether any rule keeps the nodes it matched; then such a rule has to answer.
        self._options_of = next((rule for rule in rules if not rule.remove_nodes), rules[0])

    def __getattr__(self, name: str) -> object:
        """Return an option of the rule that was applied last."""
        return getattr(self._options_of, name)

    def graph_pre_visitor(self) -> None:
        """Set every rule up for a graph."""
        for rule in self.rules:
            if rule.graph_pre_visitor:
                rule.graph_pre_visitor()

    def graph_post_visitor(self) -> None:
        """Clean up after a graph."""
        for rule in self.rules:
            if rule.graph_post_visitor:
                rule.graph_post_visitor()

    def try_rewrite(self, model: ir.Model, graph: ir.Graph | ir.Function, node: ir.Node, **options: object) -> object:
        """Return the replacement by the first rule that matches a node; None if no rule does."""
        op, by_op = node.op_type, self._by_op
        if op not in by_op:
            by_op[op] = [rule for rule in self.rules if rule._target_pattern.output_nodes[0].op.matches(op)]
        for rule in by_op[op]:
            replacement = rule.try_rewrite(model, graph, node, **options)  # type: ignore[arg-type]  # passed on
            if replacement is not None:
                self._options_of = rule
                return replacement
        return None
