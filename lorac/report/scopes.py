"""The origin of a graph's values: the modules around each, its source line, its site."""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Container, Sequence

import torch
from torch import fx

from lorac.ir.graph import ops
from lorac.source_lines import format_location, is_user_code

_SOURCE = re.compile(r'File "([^"]+)", line (\d+)')
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"


class ModuleScopes:
    """The modules, repeated blocks and source lines of a graph's nodes.

    Attributes:
        containers: paths of the modules that have modules of their own.
        classes: path of a module -> name of its class.
        results: the nodes that are the result of a call of a leaf module, and bear its name.
    """

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        read = functools.cache(_read_stack)  # nodes of a module have equal stacks
        entries = {node: read(*(node.meta.get("nn_module_stack") or {}).items()) for node in nodes}
        self._stacks = {node: stack for node, (stack, _) in entries.items()}
        owners = {stack[-1] for stack in self._stacks.values() if stack}
        parents = {entry for stack in self._stacks.values() for entry in stack[:-1]}
        self.containers = {_strip_call(entry) for entry in parents | owners if entry in parents}
        self._blocks: dict[tuple[str, ...], tuple[str, ...]] = {}
        self.classes = {path: name for _, classes in dict.fromkeys(entries.values()) for path, name in classes}
        # The results of leaf modules' calls: of a site the last value that is read outside, of another module the only
        # value that it does not read itself.
        visible: dict[str, list[fx.Node]] = defaultdict(list)
        results: dict[str, list[fx.Node]] = defaultdict(list)
        owner_of = {node: stack[-1] if stack else "" for node, stack in self._stacks.items()}
        sites = {owner for node, owner in owner_of.items() if node_site(node)}
        for node, owner in owner_of.items():
            readers = set(map(owner_of.get, node.users))
            if is_size(node.meta.get("val")) or readers <= {owner}:
                continue
            visible[owner].append(node)
            if owner not in readers:
                results[owner].append(node)
        leaves = {owner for owner in owners if _strip_call(owner) not in self.containers}
        self.results = {found[-1] for owner, found in visible.items() if owner in leaves & sites}
        self.results |= {n for owner, (n, *more) in results.items() if owner in leaves - sites and not more}

    def locate(self, node: fx.Node) -> tuple[str, tuple[str, ...], str]:
        """Return the path of a node's module, all modules around it, and its source line."""
        stack = self._stacks[node]
        owner = _strip_call(stack[-1]) if stack else ""
        lines = [
            (path, line) for path, line in _SOURCE.findall(node.meta.get("stack_trace") or "") if is_user_code(path)
        ]
        return owner, stack, format_location(*lines[-1]) if lines else ""  # the innermost line

    def blocks_of(self, modules: tuple[str, ...]) -> tuple[str, ...]:
        """Return the repeated blocks among the modules around a node."""
        if modules not in self._blocks:
            self._blocks[modules] = repeated_blocks(modules, self.containers)
        return self._blocks[modules]


def repeated_blocks(modules: Sequence[str], containers: Container[str]) -> tuple[str, ...]:
    """Return the modules that are elements of a list: numbered, and with modules of their own."""
    return tuple(entry for entry in modules if _strip_call(entry)[-1:].isdigit() and _strip_call(entry) in containers)


def _read_stack(*entries: tuple[str, tuple[str, object]]) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Return the modules of torch's ``nn_module_stack``, outermost first: their paths, and (path, class) of each.

    The path of the n-th call of a module ends in ``@n``. torch stores the class or its full name.
    """
    modules = [(key, path, kind) for key, (path, kind) in entries if path != _NO_MODULE]
    stack = tuple(f"{path}@{key.rpartition('@')[2]}" if "@" in key else path for key, path, _ in modules if path)
    classes = ((path, str(getattr(kind, "__name__", kind)).rpartition(".")[2]) for _, path, kind in modules)
    return stack, tuple(classes)


def _strip_call(entry: str) -> str:
    return entry.partition("@")[0]


@functools.lru_cache(maxsize=4096)
def node_site(node: fx.Node) -> str | None:
    """Return the site that a node calls, or that it was lowered from."""
    called = ops.site_of(node) if node.target in ops.SITE_CALLS else None
    return called or node.meta.get("custom", {}).get("lorac")


def is_size(value: object) -> bool:
    """Return whether a value is a finite number, symbolic or not, or the result of a check."""
    return isinstance(value, _NUMBERS) and not (isinstance(value, float) and math.isinf(value))
