"""Tensors in one safetensors file: equal input gives equal bytes, and each tensor is mapped when it is read.

Format: https://github.com/huggingface/safetensors#format. The library's writer is not used, since it writes metadata
entries in random order, and copies all tensors before it writes the first.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorac.errors import ArtifactError, BaseNeeded, LoracError
from lorac.ir.sites.site import BaseReader, Site, SiteKind
from lorac.ir.slots.plans import SitePlan
from lorac.ir.slots.stacks import ALIGNMENT, new_memory
from lorac.limits import claim_memory
from lorac.storage.open_file import OpenFile
from lorac.storage.strict_json import Json, JsonObject, dump_json, parse_json, parse_object

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_ALIAS, _TRANSPOSED, _ELSEWHERE = "alias", "transposed", "elsewhere"
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000
"""Longest header in bytes, the library's own limit."""
LONGEST_NAME = 1000
"""Characters of a tensor's name, which patterns are matched against."""
_METADATA, _ENTRY_FIELDS = "__metadata__", 3
_LONGEST_REASON = 300
Refuse = Callable[[str], LoracError]
"""(fault) -> the error to raise."""


def file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors in the order in which a safetensors file has them."""
    return sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], outline: Mapping[str, Tensor] | None = None
) -> None:
    """Write a safetensors file, whose bytes depend on names, values and metadata alone.

    As in the library, larger element types come first, so that every tensor is aligned.

    Args:
        tensors: the tensors by name; each is read once, just before it is written.
        outline: tensors of the same names, shapes and dtypes on the meta device, for tensors that take long to make.
    """
    outline = tensors if outline is None else outline
    names = file_order(outline)
    header: JsonObject = {"__metadata__": {key: metadata[key] for key in sorted(metadata)}}
    end = 0
    for name in names:
        tensor, begin = outline[name], end
        end = begin + tensor.numel() * tensor.itemsize
        kind = DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = dump_json(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, ThreadPoolExecutor(1) as writer:
        written = writer.submit(file.write, len(text).to_bytes(8, "little") + text)
        for name in names:
            values = raw_bytes(tensors[name])  # computed while the previous tensor is written
            written.result()
            written = writer.submit(file.write, values)
        written.result()


class TensorPlace(NamedTuple):
    """The dtype and shape of a tensor in a file, and its first byte."""

    dtype: torch.dtype
    shape: Sequence[int]
    begin: int

    @property
    def size(self) -> int:
        """Length in bytes."""
        return _size_of(self.dtype, self.shape)

    def outline(self) -> Tensor:
        """Return a tensor of this dtype and shape on the meta device."""
        return torch.empty(tuple(self.shape), dtype=self.dtype, device="meta")


class TensorHeader(NamedTuple):
    """The header of a safetensors file: its metadata, and the place of every tensor."""

    metadata: dict[str, str]
    places: dict[str, TensorPlace]


def read_header_text(file: OpenFile, refuse: Refuse) -> bytes:
    """Return the text of a safetensors header, which begins at byte 8 of the file.

    Raises:
        LoracError: made by ``refuse``, if the header would be longer than the file.
    """
    with file.path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if file.size < 8 or length > min(file.size - 8, MAX_HEADER):
            opened.seek(0)
            kind = describe_mistake(opened.read(512), file.where.suffix)
            raise refuse(
                f"it is {kind}" if kind else f"it promises {length} bytes of header, the file has {file.size} bytes"
            )
        claim_memory(length, "its header")
        return opened.read(length)


def check_header(file: OpenFile, entries: JsonObject, first: int, refuse: Refuse) -> TensorHeader:
    """Check the entries of a header, and return it.

    The safetensors library finds all faults except duplicate names, which ``parse_object`` refuses, further fields of
    an entry, and long names.

    Args:
        entries: the parsed text of the header.
        first: the first byte after it.

    Raises:
        LoracError: made by ``refuse``, if dtypes, shapes and offsets do not fit each other or the file.
    """
    longest = max(entries, key=len, default="")
    if len(longest) > LONGEST_NAME:
        raise refuse(f"a tensor's name has {len(longest)} characters, more than {LONGEST_NAME}: '{longest[:50]}…'")
    try:
        with safe_open(file.path, framework="numpy"):
            metadata = entries.pop(_METADATA, None) or {}  # MLX writes null
    except SafetensorError as error:
        lacking = _find_end(entries) + first - file.size
        half = f"; it ends {lacking} bytes early, as an unfinished download does" if lacking > 0 else ""
        raise refuse(f"the safetensors library refuses it: {str(error)[:_LONGEST_REASON]}{half}") from error
    places = {}
    for name, entry in entries.items():
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None or len(entry) != _ENTRY_FIELDS:
            fault = "has fields besides dtype, shape and data_offsets" if dtype else f"is of dtype {entry['dtype']}"
            raise refuse(f"'{name}' {fault}, which lorac does not read")
        places[name] = TensorPlace(dtype, entry["shape"], first + entry["data_offsets"][0])
    return TensorHeader(metadata, places)


def _find_end(entries: JsonObject) -> int:
    """Return where the last tensor of a header ends; 0 if the header has no valid offsets."""
    with contextlib.suppress(TypeError, LookupError, ValueError):
        return max(int(entry["data_offsets"][1]) for name, entry in entries.items() if name != _METADATA)
    return 0


def read_tensors(file: FileIO | BufferedReader, places: Mapping[str, TensorPlace]) -> dict[str, Tensor]:
    """Return tensors by name, copied once from an open file. Each has its own storage, so it can be saved alone.

    The storages share one allocation, which takes half the time of separate allocations.

    Raises:
        EOFError: the file ends before a tensor does.
    """
    sizes = [place.size for place in places.values()]
    ends = [*itertools.accumulate([-(-size // ALIGNMENT) * ALIGNMENT for size in sizes], initial=0)]
    memory = new_memory(ends[-1]).numpy()
    tensors = {}
    for (name, place), size, offset in zip(places.items(), sizes, ends[:-1], strict=True):
        dtype, shape = place.dtype, tuple(place.shape)
        if not size:
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        read_into(memory.data[offset : offset + size], file, place.begin)
        flat = torch.frombuffer(memory, dtype=dtype, count=size // dtype.itemsize, offset=offset)
        tensors[name] = flat.view(shape)
    return tensors


def read_into(memory: memoryview, file: FileIO | BufferedReader, begin: int) -> None:
    """Fill some memory with the bytes of a file from ``begin`` on.

    Raises:
        EOFError: the file ends before the memory is full.
    """
    file.seek(begin)
    while memory:
        read = file.readinto(memory)
        if not read:
            raise EOFError(f"it ends {len(memory)} bytes before a tensor does")
        memory = memory[read:]


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's values as bytes in row-major order."""
    # A tensor of one element counts as contiguous with any strides.
    flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
    values: Any = flat.view(torch.uint8).numpy()
    return memoryview(values)


