"""The structure of a model's output: the names of its tensors, and its JSON form."""

import dataclasses
import importlib
import re
import sys
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from torch.utils import _pytree as pytree

from lorac.argument_types import JsonMapping
from lorac.ir.calls.row_layout import LIST_AXIS, RowLayout

_LEAF = "*"
_BASES = {"transformers": "transformers.utils.generic:ModelOutput", "diffusers": "diffusers.utils.outputs:BaseOutput"}
"""Package -> the base class of its output classes."""
_ALLOWED = re.compile(
    r"(?P<module>transformers\.modeling_outputs|transformers\.models\.\w+\.modeling_\w+"
    r"|diffusers\.utils\.outputs|diffusers\.models(?:\.\w+)+)\.(?P<name>[A-Za-z]\w*)",
    re.ASCII,
)
"""Import paths of output classes that an artifact may name. Importing a module runs its code, so only modules that
define models are allowed."""

OUTPUT_NAME = "output"
"""Name of a single tensor that the model does not name; the tensors of a tuple add their index."""


@dataclass(frozen=True, eq=False)
class OutputStructure:
    """The structure of a model's output, without the program's tensors.

    Attributes:
        spec: pytree of the whole output.
        constants: leaf -> its value in every output: None, a number, a text.
        numbers: leaves that are integers in the model's output and tensors in the program's, such as sizes of inputs.
    """

    spec: pytree.TreeSpec
    constants: Mapping[int, object] = field(default_factory=dict)
    numbers: tuple[int, ...] = ()

    @property
    def tensor_count(self) -> int:
        """Number of tensors of the program."""
        return int(self.spec.num_leaves) - len(self.constants)

    def tensor_names(self, inputs: Collection[str]) -> tuple[str, ...]:
        """Return the names of the program's tensors, as ``name_outputs`` gives them."""
        return tuple(name for i, name in enumerate(name_outputs(self.spec, inputs)) if i not in self.constants)

    def fill(self, tensors: Sequence[object]) -> object:
        """Build the model's output from the program's tensors."""
        return pytree.tree_unflatten(self._leaves(tensors), self.spec)

    def with_values(self, values: Mapping[str, object]) -> "OutputStructure":
        """Return a copy with other constants, by name in the output (``name_outputs``)."""
        names = name_outputs(self.spec, ())
        return replace(self, constants={i: values.get(names[i], value) for i, value in self.constants.items()})

    def join(self, parts: Sequence[Sequence[object]], rows: RowLayout, total: int) -> object:
        """Build the output of a call with ``total`` rows from the program's tensors for each part of the call."""
        leaves, spec = _join(self.spec, [iter(self._leaves(tensors)) for tensors in parts], (rows, total), "")
        return pytree.tree_unflatten(leaves, spec)

    def find_row_outputs(
        self, tensors: Sequence[object], other: object, rows: RowLayout, total: int
    ) -> RowLayout | None:
        """Find the row axes of a program's outputs; return a copy of ``rows`` with them.

        Args:
            tensors: the program's outputs for its number of rows.
            other: the model's output for ``total`` rows.
            rows: a layout without ``outputs``.
            total: the number of rows.

        Returns:
            None where the two outputs differ in anything else.
        """
        leaves, spec = pytree.tree_flatten(other)
        found = list(_compare((self.spec, iter(self._leaves(tensors))), (spec, iter(leaves)), (rows, total), ""))
        return None if None in found else replace(rows, outputs=dict(filter(None, found)))

    def _leaves(self, tensors: Sequence[object]) -> list[object]:
        given = iter(tensors)
        leaves = [self.constants[i] if i in self.constants else next(given) for i in range(self.spec.num_leaves)]
        for i in self.numbers:
            leaves[i] = int(leaves[i])  # type: ignore[call-overload]  # a tensor
        return leaves


_Call = tuple[RowLayout, int]
"""The rows of a program, and the number of rows of a call."""
_Tree = tuple[pytree.TreeSpec, Iterator[object]]
"""An output's structure, and its leaves."""


def _join(
    spec: pytree.TreeSpec, parts: Sequence[Iterator[object]], call: _Call, path: str
) -> tuple[list[object], pytree.TreeSpec]:
    """Join the leaves of several outputs; return the leaves and the structure of the joined output."""
    rows, total = call
    if spec.is_leaf():
        return [rows.join([next(leaves) for leaves in parts], total, rows.outputs.get(path))], spec
    if rows.outputs.get(path) == LIST_AXIS:
        each = [[next(leaves) for _ in range(child.num_leaves)] for leaves in parts for child in spec.children()]
        count = rows.scale(spec.num_children, total)
        children = [child for _ in parts for child in spec.children()][:count]
        return [leaf for leaves in each[:count] for leaf in leaves], pytree.TreeSpec(spec.type, spec.context, children)
    found = [_join(child, parts, call, _child_path(path, key)) for key, child in _keyed(spec)]
    joined = pytree.TreeSpec(spec.type, spec.context, [child for _, child in found])
    return [leaf for leaves, _ in found for leaf in leaves], joined


