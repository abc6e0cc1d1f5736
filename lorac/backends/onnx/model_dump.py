"""An emitted program as text rows: the ops that the target runs after all rewrites.

Module and source line of a node come from its metadata. A node without metadata, which a rewrite added, belongs to the
module that reads it, if that module is adjacent.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import onnx
from onnx import helper, numpy_helper

from lorac.backends.onnx.claims import classes_of, modules_of, read_metadata, source_of
from lorac.backends.onnx.model_files import MODEL_FILE, graph_file
from lorac.ir.graph.graph import SlotInput
from lorac.report.dump import REF, Dump, Row, ValueNames, parameter_label, short_dtype, slot_label
from lorac.report.scopes import repeated_blocks
from lorac.target.engine import ProgramFiles

LEVEL = "emitted"
_MAX_SHOWN_ELEMENTS = 16
"""Number of elements up to which the values of a constant are shown instead of its name."""


def dump_model(files: ProgramFiles, graph: str, slots: Mapping[str, SlotInput]) -> Dump:
    """Return the rows of one graph's emitted model, without reading its weights.

    Args:
        slots: its slot inputs by public name.
    """
    return _ModelDumper(onnx.load_from_string(files[graph_file(graph, MODEL_FILE)].read()), graph, slots).dump()


class _ModelDumper:
    def __init__(self, model: onnx.ModelProto, name: str, slots: Mapping[str, SlotInput]) -> None:
        self.graph, self.name, self.slots = model.graph, name, slots
        self.sites = {path for slot in slots.values() for path in slot.members or (slot.site,)}
        self.modules = _assign_modules(self.graph)
        self.containers = {path for stack in self.modules for path in stack[:-1]}
        values = [*self.graph.input, *self.graph.output, *self.graph.value_info]
        self.types = {value.name: _format_type(value) for value in values}
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.index: dict[str, int] = {}
        self.stored: dict[str, str] = {}
        self.names = ValueNames()

    def dump(self) -> Dump:
        rows: list[Row] = []
        for value in self.graph.input:
            if value.name not in self.slots:
                self.index[value.name] = len(rows)
                rows.append(Row("in", value.name, "", (), self.types[value.name]))
        for node, modules in zip(self.graph.node, self.modules, strict=True):
            self.index |= dict.fromkeys(node.output, len(rows))
            rows.append(self._row(node, modules))
        for value in self.graph.output:
            rows.append(Row("out", "", REF, (self.index[value.name],), self.types[value.name]))
        sites = {site: "fused" if f"{site}:weight" in self.slots else "live" for site in sorted(self.sites)}
        slots = {name: slot.site for name, slot in self.slots.items()}
        classes: dict[str, str] = {}
        for node in self.graph.node:
            classes |= classes_of(read_metadata(node))
        return Dump(self.name, LEVEL, tuple(rows), sites, slots, classes=classes)

    def _row(self, node: onnx.NodeProto, modules: tuple[str, ...]) -> Row:
        refs: list[int] = []
        self.stored = {}
        operands = [self._operand(name, refs) for name in node.input]
        text = " ".join(part for part in (node.op_type, ", ".join([*operands, *_format_attributes(node)])) if part)
        # A node also reads the values that its subgraphs read.
        names = dict.fromkeys(_walk_subgraph_inputs(node))
        inner = [self.index[name] for name in names if name in self.index]
        for name in names.keys() & (self.slots.keys() | self.constants.keys()):
            self._operand(name, [])
        refs.extend(ref for ref in inner if ref not in refs)
        text += "".join(f"; {REF}" for _ in range(text.count(REF), len(refs)))
        owner = modules[-1] if modules else ""
        blocks = repeated_blocks(modules, self.containers)
        # A site that contains other modules counts as a block: its own nodes belong to the block.
        site = owner if owner in self.sites and owner not in self.containers else None
        name = self.names.new(node.op_type, owner, blocks)
        type_ = ", ".join(self.types.get(output, "") for output in node.output if output)
        source = source_of(read_metadata(node))
        return Row("value", name, text, tuple(refs), type_, source, blocks, modules, site, stored=self.stored)

    def _operand(self, name: str, refs: list[int]) -> str:
        if name in self.index:
            refs.append(self.index[name])
            return REF
        slot = self.slots.get(name)
        if slot is not None:
            self.stored[name] = self.types[name]
            return slot_label(slot.site, slot.role) + self.types[name].partition("[")[2].join(["[", ""]) + "!"
        tensor = self.constants.get(name)
        if tensor is None:
            return name or "–"
        dtype = short_dtype(str(helper.tensor_dtype_to_np_dtype(tensor.data_type)))
        self.stored[name] = f"{dtype}{list(tensor.dims)}"
        is_weight = "." in tensor.name  # else a rewrite made it
        if math.prod(tensor.dims) <= _MAX_SHOWN_ELEMENTS and not tensor.external_data and not is_weight:
            return str(numpy_helper.to_array(tensor).tolist())
        return f"{parameter_label(tensor.name) if is_weight else 'constant'}{list(tensor.dims)}"


def _assign_modules(graph: onnx.GraphProto) -> list[tuple[str, ...]]:
    """Return the modules around each node, outermost first.

    A node without metadata belongs to the module of its first reader if a neighbouring node does too, otherwise to the
    modules that both neighbours share, so that a module's nodes stay together.
    """
    recorded = [modules_of(read_metadata(node)) for node in graph.node]
    after = [*_fill_gaps(recorded[::-1])[::-1], ()][1:]
    before = [(), *_fill_gaps(recorded)][:-1]
    found: list[tuple[str, ...]] = [()] * len(recorded)
    read_at: dict[str, int] = {}
    for index in range(len(recorded) - 1, -1, -1):
        node, own_modules = graph.node[index], recorded[index]
        reader = min((read_at[name] for name in node.output if name in read_at), default=None)
        near = (before[index], after[index])
        if own_modules is not None:
            found[index] = own_modules
        elif reader is not None and found[reader] in near:
            found[index] = found[reader]
        else:
            found[index] = tuple(one for one, other in zip(*near, strict=False) if one == other)
        read_at |= dict.fromkeys([*node.input, *_walk_subgraph_inputs(node)], index)
    return found


def _fill_gaps(recorded: Sequence[tuple[str, ...] | None]) -> list[tuple[str, ...]]:
    """Replace each None by the last item before it."""
    found: list[tuple[str, ...]] = []
    for item in recorded:
        found.append(item if item is not None else found[-1] if found else ())
    return found


def _walk_subgraph_inputs(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names that nodes in a node's subgraphs read."""
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from inner.input
            yield from _walk_subgraph_inputs(inner)


def _format_attributes(node: onnx.NodeProto) -> Iterator[str]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            ops = Counter(inner.op_type for inner in attribute.g.node)
            counts = ", ".join(f"{count} {op}" if count > 1 else op for op, count in ops.items())
            yield f"{attribute.name.removesuffix('_branch')}=({counts})"
        elif attribute.type != onnx.AttributeProto.TENSOR:
            value = helper.get_attribute_value(attribute)
            yield f"{attribute.name}={value.decode() if isinstance(value, bytes) else value}"


def _format_type(value: onnx.ValueInfoProto) -> str:
    """Format a type as ``f32[b, s, 64]``, with the model's names of sizes; return "" if the type is unknown."""
    kind = value.type.tensor_type
    if not kind.elem_type:
        return ""
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
    names = (dim.dim_param.rpartition(":") for dim in kind.shape.dim)  # names of ranks begin with a site's path
    labels = (slot_label(site, name) if colon else name for site, colon, name in names)
    sizes = ", ".join(label or str(dim.dim_value) for label, dim in zip(labels, kind.shape.dim, strict=True))
    return f"{short_dtype(str(dtype))}[{sizes}]"
