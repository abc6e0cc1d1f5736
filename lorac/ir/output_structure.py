"""The structure of the host's output: the names of its tensors, and the structure as JSON and back."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from torch.utils import _pytree as pytree

from lorac.ir.row_layout import LIST_AXIS, RowLayout

_LEAF = "*"
_BASES = {"transformers": "transformers.utils.generic:ModelOutput", "diffusers": "diffusers.utils.outputs:BaseOutput"}
"""Package -> the base of its output classes."""
_ALLOWED = re.compile(
    r"(?P<module>transformers\.modeling_outputs|transformers\.models\.\w+\.modeling_\w+"
    r"|diffusers\.utils\.outputs|diffusers\.models(?:\.\w+)+)\.(?P<name>[A-Za-z]\w*)",
    re.ASCII,
)
"""Import paths of output classes that an artefact may name: those of modules that define models, and nothing else of
these packages, since a module's import runs its code."""

OUTPUT_NAME = "output"
"""What an output is called that the model gives no name: a lone tensor; those of a tuple add their place."""


@dataclass(frozen=True, eq=False)
class OutputStructure:
    """What a host answers with, around the tensors that its program answers.

    Attributes:
        spec: pytree of the whole output.
        constants: leaf -> what stands there in every answer: None, a number, a text.
        numbers: leaves that are whole numbers for the host and tensors for the program: sizes of its inputs.
    """

    spec: Any
    constants: Mapping[int, Any] = field(default_factory=dict)
    numbers: tuple[int, ...] = ()

    @property
    def tensors(self) -> int:
        """How many tensors the program answers."""
        return int(self.spec.num_leaves) - len(self.constants)

    def filled(self, tensors: Sequence[Any]) -> Any:
        """The host's output of the program's."""
        return pytree.tree_unflatten(self._leaves(tensors), self.spec)

    def having(self, values: Mapping[str, Any]) -> OutputStructure:
        """The same with other constants, by the names that they have in the output (``output_names``)."""
        names = name_outputs(self.spec, ())
        return replace(self, constants={i: values.get(names[i], value) for i, value in self.constants.items()})

    def joined(self, parts: Sequence[Sequence[Any]], rows: RowLayout, total: int) -> Any:
        """The host's output for a call of so many rows, of the program's tensors for each of its parts."""
        leaves, spec = _joined(self.spec, [iter(self._leaves(tensors)) for tensors in parts], (rows, total), "")
        return pytree.tree_unflatten(leaves, spec)

    def growing(self, tensors: Sequence[Any], other: Any, rows: RowLayout, total: int) -> RowLayout | None:
        """The rows of a program, with those of its outputs.

        Args:
            tensors: what it answers to as many rows as it takes.
            other: what its host answers to so many.
            rows: without outputs.
            total: how many.

        Returns:
            None where the two differ in anything else.
        """
        leaves, spec = pytree.tree_flatten(other)
        found = list(_growing((self.spec, iter(self._leaves(tensors))), (spec, iter(leaves)), (rows, total), ""))
        return None if None in found else replace(rows, outputs=dict(filter(None, found)))

    def _leaves(self, tensors: Sequence[Any]) -> list[Any]:
        given = iter(tensors)
        places = range(self.spec.num_leaves)
        leaves = [self.constants[i] if i in self.constants else next(given) for i in places]
        return [int(leaf) if i in self.numbers else leaf for i, leaf in enumerate(leaves)]


_Call = tuple[RowLayout, int]
"""How a program takes rows, and how many a call has."""


def _joined(spec: pytree.TreeSpec, parts: Sequence[Iterator[Any]], call: _Call, path: str) -> tuple[list[Any], Any]:
    """The leaves of several outputs as those of one, and its structure."""
    rows, total = call
    if spec.is_leaf():
        return [rows.whole([next(leaves) for leaves in parts], total, rows.outputs.get(path))], spec
    if rows.outputs.get(path) == LIST_AXIS:
        each = [[next(leaves) for _ in range(child.num_leaves)] for leaves in parts for child in spec.children()]
        kept = rows.share(spec.num_children, total)
        children = [child for _ in parts for child in spec.children()][:kept]
        return [leaf for leaves in each[:kept] for leaf in leaves], pytree.TreeSpec(spec.type, spec.context, children)
    found = [_joined(child, parts, call, _below(path, key)) for key, child in _keyed(spec)]
    made = pytree.TreeSpec(spec.type, spec.context, [child for _, child in found])
    return [leaf for leaves, _ in found for leaf in leaves], made


_Tree = tuple[pytree.TreeSpec, Iterator[Any]]
"""An output's structure, and its leaves."""