def _compare(part: _Tree, whole: _Tree, call: _Call, path: str) -> Iterator[tuple[str, int] | None]:
    """Yield the path and the axis of each leaf that grows with the rows; yield None for any other difference."""
    (spec, leaves), (other, other_leaves), (rows, total) = part, whole, call
    if spec.is_leaf() and other.is_leaf():
        small, large = (getattr(next(values), "shape", ()) for values in (leaves, other_leaves))
        if small != large:
            axis = rows.find_axis(small, large, total) if len(small) == len(large) else None
            yield None if axis is None else (path, axis)
    elif spec.num_children == other.num_children:
        for (key, child), twin in zip(_keyed(spec), other.children(), strict=True):
            yield from _compare((child, leaves), (twin, other_leaves), call, _child_path(path, key))
    else:
        grows = spec.type in {list, tuple} and spec.num_children % rows.count == 0
        yield (path, LIST_AXIS) if grows and other.num_children == rows.scale(spec.num_children, total) else None
        for tree, values in (part, whole):
            deque(islice(values, tree.num_leaves), maxlen=0)


def _keyed(spec: pytree.TreeSpec) -> list[tuple[str, pytree.TreeSpec]]:
    children = spec.children()
    keys = _children_names(spec) or range(len(children))
    return [(str(key), child) for key, child in zip(keys, children, strict=True)]


def _child_path(path: str, key: str) -> str:
    return f"{path}.{key}".strip(".")


class DataclassFields:
    """An instance of a dataclass unknown to torch, as a container of its fields' values.

    Args:
        instance: an instance of any dataclass.
    """

    def __init__(self, instance: Any) -> None:
        self.cls = type(instance)
        self.values = {f.name: replace_dataclasses(getattr(instance, f.name)) for f in dataclasses.fields(instance)}

    @staticmethod
    def unflatten(values: Iterable[object], context: tuple[type, Sequence[str]]) -> object:
        """Make an instance of the dataclass from the values of its fields."""
        cls, names = context
        instance: object = object.__new__(cls)
        for name, value in zip(names, values, strict=True):
            object.__setattr__(instance, name, value)  # skip __init__, which ran when the model made the original
        return instance


pytree.register_pytree_node(
    DataclassFields, lambda f: (list(f.values.values()), (f.cls, tuple(f.values))), DataclassFields.unflatten
)


def replace_dataclasses(output: object) -> Any:
    """Replace dataclasses in an output by containers; torch.export refuses dataclasses that are not registered."""

    def replace_leaf(leaf: object) -> object:
        return DataclassFields(leaf) if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type) else leaf

    return pytree.tree_map(replace_leaf, output)


def name_outputs(spec: pytree.TreeSpec, inputs: Collection[str]) -> tuple[str, ...]:
    """Return a name for every leaf of an output: the model's (``logits``), and dotted keys for nested leaves.

    Args:
        spec: the output's structure.
        inputs: names of the program's inputs, which no output may take.
    """
    names = [".".join(keys) for keys in _leaf_keys(spec)]
    named = [name if name and not name[0].isdigit() else f"{OUTPUT_NAME}.{name}".removesuffix(".") for name in names]
    return tuple(f"{name}.{OUTPUT_NAME}" if name in inputs else name for name in named)


def _leaf_keys(spec: pytree.TreeSpec) -> Iterator[tuple[str, ...]]:
    if spec.is_leaf():
        yield ()
        return
    for key, child in _keyed(spec):
        yield from ((key, *keys) for keys in _leaf_keys(child))


def structure_to_json(structure: OutputStructure | None) -> object:
    """Convert a structure to JSON, with leaves by number."""
    if structure is None:
        return None
    constants = {str(leaf): value for leaf, value in structure.constants.items()}
    return {"spec": _spec_to_json(structure.spec), "constants": constants, "numbers": list(structure.numbers)}


def structure_from_json(stored: JsonMapping | None) -> OutputStructure | None:
    """Read a structure that ``structure_to_json`` wrote."""
    if stored is None:
        return None
    constants = {int(leaf): value for leaf, value in stored["constants"].items()}
    return OutputStructure(_spec_from_json(stored["spec"]), constants, tuple(map(int, stored["numbers"])))


