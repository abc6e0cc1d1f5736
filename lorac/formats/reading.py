"""Reading untrusted files of adapters, for lorac's formats and for formats of other packages.

A format gets an ``AdapterFile``: a file or folder that is opened once for all formats that inspect it. ``read_fields``
checks every field of a configuration; ``group_by_layer``, ``check_pair`` and ``make_lora`` check the factors of LoRAs.
``check_adapter`` compares an adapter with its model. docs/own-format.md shows how to write a format with them.
"""

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lorac.adapters.fit import check_adapter, check_finite
from lorac.argument_types import JsonMapping
from lorac.errors import FormatError, LoracError
from lorac.formats._config_fields import (
    SEAL,
    Applied,
    Field,
    Irrelevant,
    Refused,
    TrainingOnly,
    read_fields,
    read_flag,
    read_int,
    read_names,
    read_number,
    read_size,
)
from lorac.formats._errors import corrupt_error, unsupported_error
from lorac.formats._lora_pairs import check_pair, check_read, group_by_layer, make_lora
from lorac.ir.slots.stacks import new_memory
from lorac.limits import claim_memory, pause_clock
from lorac.storage import pickled_tensors
from lorac.storage.open_file import OpenFile
from lorac.storage.paths import find_inner_path
from lorac.storage.strict_json import JsonObject, parse_object
from lorac.storage.tensor_file import (
    LONGEST_NAME,
    MAX_HEADER,
    TensorHeader,
    TensorPlace,
    check_header,
    describe_mistake,
    raw_bytes,
    read_header_text,
    read_into,
    read_tensors,
)
from lorac.storage.tensor_hash import agrees_with_hash

__all__ = [
    "AdapterFile",
    "Applied",
    "Field",
    "Irrelevant",
    "Refused",
    "TrainingOnly",
    "check_adapter",
    "check_pair",
    "check_read",
    "corrupt_error",
    "group_by_layer",
    "make_lora",
    "read_fields",
    "read_flag",
    "read_int",
    "read_names",
    "read_number",
    "read_size",
    "unsupported_error",
]

PICKLES = (".pt", ".pth", ".bin")
"""Suffixes of the files that torch.save writes."""
_PART = 8 << 20
"""Bytes of tensors that are read at a time, each such part by a thread."""
_TEXTS, _UNREAD = (".json", ".yaml", ".yml"), (".md",)
"""Suffixes of configurations, and of files that no format reads."""
_OWN_SEAL = re.compile(rb'"lorac_seal":"([0-9a-f]*)"')
"""The hash over a file's values."""
_OWN_NAME = re.compile(rb'"lorac":"{\\"version\\":\d+,\\"name\\":\\"([^"\\]*)\\"')
"""The name that an adapter had when lorac wrote it."""


class Outline:
    """The headers of files that were read without values.

    Attributes:
        files: file -> its tensors on the meta device, by name.
        sealed: texts, each with the names of the tensors that its seal covers; no seal was checked.
    """

    def __init__(self) -> None:
        self.files: dict[AdapterFile, dict[str, Tensor]] = {}
        self.sealed: list[tuple[str, frozenset[str]]] = []


class CommonHeader(NamedTuple):
    """The header of a safetensors file, split into the text that similar files share, the seal and the name.

    Attributes:
        text: the header without the seal and the adapter's name.
        seal: the hash over the values.
        name: the adapter's name.
    """

    text: bytes
    seal: str | None
    name: str | None


