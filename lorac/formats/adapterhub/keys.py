"""The keys of a file: which tensor of which site each is, by one table for reading and writing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lorac.errors import FormatError, nearest_name
from lorac.formats.adapterhub.layouts import INVERTIBLE, LEGACY, LORAS, PLACED, SHARED

Tensor = torch.Tensor
Found = Mapping[str, Mapping[str, Tensor]]
"""Site path -> name -> tensor."""


@dataclass(frozen=True)
class KeyPattern:
    """Tensors that lie side by side in a file: ``<prefix><before>.<part>.<adapter>.<leaf>``.

    Attributes:
        part: ``PLACED``, ``LORAS``, ``SHARED`` or ``INVERTIBLE``.
        before: what a file calls the module; empty for what the whole model has.
        leaves: leaf -> name of the tensor at a site; of two leaves of one name either may be there.
        paths: the sites whose tensors they are: of what is shared all that share it.
    """

    part: str
    before: str
    leaves: Mapping[str, str]
    paths: tuple[str, ...]


def modern(key: str) -> str:
    """A key as versions of today call it."""
    for old, new in LEGACY.items():
        key = key.replace(old, new)
    return key


def placed(
    adapter: str, called: str, places: Sequence[KeyPattern], keys: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Site path -> name -> tensor; every key is used, and every tensor there.

    Args:
        adapter: the adapter's name, for messages.
        called: the name that the keys have of it.
        places: all that the configuration promises.
        keys: the file's tensors, by ``modern`` keys.

    Raises:
        FormatError: one is not.
    """
    table: dict[tuple[str, str], list[KeyPattern]] = {}
    for place in places:
        table.setdefault((place.part, place.before), []).append(place)
    found: dict[str, dict[str, Tensor]] = {path: {} for place in places for path in place.paths}
    for key, tensor in keys.items():
        before, part, leaf = _split(key, called)
        here = [place for end in _ends(before) for place in table.get((part, end), ()) if leaf in place.leaves]
        if not here:
            raise FormatError(
                f"the file of adapter '{adapter}' holds '{key}', for which its configuration or the model has no place",
                nearest=nearest_name(before, [place.before for place in places if place.before]),
                next_step="load the model that it was trained on",
                code="unused_tensors",
            )
        for path in here[0].paths:
            _put(found[path], here[0].leaves[leaf], tensor, key)
    _complete(adapter, places, found)
    return found


def keyed(name: str, prefix: str, places: Iterable[KeyPattern], tensors: Found) -> dict[str, Tensor]:
    """Key -> tensor: the inverse of ``placed``.

    Args:
        name: the adapter's.
        prefix: of the base model, in a class with a head.
        places: as ``placed`` takes them.
        tensors: by site path and name.
    """
    written: dict[str, Tensor] = {}
    for place in places:
        stem = f"{prefix}{place.before}.{place.part}.{name}" if place.before else f"{prefix}{place.part}.{name}"
        at = tensors[place.paths[0]]
        written |= {f"{stem}.{leaf}": at[own] for leaf, own in place.leaves.items()}
    return written


def _split(key: str, called: str) -> tuple[str, str, str]:
    """(what stands before, which part, the leaf) of a key; the adapter's name stands after the part."""
    for part in (INVERTIBLE, SHARED, LORAS, PLACED):
        before, found, leaf = f".{key}".rpartition(f".{part}.{called}.")
        if found:
            return before.removeprefix("."), part, leaf
    return key, "", ""


def _ends(before: str) -> Iterator[str]:
    """What stands before a part, and its ends, down to none: a class with a head has a prefix."""
    parts = before.split(".")
    yield from (".".join(parts[i:]) for i in range(len(parts)))
    yield ""


def _put(at: dict[str, Tensor], name: str, tensor: Tensor, key: str) -> None:
    if name in at and not torch.equal(at[name], tensor):
        raise FormatError(f"'{key}' is one tensor under two names, and the two differ", code="corrupt_file")
    at[name] = tensor


def _complete(adapter: str, places: Iterable[KeyPattern], found: Found) -> None:
    lacking = [
        (place, f"'{name}' at '{path}'")
        for place in places
        for path in place.paths
        for name in sorted({*place.leaves.values()} - found[path].keys())
    ]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise FormatError(
            f"the file of adapter '{adapter}' lacks {lacking[0][1]}{more}, which its configuration promises",
            next_step="save it from a class with a head: of a bare model the library leaves out what sites share"
            if any(place.part == SHARED for place, _ in lacking)
            else "it is incomplete, or was made for a smaller model",
            code="corrupt_file",
        )
