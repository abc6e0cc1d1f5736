"""Reading adapters from disk straight into their slots.

Adapters of one layout (equal headers and configurations) go one way from the tensors of their files to the slots. It is
found once: the reader of the format and the reduction of the method run on tensors without values, and what of the
file each slot holds is kept, as long as it is no more than a copy, cast or scaled. The next file of the layout is read,
its values are checked as ever, and copied. An adapter of which this cannot be said takes the usual way.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorac.adapters.stored import SlotContents, SlotLayout
from lorac.errors import LoracError
from lorac.formats import load_adapter
from lorac.formats._file_layout import FileLayout
from lorac.formats._files import read_headers_only
from lorac.frontend.model_view import ModelView
from lorac.ir.graph.feeds import collect_slot_tensors
from lorac.ir.slots.choice import Active
from lorac.ir.slots.composition import compose_choice, fill_slots
from lorac.ir.tensor_origins import OriginRecorder, OriginStep, Unrecordable
from lorac.session.session import Session

_OF_NUMPY = {torch.float16, torch.float32, torch.float64}
_MOST_WAYS = 32
"""Ways that are kept, each of some 100 kB."""
_LOOK_AHEAD = 32
"""Copies among which the one is sought that follows another at the distance of the rest, as in the next layer."""


class _StridedPart(NamedTuple):
    """A tensor in a block of bytes; strides and offset are in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor, begin: int = 0) -> _StridedPart:
        """Return the part that a view of a tensor is, which begins at a byte."""
        offset = int(tensor.storage_offset()) + begin // tensor.itemsize
        return cls(tensor.dtype, tuple(tensor.shape), tensor.stride(), offset)

    def take(self, block: Tensor) -> Tensor:
        """Return the tensor in such a block, whose size is a multiple of that of the dtype."""
        return block.view(self.dtype).as_strided(self.shape, self.strides, self.offset)

    def repeat(self, count: int, step: int) -> _StridedPart:
        """Return several such tensors at equal distances as one."""
        return self._replace(shape=(count, *self.shape), strides=(step, *self.strides))


class _SlotCopy(NamedTuple):
    """A copy of a part of the file to a part of the slots."""

    source: _StridedPart
    steps: tuple[OriginStep, ...]
    into: _StridedPart

    def run(self, file: Tensor, memory: Tensor) -> None:
        values, into = self.source.take(file), self.into.take(memory)
        for step in self.steps:
            values = step.apply(values)
        if values.dtype == into.dtype and into.dtype in _OF_NUMPY:
            np.copyto(into.numpy(), values.numpy())  # in half the time of torch, where axes are exchanged
        else:
            into.copy_(values)


@dataclass(frozen=True, eq=False)
class DirectWay:
    """The way of adapters of one layout into their slots.

    Attributes:
        layout: the order of the slots.
        inside: the path of the file of tensors in the adapter's folder.
    """

    layout: SlotLayout
    files: FileLayout
    inside: Path
    copies: Sequence[_SlotCopy]

    def read(self, path: Path, memory: Tensor) -> bool:
        """Fill memory with the contents of an adapter's slots; return whether its file is of the layout.

        Raises:
            OSError, FormatError, AdapterError: as ``FileLayout.read``.
        """
        file = self.files.read(path / self.inside)
        if file is None:
            return False
        for copy in self.copies:
            copy.run(file, memory)
        return True

    def leads_to(self, path: Path, contents: SlotContents) -> bool:
        """Return whether it brings an adapter's very values into all slots that differ from the idle ones."""
        memory = torch.empty(self.layout.nbytes, dtype=torch.uint8)
        if not self.read(path, memory):
            return False
        read = {**contents.idle, **self.layout.view(memory)}
        return all(_has_same_bits(tensor, read[name]) for name, tensor in contents.tensors.items())