def _growing(own: _Tree, other: _Tree, call: _Call, path: str) -> Iterator[tuple[str, int] | None]:
    """The paths of what grows with the rows, and their axes; None for other differences."""
    (spec, leaves), (wanted, theirs), (rows, total) = own, other, call
    if spec.is_leaf() and wanted.is_leaf():
        yield from _axis(next(leaves), next(theirs), call, path)
    elif spec.num_children == wanted.num_children:
        for (key, child), there in zip(_keyed(spec), wanted.children(), strict=True):
            yield from _growing((child, leaves), (there, theirs), call, _below(path, key))
    else:
        grows = spec.type in {list, tuple} and spec.num_children % rows.count == 0
        yield (path, LIST_AXIS) if grows and wanted.num_children == rows.share(spec.num_children, total) else None
        for tree, held in (own, other):
            deque(islice(held, tree.num_leaves), maxlen=0)


def _axis(own: Any, other: Any, call: _Call, path: str) -> Iterator[tuple[str, int] | None]:
    (rows, total), size, whole = call, getattr(own, "shape", ()), getattr(other, "shape", ())
    if size != whole:
        axis = rows.axis_of(size, whole, total) if len(size) == len(whole) else None
        yield None if axis is None else (path, axis)


def _keyed(spec: pytree.TreeSpec) -> list[tuple[str, pytree.TreeSpec]]:
    children = spec.children()
    return [
        (str(key), child) for key, child in zip(_children_names(spec) or range(len(children)), children, strict=True)
    ]


def _below(path: str, key: str) -> str:
    return f"{path}.{key}".strip(".")


class DataclassFields:
    """An instance of a dataclass that torch knows nothing of, as a container of what its fields hold.

    Args:
        instance: of any dataclass.
    """

    def __init__(self, instance: Any) -> None:
        self.cls = type(instance)
        self.values = {f.name: replace_dataclasses(getattr(instance, f.name)) for f in dataclasses.fields(instance)}


def _unflattened(values: Any, context: Any) -> Any:
    cls, names = context
    instance = object.__new__(cls)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(instance, name, value)  # not by its __init__: what that does was done before
    return instance


pytree.register_pytree_node(
    DataclassFields, lambda f: (list(f.values.values()), (f.cls, tuple(f.values))), _unflattened
)


def replace_dataclasses(output: Any) -> Any:
    """A host's output with containers in the place of dataclasses; torch.export takes those it knows, and no others."""
    return pytree.tree_map(lambda leaf: DataclassFields(leaf) if _is_instance(leaf) else leaf, output)


def _is_instance(leaf: Any) -> bool:
    return dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)


def name_outputs(spec: pytree.TreeSpec, inputs: Collection[str]) -> tuple[str, ...]:
    """A name for every tensor of the host's output: its own where it has one (``logits``), parts joined by dots.

    Args:
        spec: the output's structure.
        inputs: names of the program's inputs, which an output of the same name must not take.
    """
    names = [".".join(keys) for keys in _places(spec)]
    named = [name if name and not name[0].isdigit() else f"{OUTPUT_NAME}.{name}".removesuffix(".") for name in names]
    return tuple(f"{name}.{OUTPUT_NAME}" if name in inputs else name for name in named)


def _places(spec: pytree.TreeSpec) -> Iterator[tuple[str, ...]]:
    """The keys and indices that lead to each leaf."""
    if spec.is_leaf():
        yield ()
        return
    for key, child in _keyed(spec):
        yield from ((key, *place) for place in _places(child))


def structure_to_json(structure: OutputStructure | None) -> Any:
    """A structure as JSON, its leaves by number."""
    if structure is None:
        return None
    constants = {str(leaf): value for leaf, value in structure.constants.items()}
    return {"spec": spec_to_json(structure.spec), "constants": constants, "numbers": list(structure.numbers)}


def structure_from_json(stored: Any) -> OutputStructure | None:
    """The inverse of ``structure_to_json``."""
    if stored is None:
        return None
    constants = {int(leaf): value for leaf, value in stored["constants"].items()}
    return OutputStructure(spec_from_json(stored["spec"]), constants, tuple(map(int, stored["numbers"])))


def spec_to_json(spec: Any) -> Any:
    """A pytree spec. Output classes are kept by name, other containers as plain mappings and tuples."""
    if spec is None:
        return None
    if spec.is_leaf():
        return _LEAF
    children = [spec_to_json(child) for child in spec.children()]
    if spec.type is list:
        return {"type": "list", "children": children}
    names = _children_names(spec)
    if names is None:
        return {"type": "tuple", "children": children}
    named = {"type": "mapping", "names": names, "children": children}
    cls, fields = _class_of(spec)
    return {**named, "class": cls, "fields": fields} if _ALLOWED.fullmatch(cls) else named


