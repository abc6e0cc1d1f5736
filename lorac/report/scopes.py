"""Where the values of a graph come from: the modules around each, the source line, the site."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from lorac.ir.graph import ops
from lorac.source_lines import format_location, is_user_code

_SOURCE = re.compile(r'File "([^"]+)", line (\d+)')
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"


class ModuleScopes:
    """Where nodes come from: their module, the repeated blocks around it, their source line."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self._stacks = {node: _module_stack(node) for node in nodes}
        owners = {stack[-1] for stack in self._stacks.values() if stack}
        parents = {entry for stack in self._stacks.values() for entry in stack[:-1]}
        self.containers = {_strip_call(entry) for entry in parents | owners if entry in parents}
        self._sources: dict[str, str] = {}
        self._blocks: dict[tuple[str, ...], tuple[str, ...]] = {}
        self.classes = {path: name for node in nodes for path, name in _module_classes(node)}
        self.exits = self._find_exits(owners)

    def of(self, node: fx.Node) -> tuple[str, tuple[str, ...], str]:
        """Module path, modules around, source line."""
        stack = self._stacks[node]
        owner = _strip_call(stack[-1]) if stack else ""
        trace = node.meta.get("stack_trace") or ""
        if trace not in self._sources:
            self._sources[trace] = _source_line(trace)
        return owner, stack, self._sources[trace]

    def blocks_of(self, modules: tuple[str, ...]) -> tuple[str, ...]:
        """The repeated blocks among the modules around a node."""
        if modules not in self._blocks:
            self._blocks[modules] = repeated_blocks(modules, self.containers)
        return self._blocks[modules]

    def _find_exits(self, owners: Iterable[str]) -> set[fx.Node]:
        """The node that is the result of a call of a leaf module: it bears the module's name.

        Of a site it is the last that others read (parts of a shared x·A come before it), else the only result.
        """
        visible: dict[str, list[fx.Node]] = defaultdict(list)
        results: dict[str, list[fx.Node]] = defaultdict(list)
        sites = {self._owner(node) for node in self._stacks if node_site(node)}
        for node in self._stacks:
            owner = self._owner(node) or ""
            readers = {self._owner(user) for user in node.users}
            if is_size(node.meta.get("val")) or readers <= {owner}:
                continue
            visible[owner].append(node)
            if owner not in readers:
                results[owner].append(node)
        leaves = {owner for owner in owners if _strip_call(owner) not in self.containers}
        found = {nodes[-1] for owner, nodes in visible.items() if owner in leaves & sites}
        return found | {nodes[0] for owner, nodes in results.items() if owner in leaves - sites and len(nodes) == 1}

    def _owner(self, node: fx.Node) -> str | None:
        stack = self._stacks.get(node)
        return None if stack is None else stack[-1] if stack else ""


def repeated_blocks(modules: Sequence[str], containers: Container[str]) -> tuple[str, ...]:
    """Those of the modules that are elements of a list: numbered, and with modules of their own."""
    return tuple(entry for entry in modules if _strip_call(entry)[-1:].isdigit() and _strip_call(entry) in containers)


def _module_stack(node: fx.Node) -> tuple[str, ...]:
    """Module paths around a node, outermost first; the n-th call of a module ends in ``@n``."""
    found = []
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        if path and path != _NO_MODULE:
            call = key.rpartition("@")[2] if "@" in key else ""
            found.append(f"{path}@{call}" if call else path)
    return tuple(found)


def _module_classes(node: fx.Node) -> Iterator[tuple[str, str]]:
    """(path, class) of each module around a node; torch notes the class itself or its full name."""
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        if path == _NO_MODULE:
            continue
        yield path, str(getattr(kind, "__name__", kind)).rpartition(".")[2]


def _strip_call(entry: str) -> str:
    return entry.partition("@")[0]


def _source_line(trace: str) -> str:
    """``file:line`` of the innermost line that is the model's own, or its library's."""
    found = [(path, line) for path, line in _SOURCE.findall(trace) if is_user_code(path)]
    return format_location(*found[-1]) if found else ""


def called_site(node: fx.Node) -> str | None:
    """The site that a node is a call of; None where it is none."""
    return ops.site_of(node) if node.target in ops.SITE_CALLS else None


def node_site(node: fx.Node) -> str | None:
    """The site that a node is a call of, or was lowered from; None where it is none."""
    return called_site(node) or node.meta.get("custom", {}).get("lorac")


def is_size(value: Any) -> bool:
    """A plain number, symbolic or not, or a check's result."""
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float) and not _is_infinite(value)


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and math.isinf(value)
