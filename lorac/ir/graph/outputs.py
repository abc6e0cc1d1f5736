"""The structure of the host's output, as JSON and back."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch.utils import _pytree as pytree

_LEAF = "*"


_TRUSTED = "transformers."
"""Output classes are restored from here alone: a module's import runs its code."""


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
    return {**named, "class": cls} if cls.startswith(_TRUSTED) else named


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
    """An output class of transformers by its import path; a dict where there is none, or it is something else.

    Only modules of transformers are imported, and only a subclass of its ModelOutput is taken, so an artefact cannot
    name code to run.
    """
    if name is None or not name.startswith(_TRUSTED) or not all(part.isidentifier() for part in name.split(".")):
        return dict
    module, _, attribute = name.rpartition(".")
    try:
        from transformers.utils.generic import ModelOutput

        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return dict
    return found if isinstance(found, type) and issubclass(found, ModelOutput) else dict


def _names_children(context: Any, count: int) -> bool:
    named = isinstance(context, Sequence) and not isinstance(context, str) and len(context) == count
    return named and all(isinstance(name, str) for name in context)
