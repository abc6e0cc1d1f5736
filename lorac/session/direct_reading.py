"""Reading adapters from disk straight into their slots.

Adapters of one layout (equal headers and configurations) go one way from the tensors of their files to the slots. It is
found once: the reader of the format and the reduction of the method run on tensors without values, and what of the
file each slot holds is kept, as long as it is no more than a copy, cast or scaled. The next file of the layout is read,
its values are checked as ever, and copied. An adapter of which this cannot be said takes the usual way.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
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
from lorac.formats._files import Outline, read_headers_only
from lorac.frontend.model_view import ModelView
from lorac.ir.graph.feeds import collect_slot_tensors, select_reached_plans
from lorac.ir.slots.choice import Active
from lorac.ir.slots.composition import compose_choice, fill_slots
from lorac.ir.slots.stacks import find_stacks
from lorac.ir.traces.tensor_origins import OriginRecorder, OriginStep, TensorOrigin, Unrecordable
from lorac.session.session import Session

_OF_NUMPY = {torch.float16, torch.float32, torch.float64}
_MOST_WAYS = 32
"""Ways that are kept, each of some 100 kB."""
_NUMBER = re.compile(r"\d+")


class _StridedPart(NamedTuple):
    """A tensor in a block of bytes; strides and offset are in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> "_StridedPart":
        """Return the part of its memory that a tensor is."""
        return cls(tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def take(self, block: Tensor) -> Tensor:
        """Return the tensor in such a block."""
        return block.view(self.dtype).as_strided(self.shape, self.strides, self.offset)


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
    outline = Outline()
    try:
        with OriginRecorder(outline.tensors) as recorder:
            slots = read_headers_only(outline, lambda: _outline_slots(session, path, view, contents))
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
    return DirectWay(layout, files, inside[0], [*_find_copies(found, layout, files)])


def _outline_slots(session: Session, path: Path, view: ModelView, contents: SlotContents) -> dict[str, Tensor]:
    """Return the contents of slots with places, which are right in shape only."""
    adapter = load_adapter(path, view)
    prepared = session.preparer.prepare(adapter)
    snapshot = compose_choice(session.plans, {adapter.name: prepared}, ((adapter.name, Active()),), session.base)
    inputs = {name: contents.inputs[name] for name in contents.tensors}
    plans = select_reached_plans(inputs, session.plans)
    return collect_slot_tensors(inputs, plans, fill_slots(plans, snapshot, session.base))


def _has_same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _find_copies(origins: Mapping[str, TensorOrigin], layout: SlotLayout, files: FileLayout) -> Iterator[_SlotCopy]:
    """Yield the copies that fill slots from their origins; what is at equal distances in all layers is one copy."""
    file, memory = (torch.empty(size, dtype=torch.uint8, device="meta") for size in (files.nbytes, layout.nbytes))
    sources, places = {name: place.take(file) for name, place in files.places.items()}, layout.view(memory)

    def order(name: str) -> tuple[str, int]:
        return _NUMBER.sub("", name), files.places[origins[name].name].begin

    for _, group in itertools.groupby(sorted(origins, key=order), lambda name: (order(name)[0], origins[name].steps)):
        names = [*group]
        steps = origins[names[0]].steps
        yield from _join_copies([origins[n].view(sources) for n in names], steps, [places[n] for n in names])


def _join_copies(
    sources: Sequence[Tensor], steps: tuple[OriginStep, ...], places: Sequence[Tensor]
) -> Iterator[_SlotCopy]:
    """Yield as few copies as there are runs of tensors at equal distances, where they read and where they write."""
    for into in find_stacks(places):
        parts = find_stacks(sources[: len(into)])
        sources = sources[len(into) :]
        pairs = zip(parts, into.split([len(part) for part in parts]), strict=True)
        yield from (_SlotCopy(_StridedPart.of(part), steps, _StridedPart.of(place)) for part, place in pairs)
