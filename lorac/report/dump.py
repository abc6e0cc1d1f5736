"""A graph as rows of text and references, the input of the printer, the diff and the pictures.

A dump holds no tensors, no fx nodes and no fake values, so it may be kept after the graph and its weights are gone.
Names come from the module path and the op, never from a counter over the whole graph: a pass that adds a node to one
layer renames nothing elsewhere, and identical layers have identical rows.
"""

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from lorac.argument_types import Operands
from lorac.ir.algebra.operands import BIAS, WEIGHT
from lorac.ir.graph import ops
from lorac.ir.graph.adapted_call import AdaptedCall, find_producing_call
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.symbolic_shapes import SYMBOL, rename_symbols
from lorac.ir.sites.site import KINDS_WITHOUT_WEIGHT
from lorac.ir.slots.roles import ROLES, slot_name
from lorac.report.scopes import ModuleScopes, is_size, node_site

REF = "\x00"
"""Stands for the next reference in a row's text."""
_SIZE_LETTERS = ("s", "t", "u", "v", "w")
_HIDDEN_KEYWORDS = frozenset({"device", "layout", "pin_memory", "memory_format", "dtype", "non_blocking", "copy"})


@dataclass(frozen=True)
class Row:
    """One value of a graph.

    Attributes:
        kind: ``"in"``, ``"value"`` or ``"out"``.
        name: unique within its block.
        text: op and operands; ``REF`` stands for the next of ``refs``.
        refs: indices of the rows that it reads.
        type: dtype and shape.
        source: file and line of its source.
        blocks: the repeated blocks around it, outermost first.
        modules: all modules around it, outermost first; the n-th further call of one ends in ``@n``.
        site: the site that it belongs to, or None.
        adapted: whether it is a whole call of an adapted site.
        stored: public names of the slots, and names of the weights and constants, that it reads -> dtype and shape.
    """

    kind: str
    name: str
    text: str
    refs: tuple[int, ...] = ()
    type: str = ""
    source: str = ""
    blocks: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    site: str | None = None
    adapted: bool = False
    stored: Mapping[str, str] = field(default_factory=dict)

    @property
    def op(self) -> str:
        """The op; empty for inputs and outputs."""
        return "" if self.kind != "value" else self.text.removeprefix("adapted ").partition(" ")[0]


@dataclass(frozen=True)
class Dump:
    """A graph as text.

    Attributes:
        level: its level, in lower case.
        rows: inputs, values, outputs.
        sites: path of every adaptable site -> ``"fused"`` (its merged weight is a slot), ``"live"`` or ``"bare"``.
        slots: public name of every slot -> path of its site.
        calls: site -> how often it is called; empty once calls are lowered.
        classes: module path -> name of the module's class.
    """

    name: str
    level: str
    rows: tuple[Row, ...]
    sites: Mapping[str, str] = field(default_factory=dict)
    slots: Mapping[str, str] = field(default_factory=dict)
    calls: Mapping[str, int] = field(default_factory=dict)
    classes: Mapping[str, str] = field(default_factory=dict)


_DUMPED_META = ("val", "nn_module_stack", "stack_trace", "custom")
"""Keys of a node's metadata that a dump reads."""


class GraphRecord:
    """A graph at one stage, from which a dump can be made after passes have edited the graph.

    A record costs a tuple per node and holds no weights: passes replace a node's operands and metadata as a whole.
    """

    def __init__(self, graph: Graph) -> None:
        self.name, self.level, self.sites, self.plans = graph.name, graph.level, graph.sites, dict(graph.plans)
        self.slots, self.projections, self.axes = dict(graph.slots), dict(graph.projections), dict(graph.axes)
        specs = graph.exported.graph_signature.input_specs
        self.inputs = {getattr(spec.arg, "name", ""): (spec.kind, spec.target) for spec in specs}
        self._nodes = [
            (node, node.name, node.args, node.kwargs, node.target, *map(node.meta.get, _DUMPED_META))
            for node in graph.fx.nodes
        ]

    def rebuild(self) -> fx.Graph:
        """Return the fx graph of the stage."""
        graph, known = fx.Graph(), dict[fx.Node, fx.Node]()
        for node, name, args, kwargs, target, *meta in self._nodes:
            operands: Operands = fx.map_arg(args, known.__getitem__)
            known[node] = made = graph.create_node(node.op, target, operands, fx.map_arg(kwargs, known.__getitem__))
            made.name = name  # an input with the name of a builtin, such as "input", is renamed in a copy
            made.meta = {key: value for key, value in zip(_DUMPED_META, meta, strict=True) if value is not None}
        return graph

    def dump(self) -> Dump:
        """Return the graph as text."""
        return _GraphDumper(self).dump()


def dump(graph: Graph) -> Dump:
    """Return the dump of a graph at any level."""
    return GraphRecord(graph).dump()


