"""The keys of a file: one table of patterns, for reading and writing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorac.errors import list_some, nearest_name, unused_error
from lorac.formats._errors import corrupt_error
from lorac.formats.adapterhub.layouts import ADAPTERS, INVERTIBLE, LEGACY, LORAS, SHARED

TensorsBySite = Mapping[str, Mapping[str, Tensor]]
"""Site path -> name -> tensor."""


@dataclass(frozen=True)
class KeyPattern:
    """Keys that differ only in their leaf: ``<prefix><module>.<group>.<adapter>.<leaf>``.

    Attributes:
        group: ``ADAPTERS``, ``LORAS``, ``SHARED`` or ``INVERTIBLE``.
        module: the name of the module in a file; empty for the tensors of the whole model.
        leaves: leaf -> name of the tensor at a site; where two leaves have one name, a file has one of the two.
        paths: the sites that have these tensors; for shared tensors, all sites that share them.
    """

    group: str
    module: str
    leaves: Mapping[str, str]
    paths: tuple[str, ...]


def modernise_key(key: str) -> str:
    """Convert a key of early versions to the key of current versions."""
    for old, new in LEGACY.items():
        key = key.replace(old, new)
    return key


def assign_tensors(
    adapter: str, name: str, patterns: Sequence[KeyPattern], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Return site path -> name -> tensor; every key must be used, and no tensor may be missing.

    Args:
        name: the adapter's name in the keys.
        patterns: the keys that the configuration requires.
        tensors: the tensors of the file, by key after ``modernise_key``.

    Raises:
        FormatError: a key is not used, or a tensor is missing.
    """
    table: dict[tuple[str, str], list[KeyPattern]] = {}
    for pattern in patterns:
        table.setdefault((pattern.group, pattern.module), []).append(pattern)
    assigned: dict[str, dict[str, Tensor]] = {path: {} for pattern in patterns for path in pattern.paths}
    for key, tensor in tensors.items():
        module, group, leaf = key, "", ""
        for kind in (INVERTIBLE, SHARED, LORAS, ADAPTERS):  # the name of the adapter follows the group
            before, found, behind = f".{key}".rpartition(f".{kind}.{name}.")
            if found:
                module, group, leaf = before.removeprefix("."), kind, behind
                break
        parts = module.split(".")
        ends = [".".join(parts[first:]) for first in range(len(parts) + 1)]  # longest suffix first, empty one last
        matching = next((p for end in ends for p in table.get((group, end), ()) if leaf in p.leaves), None)
        if matching is None:
            raise unused_error(
                f"the file of adapter '{adapter}' holds '{key}', which its configuration or the model lacks",
                nearest=nearest_name(module, [pattern.module for pattern in patterns if pattern.module]),
                next_step="load the model that it was trained on",
            )
        for path in matching.paths:
            stored, parameter = assigned[path], matching.leaves[leaf]
            if parameter in stored and not torch.equal(stored[parameter], tensor):
                raise corrupt_error(f"'{key}' is one tensor under two names, and the two differ")
            stored[parameter] = tensor
    missing = [
        (pattern, f"'{name}' at '{path}'")
        for pattern in patterns
        for path in pattern.paths
        for name in sorted({*pattern.leaves.values()} - assigned[path].keys())
    ]
    if missing:
        named = list_some([what for _, what in missing], 1, quote="")
        raise corrupt_error(
            f"the file of adapter '{adapter}' lacks {named}, which its configuration promises",
            next_step="save it from a class with a head: from a bare model the library leaves out the shared tensors"
            if any(pattern.group == SHARED for pattern, _ in missing)
            else "it is incomplete, or was made for a smaller model",
        )
    return assigned


def name_tensors(name: str, prefix: str, patterns: Iterable[KeyPattern], tensors: TensorsBySite) -> dict[str, Tensor]:
    """Return key -> tensor; the inverse of ``assign_tensors``.

    Args:
        prefix: the prefix of the base model in a class with a head.
    """
    named: dict[str, Tensor] = {}
    for pattern in patterns:
        module = f"{pattern.module}." if pattern.module else ""
        stem = f"{prefix}{module}{pattern.group}.{name}"
        parameters = tensors[pattern.paths[0]]
        named |= {f"{stem}.{leaf}": parameters[parameter] for leaf, parameter in pattern.leaves.items()}
    return named
