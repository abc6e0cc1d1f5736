"""The parts of a compiled program as JSON and back: plans, choices, and the structure of the host's output."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lorac.errors import Unavailable
from lorac.ir.choice import Active, Choice
from lorac.ir.sites import Site
from lorac.ir.slots import BranchSlot, SitePlan

_FLAGS = ("rank", "c", "d", "t", "g", "h", "bound", "bias")
_LEAF = "*"
_TRUSTED = "transformers."
"""Output classes are restored from here alone: a module's import runs its code."""


# ── Plans ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def plan_to_json(plan: SitePlan) -> dict[str, Any]:
    """A plan without its site, which the skeleton knows."""
    branches = [
        {
            "key": b.key,
            "params": {name: list(shape) for name, shape in b.params.items()},
            "emits": list(b.emits),
            "reads": list(b.reads),
        }
        for b in plan.branches
    ]
    return {**{name: getattr(plan, name) for name in _FLAGS}, "branches": branches, "reasons": list(plan.reasons)}


def plan_from_json(site: Site, stored: Mapping[str, Any]) -> SitePlan:
    """The plan of a site. Its branches' formulas are in the program; here they only hold the place."""
    formula = _emitted(site.path)
    branches = tuple(
        BranchSlot(
            key=b["key"],
            formula=formula,
            params={name: tuple(shape) for name, shape in b["params"].items()},
            emits=tuple(b["emits"]),
            reads=tuple(b["reads"]),
        )
        for b in stored["branches"]
    )
    return SitePlan(
        site, **{name: stored[name] for name in _FLAGS}, branches=branches, reasons=tuple(stored["reasons"])
    )


def _emitted(path: str) -> Callable[..., torch.Tensor]:
    def formula(*_: Any) -> torch.Tensor:
        raise Unavailable(f"the branch at '{path}' is part of a stored program and has no formula any more")

    return formula


# ── Choices ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def choice_to_json(choice: Choice) -> dict[str, Any]:
    """Name -> strength and rank."""
    return {name: {"strength": how.strength, "rank": how.rank} for name, how in choice}


def choice_from_json(stored: Mapping[str, Any]) -> dict[str, Active] | None:
    """What ``swap`` takes."""
    return {name: Active(how["strength"], how["rank"]) for name, how in stored.items()} or None


# ── The output's structure ───────────────────────────────────────────────────────────────────────────────────────────
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
