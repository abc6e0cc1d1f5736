"""The origin of a graph's values: the modules around each, its source line, its site."""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence

import torch
from torch import fx

from lorac.ir.graph import ops
from lorac.source_lines import format_location, is_user_code

_SOURCE = re.compile(r'File "([^"]+)", line (\d+)')
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"


class ModuleScopes:
    """The modules, repeated blocks and source lines of a graph's nodes.

    Attributes:
        containers: paths of the modules that have modules of their own.
        classes: path of a module -> name of its class.
        results: the nodes that are the result of a call of a leaf module, and bear its name.
    """

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self._stacks = {node: _module_stack(node) for node in nodes}
        owners = {stack[-1] for stack in self._stacks.values() if stack}
        parents = {entry for stack in self._stacks.values() for entry in stack[:-1]}
        self.containers = {_strip_call(entry) for entry in parents | owners if entry in parents}
        self._blocks: dict[tuple[str, ...], tuple[str, ...]] = {}
        self.classes = {path: name for node in nodes for path, name in _module_classes(node)}
        self.results = self._find_results(owners)

    def locate(self, node: fx.Node) -> tuple[str, tuple[str, ...], str]:
        """Return the path of a node's module, all modules around it, and its source line."""
        stack = self._stacks[node]
        owner = _strip_call(stack[-1]) if stack else ""
        return owner, stack, _source_line(node.meta.get("stack_trace") or "")

    def blocks_of(self, modules: tuple[str, ...]) -> tuple[str, ...]:
        """Return the repeated blocks among the modules around a node."""
        if modules not in self._blocks:
            self._blocks[modules] = repeated_blocks(modules, self.containers)
        return self._blocks[modules]

    def _find_results(self, owners: Iterable[str]) -> set[fx.Node]:
        """Find the results of leaf modules' calls.

        The result of a site is the last node that other modules read, since parts of a shared x·A come before it. The
        result of another module is its only such node.
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
    """Return the modules that are elements of a list: numbered, and with modules of their own."""
    return tuple(entry for entry in modules if _strip_call(entry)[-1:].isdigit() and _strip_call(entry) in containers)


def _module_stack(node: fx.Node) -> tuple[str, ...]:
    """Return the module paths around a node, outermost first; the n-th call of a module ends in ``@n``."""
    found = []
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        if path and path != _NO_MODULE:
            call = key.rpartition("@")[2] if "@" in key else ""
            found.append(f"{path}@{call}" if call else path)
    return tuple(found)


def _module_classes(node: fx.Node) -> Iterator[tuple[str, str]]:
    """Yield (path, class) of each module around a node; torch stores the class or its full name."""
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        if path != _NO_MODULE:
            yield path, str(getattr(kind, "__name__", kind)).rpartition(".")[2]


def _strip_call(entry: str) -> str:
    return entry.partition("@")[0]


@functools.lru_cache(maxsize=4096)
def _source_line(trace: str) -> str:
    """Return ``file:line`` of the innermost line of user code."""
    found = [(path, line) for path, line in _SOURCE.findall(trace) if is_user_code(path)]
    return format_location(*found[-1]) if found else ""


def node_site(node: fx.Node) -> str | None:
    """Return the site that a node calls, or that it was lowered from."""
    called = ops.site_of(node) if node.target in ops.SITE_CALLS else None
    return called or node.meta.get("custom", {}).get("lorac")


def is_size(value: object) -> bool:
    """Return whether a value is a finite number, symbolic or not, or the result of a check."""
    is_number = isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float)
    return is_number and not (isinstance(value, float) and math.isinf(value))