class DirectWays:
    """The ways of adapters of different layouts.

    Args:
        session: the model that they are for.

    Attributes:
        known: headers of adapters -> their way; None where there is none.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._read_once: set[bytes] = set()
        self.known: dict[bytes, DirectWay | None] = {}

    def learn(self, headers: bytes, path: Path, view: ModelView, contents: SlotContents) -> None:
        """Look for the direct way of adapters of some headers, when a second one took the long way.

        Args:
            headers: stand for all that the files of an adapter say besides values.
            path: the adapter's file or folder.
            view: the model with its sites.
            contents: what it brought into the slots.
        """
        if headers in self.known:
            return
        if headers not in self._read_once:
            self._read_once.add(headers)
            return
        way = _find_way(self._session, path, view, contents)
        try:
            self.known[headers] = way if way is not None and way.leads_to(path, contents) else None
        except LoracError:
            return  # the file is another now
        for oldest in [known for known, way in self.known.items() if way is not None][:-_MOST_WAYS]:
            del self.known[oldest]


def _find_way(session: Session, path: Path, view: ModelView, contents: SlotContents) -> DirectWay | None:
    """Return the way of adapters like one into their slots, if there is a direct one."""
    try:
        with read_headers_only() as outline, OriginRecorder(outline.tensors) as recorder:
            slots = _outline_slots(session, path, view, contents)
            origins = {name: recorder.find(tensor) for name, tensor in slots.items()}
        files, inside = FileLayout.of(outline), [file.relative_to(path) for file in outline.files]
    except (LoracError, Unrecordable, LookupError, RuntimeError, ValueError):  # as values or base weights are needed
        return None
    if files is None or not all(tensor.is_floating_point() for tensor in outline.tensors.values()):
        return None  # whole numbers may be positions, which are to be checked
    if any(slots[name].is_meta for name, origin in origins.items() if origin is None):
        return None
    found = {name: origin for name, origin in origins.items() if origin is not None}
    layout = SlotLayout.of(contents.snapshot, {name: contents.tensors[name] for name in found})
    places = layout.view(torch.empty(layout.nbytes, dtype=torch.uint8, device="meta"))
    copies = [
        _SlotCopy(_StridedPart.of(origin.part, files.places[origin.name].begin), origin.steps, _StridedPart.of(place))
        for origin, place in ((found[name], places[name]) for name in found)
    ]
    return DirectWay(layout, files, inside[0], _join_copies(copies))


def _outline_slots(session: Session, path: Path, view: ModelView, contents: SlotContents) -> dict[str, Tensor]:
    """Return the contents of slots with places, which are right in shape only."""
    adapter = load_adapter(path, view)
    prepared = session.preparer.prepare(adapter)
    snapshot = compose_choice(session.plans, {adapter.name: prepared}, ((adapter.name, Active()),), session.base)
    inputs = {name: contents.inputs[name] for name in contents.tensors}
    sites = {path for slot in inputs.values() for path in (slot.site, *slot.members)}
    plans = {path: plan for path, plan in session.plans.items() if path in sites}
    return collect_slot_tensors(inputs, plans, fill_slots(plans, snapshot, session.base))


def _has_same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _join_copies(copies: Sequence[_SlotCopy]) -> list[_SlotCopy]:
    """Return fewer copies that do the same: those of equal shapes at equal distances are one."""
    alike: dict[object, dict[tuple[int, int], _SlotCopy]] = {}
    for copy in copies:
        key = (copy.source._replace(offset=0), copy.into._replace(offset=0), copy.steps)
        alike.setdefault(key, {})[copy.source.offset, copy.into.offset] = copy
    return [joined for group in alike.values() for joined in _join_alike(group)]


def _join_alike(copies: dict[tuple[int, int], _SlotCopy]) -> list[_SlotCopy]:
    """Join copies of equal shapes, by where they read and write."""
    joined, copies = list[_SlotCopy](), dict(sorted(copies.items()))
    while copies:
        (first, copy), *following = itertools.islice(copies.items(), _LOOK_AHEAD)
        runs = [_find_run(copies, first, second) for second, _ in following]
        run = max(runs, key=len, default=[first])
        source, into = (0, 0) if len(run) == 1 else (run[1][0] - first[0], run[1][1] - first[1])
        joined.append(_SlotCopy(copy.source.repeat(len(run), source), copy.steps, copy.into.repeat(len(run), into)))
        copies = {place: copy for place, copy in copies.items() if place not in run}
    return joined


def _find_run(
    copies: Mapping[tuple[int, int], _SlotCopy], first: tuple[int, int], second: tuple[int, int]
) -> list[tuple[int, int]]:
    """Return the places of as many copies as follow two of them at their distance."""
    run, step = [first], (second[0] - first[0], second[1] - first[1])
    while step[1] > 0 and (place := (run[-1][0] + step[0], run[-1][1] + step[1])) in copies:
        run.append(place)
    return run