def _class_of(spec: pytree.TreeSpec) -> tuple[str, list[str]]:
    """The import path of a container's class, and all the fields that it has."""
    if spec.type is _StoredOutputClass:
        return spec.context[0].path, list(spec.context[0].fields)
    fields = dataclasses.fields(spec.type) if dataclasses.is_dataclass(spec.type) else ()
    return f"{spec.type.__module__}.{spec.type.__qualname__}", [field.name for field in fields]


def spec_from_json(stored: Any) -> Any:
    """The pytree spec of ``spec_to_json``'s answer."""
    if stored is None:
        return None
    if stored == _LEAF:
        return pytree.treespec_leaf()
    children = [spec_from_json(child) for child in stored["children"]]
    if stored["type"] == "list":
        return pytree.TreeSpec(list, None, children)
    if stored["type"] == "tuple":
        return pytree.TreeSpec(tuple, None, children)
    names, path = _texts(stored["names"]), stored.get("class")
    if len(names) != len(children):
        raise ValueError(f"an output has {len(children)} parts and {len(names)} names")
    if path is None or _ALLOWED.fullmatch(path) is None:
        return pytree.TreeSpec(dict, names, children)
    return pytree.TreeSpec(
        _StoredOutputClass, (_StoredOutputClass(path, tuple(_texts(stored["fields"]))), names), children
    )


def _texts(stored: Any) -> list[str]:
    """A list of names."""
    if not isinstance(stored, list) or not all(isinstance(name, str) for name in stored):
        raise ValueError("an output's names are no names")
    return stored


# ── Output classes of others ─────────────────────────────────────────────────────────────────────────────────────────
class NamedOutput(OrderedDict[str, Any]):
    """Answers as an output class of transformers or diffusers does: by name, by place, as a mapping and as a tuple.

    Whoever holds such a class has imported its package, and is then given the class itself (``_StoredOutputClass``).

    Args:
        values: what there is, by name.
        fields: all names that the class has; those that are not there are None.
    """

    def __init__(self, values: Mapping[str, Any], fields: Collection[str]) -> None:
        super().__init__((name, value) for name, value in values.items() if value is not None)
        self._fields = frozenset({*fields, *values})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._fields:
            raise AttributeError(f"this output has no '{name}': it has {', '.join(self)}")
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """What there is, in order."""
        return tuple(self.values())


@dataclass(frozen=True)
class _StoredOutputClass:
    """An output class by its import path, in a stored structure; the class is looked up when there is an output.

    To import transformers takes longer than to load an artefact. So its class is made only where it is imported
    already, and whoever has not imported it cannot tell the difference.

    Attributes:
        path: the import path.
        fields: all fields of the class.
    """

    path: str
    fields: tuple[str, ...]

    def made(self, values: Sequence[Any], names: Sequence[str]) -> Any:
        """An output with these values."""
        cls = find_output_class(self.path) if sys.modules.get(self.path.partition(".")[0]) is not None else dict
        if cls is dict:
            return NamedOutput(dict(zip(names, values, strict=True)), self.fields)
        leaves: list[pytree.TreeSpec] = [pytree.treespec_leaf() for _ in names]
        return pytree.tree_unflatten(values, pytree.TreeSpec(cls, list(names), leaves))


pytree.register_pytree_node(
    _StoredOutputClass, lambda it: ([], (it, [])), lambda values, context: context[0].made([*values], context[1])
)


def find_output_class(name: str | None) -> type:
    """An output class of transformers or diffusers by its import path; a dict where there is none, or it is another.

    Only modules that define models are imported, and of what they define only a subclass of their library's own base
    is taken, looked up where the module itself put it: an artefact cannot name code to run.
    """
    allowed = _ALLOWED.fullmatch(name or "")
    if allowed is None:
        return dict
    module, attribute = allowed["module"], allowed["name"]
    try:
        base = _defined(*_BASES[module.partition(".")[0]].split(":"))
        found = _defined(module, attribute)
    except ImportError:
        return dict
    return found if isinstance(found, type) and issubclass(found, base) else dict


def _defined(module: str, name: str) -> Any:
    """What a module has of a name, without asking its own ``__getattr__``."""
    return vars(importlib.import_module(module)).get(name)


def _children_names(spec: pytree.TreeSpec) -> list[str] | None:
    """What a container calls its children; None where it counts them."""
    context = spec.context[1] if spec.type in {DataclassFields, _StoredOutputClass} else spec.context
    named = isinstance(context, Sequence) and not isinstance(context, str) and len(context) == spec.num_children
    return [*context] if named and all(isinstance(name, str) for name in context) else None