class AdapterFile:
    """A file or folder that may hold an adapter, opened once.

    Sizes are checked against the file and ``lorac.budget`` before tensors are allocated, no code of a pickle is
    executed, and no name can lead out of the folder. Properties, ``has``, ``begins`` and ``peek_names`` are for
    ``Format.recognises``: they never raise, and treat a damaged file as an empty one. The other methods, and ``header``
    and ``metadata``, raise FormatError.

    Args:
        path: the path of the file or folder.
        outline: receives the headers of safetensors files; their tensors are then on the meta device, and neither
            values nor seals are read. None reads everything.

    Attributes:
        path: the path, for messages.
    """

    def __init__(self, path: Path, outline: Outline | None = None) -> None:
        self.path, self._outline = path, outline
        self._inner: dict[str, AdapterFile] = {}

    def __str__(self) -> str:
        return str(self.path)

    @functools.cached_property
    def is_file(self) -> bool:
        """Whether the path is a file."""
        return self.path.is_file()

    @property
    def suffix(self) -> str:
        """The suffix of the file name, beginning with the last dot."""
        return self.path.suffix

    @property
    def adapter_name(self) -> str:
        """The adapter's default name: the name of the folder or repository, or the file's name without suffix."""
        if self.is_file:
            return self.path.stem
        repo, snapshots, name = ("", "", *self.path.resolve().parts)[-3:]
        return repo.rpartition("--")[2] if snapshots == "snapshots" and repo.startswith("models--") else name

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The names of the files in the folder."""
        try:
            with os.scandir(self.path) as entries:
                return frozenset(entry.name for entry in entries if entry.is_file())
        except OSError:
            return frozenset()

    def has(self, *names: str) -> bool:
        """Return whether the path is a folder that has files of all these names."""
        return self.names.issuperset(names)

    def inside(self, name: str) -> "AdapterFile":
        """Return the file or folder of a name in this folder; it is opened once."""
        if name not in self._inner:
            self._inner[name] = AdapterFile(self.path / name, self._outline)
        return self._inner[name]

    def find_inside(self, name: str) -> "AdapterFile | None":
        """Return the file or folder of an untrusted name; None if the name leads out of this folder."""
        return None if find_inner_path(self.path, name) is None else self.inside(name)

    def choose(self, *names: str) -> "AdapterFile":
        """Return the first of the named files that this folder has.

        Raises:
            FormatError: the folder has none of these files.
        """
        found = next(filter(self.has, names), None)
        if found is None:
            fault = f"'{self.path}' has neither {' nor '.join(names)}"
            raise corrupt_error(fault, next_step="copy or download the whole folder")
        return self.inside(found)

    def folder_with(self, *names: str) -> "AdapterFile":
        """Return the folder of this file if the file has one of these names; otherwise return this object."""
        if self.path.name not in names or not self.is_file:
            return self
        folder = AdapterFile(self.path.parent, self._outline)
        folder._inner[self.path.name] = self
        return folder

    @functools.cached_property
    def _opened(self) -> OpenFile:
        return OpenFile(self.path, follows_links=True)

    def open(self) -> BufferedReader:
        """Open the file for reading bytes; every call opens the same file, even if another replaced it at the path.

        Raises:
            OSError: the file is missing, or is not a file.
        """
        return self._opened.path.open("rb")

    def begins(self, magic: bytes, at: int = 0) -> bool:
        """Return whether the path is a file with these bytes at an offset."""
        with contextlib.suppress(OSError), self.open() as file:
            file.seek(at)
            return file.read(len(magic)) == magic
        return False

    def peek_names(self) -> frozenset[str]:
        """Return the names of tensors; for a pickle, all of its texts, which include the names."""
        return self._names_in_pickle if self.suffix in PICKLES else frozenset(self._peeked)

    def peek_metadata(self) -> dict[str, str]:
        """Return the metadata of a safetensors file; empty for a damaged one."""
        metadata = self._peeked.get("__metadata__")
        return {k: v for k, v in metadata.items() if isinstance(v, str)} if isinstance(metadata, dict) else {}

    @functools.cached_property
    def _names_in_pickle(self) -> frozenset[str]:
        with contextlib.suppress(OSError):
            return pickled_tensors.peek_names(self._opened.path)
        return frozenset()

    @functools.cached_property
    def _peeked(self) -> JsonObject:
        with contextlib.suppress(LoracError, OSError):
            return self._entries if self.is_file else {}
        return {}

    @functools.cached_property
    def _header_text(self) -> bytes:
        return read_header_text(self._opened, self.damaged)

    @functools.cached_property
    def _entries(self) -> JsonObject:
        return parse_object(self._header_text, lambda reason: self.damaged(f"its header {reason}"))

    @functools.cached_property
    def header(self) -> TensorHeader:
        """The checked header of a safetensors file.

        Raises:
            FormatError: the header is truncated, is not JSON, has an unknown dtype, shapes that do not fit the offsets,
                or overlapping tensors, or leaves bytes that belong to no tensor.
        """
        return check_header(self._opened, dict(self._entries), 8 + len(self._header_text), self.damaged)

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of a safetensors file; empty for a pickle. Raises as ``header``."""
        return {} if self.suffix in PICKLES else self.header.metadata

    def read_tensors(self) -> dict[str, Tensor]:
        """Return copies of the tensors of a safetensors file or of a torch.save pickle.

        Raises:
            FormatError: as ``header`` and ``read_pickle``; or a pickle contains anything except named dense tensors
                with storage in the file, or its tensors are larger than the file.
        """
        if self.suffix in PICKLES:
            return self.check_tensors(self.read_pickle())
        places = self.header.places
        if self._outline is not None:
            self._outline.files[self] = {name: place.outline() for name, place in places.items()}
            return dict(self._outline.files[self])
        try:
            with pause_clock():
                return _read_parts(self._opened.path, places)
        except EOFError as error:
            raise self.damaged(str(error)) from error

    def read_values(self) -> Tensor:
        """Copy all bytes after a safetensors header into memory.

        Raises:
            FormatError: the header is longer than the file, or the file was truncated in the meantime.
        """
        begin = 8 + len(self._header_text)
        block = new_memory(self._opened.size - begin)
        try:
            with pause_clock(), self._opened.path.open("rb", buffering=0) as file:
                read_into(raw_bytes(block), file, begin)
        except EOFError as error:
            raise self.damaged(str(error)) from error
        return block

    @functools.cached_property
    def common_header(self) -> CommonHeader:
        """The parsed text of a safetensors header; only its length is checked."""
        own = [pattern.search(self._header_text) for pattern in (_OWN_SEAL, _OWN_NAME)]
        text = self._header_text
        for found in sorted((one for one in own if one is not None), key=lambda found: -found.start()):
            text = text[: found.start(1)] + text[found.end(1) :]
        seal, name = (None if found is None else found[1].decode() for found in own)
        return CommonHeader(text, seal, name)

    def hash_headers(self) -> tuple[bytes, int]:
        """Return a hash of the files' content without values, and the total size of the values in bytes.

        The hash covers a safetensors file's header without the seal and the adapter's name, and the text of a
        configuration. For any other file it covers the path, which no other adapter has.

        Raises:
            FormatError: a file is shorter than its header says.
        """
        digest, size = hashlib.blake2b(digest_size=16), 0
        for file in [self.inside(name) for name in sorted(self.names)] if self.names else [self]:
            suffix = file.suffix
            if suffix in _UNREAD:
                continue
            if suffix == ".safetensors":
                header = file.common_header.text
                size += file._opened.size - len(file._header_text) - 8
            elif suffix in _TEXTS:
                header = file._opened.read()[:MAX_HEADER]
            else:
                header = str(file).encode()
                size += file._opened.size
            digest.update(f"{suffix} {len(header)}\n".encode())
            digest.update(header)
        return digest.digest(), size

    def read_pickle(self) -> object:
        """Load a pickle of tensors, numbers and texts with ``torch.load(weights_only=True)``, and return its content.

        Raises:
            FormatError: the pickle is damaged, or names a function or class that tensors do not need.
        """
        return pickled_tensors.load_pickle(self._opened.path, self.damaged)

    def check_tensors(self, content: object) -> dict[str, Tensor]:
        """Return the named tensors that a pickle holds.

        Args:
            content: the content of the pickle, or a part of it.

        Raises:
            FormatError: as ``read_tensors``.
        """
        if not isinstance(content, dict):
            raise self.damaged(f"it holds a {type(content).__name__}, not named tensors")
        first: dict[object, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        for name, value in content.items():
            dense = isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
            if not isinstance(name, str) or not dense:
                raise self.damaged(f"{str(name)[:LONGEST_NAME]!r} is not a dense tensor")
            if len(name) > LONGEST_NAME:
                raise self.damaged(f"the name of a tensor has {len(name)} characters, more than {LONGEST_NAME}")
            size = value.untyped_storage().nbytes()
            if value.numel() * value.itemsize > size:  # a stride of 0 repeats values
                raise self.damaged(f"'{name}' is {value.dtype} {tuple(value.shape)}, but has {size} bytes")
            view = (value.data_ptr(), value.storage_offset(), value.dtype, value.shape, value.stride())
            tensors[name] = first.setdefault(view, value.detach())
        distinct = sum(tensor.numel() * tensor.itemsize for tensor in first.values())
        claim_memory(distinct - self._opened.size, "its tensors are larger than the file")
        return tensors

    def read_json(self) -> JsonMapping:
        """Return a JSON object.

        Raises:
            FormatError: the file is larger than the memory limit, is not JSON, or has a name twice, a number that is
                not finite, an integer of more than 64 bits, or more than 100 levels.
        """
        claim_memory(self._opened.size, "its JSON")
        return parse_object(self._opened.read(), lambda reason: self.damaged(f"it {reason}"))

    def check_seal(self, text: str, tensors: Mapping[str, Tensor]) -> None:
        """Check a description and the tensors of this file against their seal, the hash that lorac wrote.

        Files of other tools have no seal, and pass.

        Raises:
            FormatError: the seal does not match.
            AdapterError: the seal does not match, and a value is NaN or infinite.
        """
        if not self.agrees_with_seal(self.metadata.get(SEAL), text, tensors):
            check_finite(tensors, f"'{self.path}'")
            raise mismatched_seal(self.path)

    def agrees_with_seal(self, seal: object, text: str, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether a seal is the hash of a description and its tensors; True if the file has no seal."""
        if self._outline is not None:
            self._outline.sealed.append((text, frozenset(tensors)))
            return True
        with pause_clock():
            return seal is None or agrees_with_hash(seal, text, tensors)

    def describe_mistake(self) -> str | None:
        """Return kind and next step for a file that users often give by mistake, separated by a colon; else None."""
        with contextlib.suppress(OSError), self.open() as opened:
            begin = opened.read(512)
            is_pickle = self.suffix in PICKLES and begin.startswith(b"PK")
            return None if is_pickle else describe_mistake(begin, self.suffix)
        return None

    def damaged(self, reason: str) -> FormatError:
        """Return the error for a damaged file, or for a file of another kind."""
        kind, _, step = (self.describe_mistake() or "").partition(": ")
        return corrupt_error(f"'{self.path}' is {kind or f'damaged: {reason}'}", next_step=step or None)


def _read_parts(path: Path, places: Mapping[str, TensorPlace]) -> dict[str, Tensor]:
    """Read tensors in several threads."""
    parts, room = list[dict[str, TensorPlace]](), 0
    for name, place in places.items():
        if place.size > room or not parts:
            parts.append({})
            room = _PART
        parts[-1][name] = place
        room -= place.size

    def read(part: Mapping[str, TensorPlace]) -> dict[str, Tensor]:
        with path.open("rb", buffering=0) as file:
            return read_tensors(file, part)

    with ThreadPoolExecutor() as readers:  # it starts one thread per part, and no thread without parts
        return {name: tensor for found in readers.map(read, parts) for name, tensor in found.items()}


def mismatched_seal(path: Path) -> FormatError:
    """Return the error for a description and tensors that do not match their seal."""
    return corrupt_error(
        f"the configuration and the tensors of '{path}' do not belong together: they, or one of them, were changed "
        "since lorac wrote both",
        next_step=f"copy or download the file again; if the change is intended, remove '{SEAL}' from the tensors' "
        "metadata",
    )
