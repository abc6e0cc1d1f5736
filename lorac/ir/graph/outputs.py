"""The structure of the host's output: the names of its tensors, and the structure as JSON and back."""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch.utils import _pytree as pytree

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

OUTPUT = "output"
"""What an output is called that the model gives no name: a lone tensor; those of a tuple add their place."""


def output_names(spec: pytree.TreeSpec, inputs: Collection[str]) -> tuple[str, ...]:
    """A name for every tensor of the host's output: its own where it has one (``logits``), parts joined by dots.

    Args:
        spec: the output's structure.
        inputs: names of the program's inputs, which an output of the same name must not take.
    """
    names = [".".join(keys) for keys in _places(spec)]
    named = [name if name and not name[0].isdigit() else f"{OUTPUT}.{name}".removesuffix(".") for name in names]
    return tuple(f"{name}.{OUTPUT}" if name in inputs else name for name in named)


def _places(spec: pytree.TreeSpec) -> Iterator[tuple[str, ...]]:
    """The keys and indices that lead to each leaf."""
    if spec.is_leaf():
        yield ()
        return
    children = spec.children()
    keys = spec.context if _names_children(spec.context, len(children)) else range(len(children))
    for key, child in zip(keys, children, strict=True):
        yield from ((str(key), *place) for place in _places(child))


def spec_to_json(spec: Any) -> Any:
    """A pytree spec. Output classes are kept by name, other containers as plain mappings and tuples."""
    if spec is None:
        return None
    if spec.is_leaf():
        return _LEAF
    children = [spec_to_json(child) for child in spec.children()]
    if issubclass(spec.type, list):
        return {"type": "list", "children": children}
    if not _names_children(spec.context, len(children)):
        return {"type": "tuple", "children": children}
    named = {"type": "mapping", "names": list(spec.context), "children": children}
    cls = f"{spec.type.__module__}.{spec.type.__qualname__}"
    return {**named, "class": cls} if _ALLOWED.fullmatch(cls) else named


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
    return pytree.TreeSpec(output_class(stored.get("class")), list(stored["names"]), children)


def output_class(name: str | None) -> type:
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


def _names_children(context: Any, count: int) -> bool:
    named = isinstance(context, Sequence) and not isinstance(context, str) and len(context) == count
    return named and all(isinstance(name, str) for name in context)