@dataclass(frozen=True)
class TensorLocation:
    """The place of a tensor's values in another file of the same program.

    Attributes:
        file: the file's name, with slashes.
        offset: the first byte.
        by_columns: whether a matrix is stored column by column.
        row: bytes from one row to the next in a part of a wider matrix; 0 for adjacent rows.
    """

    file: str
    offset: int
    by_columns: bool
    row: int = 0


@dataclass(frozen=True)
class _ExternalTensor:
    """A tensor in another file, in the layout of that file (``TensorLocation``)."""

    file: OpenFile
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    row: int

    @property
    def span(self) -> int:
        """Bytes from the tensor's first to its last, including other tensors' bytes between its rows."""
        if not self.row:
            return _size_of(self.dtype, self.shape)
        return (self.shape[0] - 1) * self.row + _size_of(self.dtype, self.shape[1:])

    @property
    def is_valid(self) -> bool:
        """Whether its numbers are non-negative integers, the file is long enough, and its rows do not overlap."""
        if not all(type(number) is int and number >= 0 for number in (self.offset, self.row, *self.shape)):
            return False
        separate = not self.row or (
            len(self.shape) == 2
            and self.row >= _size_of(self.dtype, self.shape[1:])
            and self.row % self.dtype.itemsize == 0
        )
        return separate and all(self.shape) and 0 < self.span <= self.file.size - self.offset

    def read(self) -> Tensor:
        """Map the tensor."""
        flat = torch.frombuffer(self.file.mapped_part(self.offset, self.span), dtype=self.dtype)
        if not self.row:
            return flat.reshape(self.shape)
        return flat.as_strided(self.shape, (self.row // self.dtype.itemsize, 1))


class TensorFile(Mapping[str, Tensor]):
    """Tensors of an open file by name; each is mapped when it is read, and none is kept in memory.

    The metadata lists tensors with several names, which are stored once, matrices that are stored column by column, and
    tensors that are stored in another file of the program.

    Args:
        files: the files of the program by name, in which some tensors may be stored.

    Attributes:
        notes: the other entries of its metadata.

    Raises:
        ArtifactError: its metadata names an impossible place.
    """

    def __init__(self, file: OpenFile, files: Mapping[str, OpenFile] | None = None) -> None:
        self.file, self.files = file, files or {}
        known = (_ALIAS, _TRANSPOSED, _ELSEWHERE)
        text = read_header_text(file, self._damaged)
        entries = parse_object(text, lambda reason: self._damaged(f"its header {reason}"))
        metadata, self._places = check_header(file, entries, 8 + len(text), self._damaged)
        self.notes: Mapping[str, str] = {name: text for name, text in metadata.items() if name not in known}
        own = {key: parse_json(metadata[key], self._damaged) for key in known if key in metadata}
        self._alias: dict[str, str] = own.get(_ALIAS, {})
        self._transposed = frozenset(own.get(_TRANSPOSED, ()))
        external = own.get(_ELSEWHERE, {})
        self._external = {name: self._locate(name, entry) for name, entry in external.items()}
        self._names = frozenset({*self._places, *self._alias, *self._external})

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        stored = self._alias.get(name, name)
        found = self._external[stored].read() if stored in self._external else self._map(self._places[stored])
        return found.t() if stored in self._transposed else found

    def _locate(self, name: str, entry: Json) -> _ExternalTensor:
        with contextlib.suppress(LookupError, TypeError, AttributeError):
            file, offset, row = self.files[entry["file"]], entry["offset"], entry.get("row", 0)
            found = _ExternalTensor(file, offset, DTYPES[entry["dtype"]], tuple(entry["shape"]), row)
            if found.is_valid:
                return found
        raise self._damaged(f"its metadata puts '{name}' outside of the program's files")

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def outline(self) -> dict[str, Tensor]:
        """Return the tensors that are stored in the file itself, on the meta device: their shapes and dtypes."""
        return {name: place.outline() for name, place in self._places.items()}

    def load_all(self) -> dict[str, Tensor]:
        """Copy all tensors into memory; a tensor with several names is one tensor again."""
        copies = {name: self[name].clone() for name in self if name not in self._alias}
        return {name: copies[self._alias.get(name, name)] for name in self}

    def _map(self, place: TensorPlace) -> Tensor:
        """Map one tensor; all tensors of a file share one mapping."""
        if not place.size:
            return torch.empty(tuple(place.shape), dtype=place.dtype)
        flat = torch.frombuffer(self.file.mapped(), dtype=torch.uint8, offset=place.begin, count=place.size)
        return flat.view(place.dtype).view(tuple(place.shape))

    def _damaged(self, reason: str) -> ArtifactError:
        return ArtifactError(f"'{self.file.where}' is damaged: {reason}", next_step="copy the whole folder again")

    @staticmethod
    def write(
        path: Path,
        tensors: Mapping[str, Tensor],
        transposed: Collection[str] = (),
        notes: Mapping[str, str] | None = None,
        elsewhere: Mapping[str, TensorLocation] | None = None,
    ) -> None:
        """Write a file; tensors that share memory are written once.

        Args:
            transposed: matrices to write column by column, for a reader that needs contiguous transposes.
            notes: further entries of the metadata.
            elsewhere: name -> place of a tensor that another file of the program stores.
        """
        first: dict[object, str] = {}
        alias = {}
        for name, tensor in tensors.items():
            view = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            known = first.setdefault(view if tensor.numel() else name, name)
            if known != name:
                alias[name] = known
        places = {name: place for name, place in (elsewhere or {}).items() if name not in alias}
        external_columns = {name for name, place in places.items() if place.by_columns}
        columns = sorted(({*transposed} - alias.keys() - places.keys()) | external_columns)
        laid_out = {n: t.detach().t() if n in columns else t.detach() for n, t in tensors.items() if n not in alias}
        written = {name: tensor for name, tensor in laid_out.items() if name not in places}
        external = {}
        for name, place in sorted(places.items()):
            dtype, shape = DTYPE_NAMES[laid_out[name].dtype], list(laid_out[name].shape)
            external[name] = {"file": place.file, "offset": place.offset, "dtype": dtype, "shape": shape}
            external[name] |= {"row": place.row} if place.row else {}
        entries = {_ALIAS: dict(sorted(alias.items())), _TRANSPOSED: columns, _ELSEWHERE: external}
        write_safetensors(path, written, {**(notes or {}), **{key: dump_json(value) for key, value in entries.items()}})


def _size_of(dtype: torch.dtype, shape: Collection[int]) -> int:
    return dtype.itemsize * math.prod(shape)


def make_file_base_reader(file: Mapping[str, Tensor]) -> BaseReader:
    """Make a reader of base weights in a file."""

    def tensor(name: str) -> Tensor:
        if name not in file:
            raise BaseNeeded(
                f"the base weight '{name}' is not kept, since no adapter could act there",
                next_step="compile from the model again, with the site in reserve= or an adapter on it",
            )
        return file[name]

    def weight(site: Site) -> Tensor:
        assert site.weight is not None
        return site.present(tensor(site.weight))

    return BaseReader(weight, lambda site: tensor(site.bias) if site.bias else None)


def find_transposed_weights(plans: Iterable[SitePlan]) -> list[str]:
    """Return the names of stored weights whose slots take the transpose; a file should store them by columns."""
    linear = [plan.site for plan in plans if plan.bound and plan.site.kind is SiteKind.LINEAR]
    return [str(site.weight) for site in linear if not site.transposed]


_PAGE = "a web page, not the file that it shows: on the hub, an address with /resolve/ gives the file"
_ARCHIVE = "an archive: unpack it, and give the folder or file in it"
_KINDS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: `git lfs pull` fetches it",
    b"<!doctype": _PAGE,
    b"<html": _PAGE,
    b"pk\3\4": _ARCHIVE,
    b"7z\xbc\xaf": _ARCHIVE,
    b"rar!": _ARCHIVE,
    b"\x1f\x8b": _ARCHIVE,
}
_UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".incomplete", ".tmp")
"""Suffixes of unfinished downloads, which browsers and libraries remove at the end."""


def describe_mistake(begin: bytes, suffix: str) -> str | None:
    """Describe a file that was given by mistake, with the next step; None for other files.

    Args:
        begin: the first 512 bytes of the file, or all of a shorter one.
        suffix: the suffix of its name.
    """
    if suffix in _UNFINISHED:
        return "an unfinished download: get it once more"
    text = begin.lstrip().lower()
    if begin[257:262] == b"ustar":
        return _ARCHIVE
    return next((kind for magic, kind in _KINDS.items() if text.startswith(magic)), None)