def short_path(path: str) -> str:
    """Return the last component of a module path, preceded by its list where it is a number."""
    parts = path.split(".")
    start = len(parts) - 1
    while start and parts[start].isdigit():
        start -= 1
    return ".".join(parts[start:])


def parameter_label(name: str) -> str:
    """Return the label of a parameter or buffer: ``W.q_proj``, ``rotary_emb.inv_freq``."""
    owner, _, leaf = name.rpartition(".")
    if leaf in (WEIGHT, BIAS) and owner:
        return f"{ROLES[leaf].letter}.{short_path(owner)}"
    return f"{short_path(owner)}.{leaf}".removeprefix(".")


def slot_label(site: str, role: str) -> str:
    """Return the label of a slot, without the path to its site."""
    return slot_name(short_path(site), role)


@functools.cache
def short_dtype(dtype: torch.dtype | str) -> str:
    """Return ``f32``, ``bf16``, ``i64``, ``u8``, ``bool`` and the like."""
    name = str(dtype).removeprefix("torch.")
    for long, brief in (("complex", "c"), ("float", "f"), ("uint", "u"), ("int", "i")):
        name = name.replace(long, brief)
    return name


class ValueNames:
    """Names of values, made from the module and the op, each unique within its block."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)

    def new(self, label: str, owner: str, blocks: tuple[str, ...], *, is_result: bool = False) -> str:
        """Return the name of one more value.

        Args:
            label: its op.
            owner: path of its module.
            blocks: the repeated blocks around it.
            is_result: whether it is the result of a call of the module, and gets the module's name only.
        """
        inner = blocks[-1].partition("@")[0] if blocks else ""
        within = owner[len(inner) :].removeprefix(".") if owner.startswith(inner) else owner
        stem = within if within and is_result else f"{within}.{label}".removeprefix(".")
        stem = stem.replace(" ", "_")
        counts = self._counts[blocks]
        counts[stem] += 1
        return stem if counts[stem] == 1 else f"{stem}_{counts[stem] - 1}"


class _GraphDumper:
    """The state while one graph is dumped."""

    def __init__(self, graph: GraphRecord) -> None:
        self.graph, self.fx = graph, graph.rebuild()
        self.slots = {slot.node: slot for slot in graph.slots.values()}
        self.symbols = self._symbols()
        self.sizes: dict[object, str] = {}
        self.types: dict[int, str] = {}
        self.index: dict[fx.Node, int] = {}
        self.stored: dict[str, str] = {}
        self.names = ValueNames()
        self.scopes = ModuleScopes([n for n in self.fx.nodes if n.op not in ("placeholder", "output")])

    def dump(self) -> Dump:
        rows: list[Row] = []
        for node in self.fx.nodes:
            for row in self._rows(node):
                self.index[node] = len(rows)
                rows.append(row)
        results = (node for node in self.fx.nodes if find_producing_call(node).target in ops.SITE_CALLS)
        calls = Counter(site for node in results if (site := self._site(node)) is not None)
        slots = {slot.name: slot.site for slot in self.graph.slots.values()}
        plans = {path: plan for path, plan in self.graph.plans.items() if not plan.empty}
        states = {path: "fused" if plan.bound else "live" for path, plan in plans.items()}
        sites = {
            path: states.get(path, "bare")
            for path, site in self.graph.sites.items()
            if site.kind not in KINDS_WITHOUT_WEIGHT or path in plans
        }
        level, classes = self.graph.level.name.lower(), self.scopes.classes
        return Dump(self.graph.name, level, tuple(rows), sites, slots, dict(calls), classes)

    def _rows(self, node: fx.Node) -> Iterable[Row]:
        if node.op == "placeholder":
            if self._is_input(node):
                yield Row("in", node.name, "", (), self._type(node.meta.get("val")))
            return
        if node.op == "output":
            for value in node.args[0]:  # type: ignore[union-attr]  # an output node holds a tuple
                refs: list[int] = []
                self.stored = {}
                text = self._operand(value, refs)
                example = value.meta.get("val") if isinstance(value, fx.Node) else None
                yield Row("out", "", text, tuple(refs), self._type(example), stored=self.stored)
            return
        value = node.meta.get("val")
        if is_size(value) or (value is None and not node.users):
            return  # sizes are written where they are used; checks compute nothing
        yield self._value(node)

    def _value(self, node: fx.Node) -> Row:
        owner, modules, source = self.scopes.locate(node)
        blocks = self.scopes.blocks_of(modules)
        refs: list[int] = []
        self.stored = {}
        label, args, kwargs = _op_label(node.target), list(node.args), node.kwargs
        if node.target is ops.adapted:
            call = AdaptedCall.of(node)
            label, args = f"adapted {_op_label(call.op)}", list(call.host)
            kwargs = {role: operand for role, operand in call.operands.items() if operand.op != "placeholder"}
            for operand in call.operands.values():
                if operand.op == "placeholder":
                    self._state(operand)
        elif node.target in ops.SITE_OPS:
            args = list(ops.operands_of(node))
        while args and args[-1] is None:
            args.pop()
        operands = [self._operand(a, refs) for a in args]
        named = [
            f"{k}={self._operand(v, refs)}" for k, v in kwargs.items() if k not in _HIDDEN_KEYWORDS and v is not None
        ]
        text = " ".join(part for part in (label, ", ".join([*operands, *named])) if part)
        name = self.names.new(label, owner, blocks, is_result=node in self.scopes.results)
        adapted = find_producing_call(node).target is ops.adapted
        type_ = self._type(node.meta.get("val"))
        site = self._site(node)
        return Row("value", name, text, tuple(refs), type_, source, blocks, modules, site, adapted, self.stored)

    def _site(self, node: fx.Node) -> str | None:
        """Return the site that a node belongs to; nodes of a fused projection belong to no single site."""
        site = node_site(node)
        return None if site in self.graph.projections else site

    def _operand(self, value: object, refs: list[int]) -> str:
        if isinstance(value, fx.Node):
            val = value.meta.get("val")
            if value.op == "placeholder" and not self._is_input(value):
                return self._state(value)
            if is_size(val):
                return self._size(val)
            if value.op == "get_attr" and value not in self.index:
                return str(value.target)
            refs.append(self.index[value])
            return REF
        if isinstance(value, list | tuple):
            return f"[{', '.join(self._operand(v, refs) for v in value)}]"
        if isinstance(value, torch.dtype):
            return short_dtype(value)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 2**63 - 1:
            return "end"
        return str(value)

    def _state(self, node: fx.Node) -> str:
        """Return the label of a parameter, buffer, constant or slot, with its shape."""
        shape, type_ = self._shape(node.meta.get("val")), self._type(node.meta.get("val"))
        slot = self.slots.get(node.name)
        if slot is not None:
            self.stored[slot.name] = type_
            return f"{slot_label(slot.site, slot.role)}{shape}!"
        _, target = self.graph.inputs.get(node.name, (None, None))
        self.stored[str(target or node.target)] = type_
        return parameter_label(str(target or node.target)) + shape

    def _is_input(self, node: fx.Node) -> bool:
        kind, _ = self.graph.inputs.get(node.name, (InputKind.USER_INPUT, None))
        return node.name not in self.slots and kind is InputKind.USER_INPUT

    def _type(self, value: object) -> str:
        if isinstance(value, torch.Tensor):
            if id(value) not in self.types:  # identical layers share the fake tensors of their values
                self.types[id(value)] = short_dtype(value.dtype) + self._shape(value)
            return self.types[id(value)]
        if isinstance(value, list | tuple):
            return f"({', '.join(self._type(v) for v in value)})"
        return "" if value is None else str(value)

    def _shape(self, value: torch.Tensor | None) -> str:
        return f"[{', '.join(map(self._size, value.shape))}]" if value is not None else ""

    def _size(self, size: object) -> str:
        """Return a size with the graph's symbols replaced by letters."""
        if isinstance(size, int):
            return str(size)
        expression = getattr(size, "node", size)
        expression = getattr(expression, "expr", expression)
        if expression not in self.sizes:
            self.sizes[expression] = rename_symbols(str(expression), self.symbols)
        return self.sizes[expression]

    def _symbols(self) -> dict[str, str]:
        """Return the letter of each symbol: ``b`` for the first size of an input, then s, t, …; ``r`` for a rank.

        ``D`` is the number of places of slots, and ``m`` that of the tokens of a segment (``lorac.ir.slots.places``).
        """
        segments = (symbol for symbol, name in self.graph.axes.items() if name.startswith("segment_"))
        letters = {symbol: f"m{i or ''}" for i, symbol in enumerate(segments)}
        following = itertools.chain(_SIZE_LETTERS, (f"n{i}" for i in itertools.count()))
        values = [(node.name, node.meta.get("val")) for node in self.fx.find_nodes(op="placeholder")]
        shapes = [(name, value.shape) for name, value in values if isinstance(value, torch.Tensor)]
        sizes = ((name, axis, str(size)) for name, shape in shapes for axis, size in enumerate(shape))
        for name, axis, symbol in sizes:
            if symbol in letters or not SYMBOL.fullmatch(symbol):
                continue
            if name in self.slots:
                letters[symbol] = "D" if axis == 0 and self.slots[name].placed else "r"
            else:
                letters[symbol] = "b" if axis == 0 and "b" not in letters.values() else next(following)
        return letters


@functools.lru_cache(maxsize=4096)
def _op_label(target: object) -> str:
    schema = getattr(target, "_schema", None)
    if schema is None:
        return str(getattr(target, "__name__", target))
    return str(schema.name).removeprefix("aten::").removeprefix("lorac::").replace("::", ".")