def _spec_to_json(spec: pytree.TreeSpec) -> object:
    """Convert a spec to JSON: output classes by name, other containers as mappings and tuples."""
    if spec.is_leaf():
        return _LEAF
    children = [_spec_to_json(child) for child in spec.children()]
    if spec.type is list:
        return {"type": "list", "children": children}
    names = _children_names(spec)
    if names is None:
        return {"type": "tuple", "children": children}
    named = {"type": "mapping", "names": names, "children": children}
    if spec.type is _StoredOutputClass:
        path, fields = spec.context[0].path, list(spec.context[0].fields)
    else:
        path = f"{spec.type.__module__}.{spec.type.__qualname__}"
        fields = [field.name for field in dataclasses.fields(spec.type)] if dataclasses.is_dataclass(spec.type) else []
    return {**named, "class": path, "fields": fields} if _ALLOWED.fullmatch(path) else named


def _spec_from_json(stored: Any) -> pytree.TreeSpec:
    if stored == _LEAF:
        return pytree.treespec_leaf()
    children = [_spec_from_json(child) for child in stored["children"]]
    if stored["type"] != "mapping":
        return pytree.TreeSpec(list if stored["type"] == "list" else tuple, None, children)
    names, path = _check_names(stored["names"]), stored.get("class")
    if len(names) != len(children):
        raise ValueError(f"an output has {len(children)} parts and {len(names)} names")
    if path is None or _ALLOWED.fullmatch(path) is None:
        return pytree.TreeSpec(dict, names, children)
    cls = _StoredOutputClass(path, tuple(_check_names(stored["fields"])))
    return pytree.TreeSpec(_StoredOutputClass, (cls, names), children)


def _check_names(stored: object) -> list[str]:
    if not isinstance(stored, list) or not all(isinstance(name, str) for name in stored):
        raise ValueError("the names of an output must be a list of strings")
    return stored


class NamedOutput(OrderedDict[str, Any]):
    """An output that is indexed like transformers' and diffusers' outputs: by name, by number, as a tuple.

    It replaces the class itself only while the class's package is not imported (``_StoredOutputClass``).

    Args:
        fields: all names of the class; a name without a value is None.
    """

    def __init__(self, values: Mapping[str, object], fields: Collection[str]) -> None:
        super().__init__((name, value) for name, value in values.items() if value is not None)
        self._fields = frozenset({*fields, *values})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._fields:
            raise AttributeError(f"this output has no field '{name}', but {', '.join(self)}")
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values that are not None, in order."""
        return tuple(self.values())


@dataclass(frozen=True)
class _StoredOutputClass:
    """An output class in a stored structure, by its import path.

    Importing transformers takes longer than loading an artifact. So an output gets this class only if its package is
    imported already; a caller that has not imported the package cannot tell the difference.

    Attributes:
        path: the import path.
        fields: all fields of the class.
    """

    path: str
    fields: tuple[str, ...]

    def build(self, values: Sequence[object], names: Sequence[str]) -> object:
        """Build an output with these values."""
        cls = find_output_class(self.path) if sys.modules.get(self.path.partition(".")[0]) is not None else dict
        if cls is dict:
            return NamedOutput(dict(zip(names, values, strict=True)), self.fields)
        leaves: list[pytree.TreeSpec] = [pytree.treespec_leaf() for _ in names]
        return pytree.tree_unflatten(values, pytree.TreeSpec(cls, list(names), leaves))


pytree.register_pytree_node(
    _StoredOutputClass, lambda it: ([], (it, [])), lambda values, context: context[0].build([*values], context[1])
)


def find_output_class(path: object) -> type:
    """Return an output class of transformers or diffusers by its import path; dict for any other path.

    An artifact must not name code to run: only modules that define models are imported, and only a subclass of the
    library's own base is returned, found in the module's namespace.
    """
    allowed = _ALLOWED.fullmatch(path) if isinstance(path, str) else None
    if allowed is None:
        return dict
    try:
        base = _read_attribute(*_BASES[allowed["module"].partition(".")[0]].split(":"))
        found = _read_attribute(allowed["module"], allowed["name"])
    except ImportError:
        return dict
    return found if isinstance(found, type) and issubclass(found, base) else dict


def _read_attribute(module: str, name: str) -> Any:
    """Return an attribute of a module without calling the module's ``__getattr__``."""
    return vars(importlib.import_module(module)).get(name)


def _children_names(spec: pytree.TreeSpec) -> list[str] | None:
    """Return the keys of a container's children; None for a sequence."""
    context = spec.context[1] if spec.type in {DataclassFields, _StoredOutputClass} else spec.context
    named = isinstance(context, Sequence) and not isinstance(context, str) and len(context) == spec.num_children
    return [*context] if named and all(isinstance(name, str) for name in context) else None
