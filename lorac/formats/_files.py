"""Reading files without trusting them, and writing them so that equal input gives equal bytes.

safetensors: https://github.com/huggingface/safetensors#format. Its header is checked here, so that the error names the
fault, and each tensor is read once, into memory of its own. ``lorac.storage.tensor_file`` writes such files.
"""

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lorac.adapters.fit import check_finite, find_infinite_sums
from lorac.argument_types import JsonMapping
from lorac.context_values import run_with_value
from lorac.errors import FormatError, LoracError, nearest_name
from lorac.formats._errors import corrupt_error, unsupported_error
from lorac.limits import claim_memory, pause_clock
from lorac.storage import pickled_tensors
from lorac.storage.strict_json import dump_json, parse_object, read_json_text
from lorac.storage.tensor_file import DTYPES, TensorPlace, read_tensors, write_safetensors
from lorac.storage.tensor_hash import agrees_with_hash, hash_contents

MAX_HEADER = 100_000_000
"""Longest header in bytes, the library's own limit."""
_PART = 8 << 20
"""Bytes of tensors that are read at a time, each such part by a thread."""
_ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}
LONGEST_NAME = 1000
"""Characters of a tensor's name, which patterns are matched against."""
SEAL = "lorac_seal"
"""Metadata entry that holds the hash over a description and its tensors."""
EXPERTS = "lorac_experts"
"""Metadata entry that holds the seals of an X-LoRA's experts by name."""
BASE_HASH = "lorac_base"
"""Metadata entry that holds the hash over the base weights."""
PICKLES = (".pt", ".pth", ".bin")
"""Suffixes of the files that torch.save writes."""
HUB_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
"""Files of tensors in AdapterHub's folders, whose configuration has the name of PEFT's."""


T = TypeVar("T")


@dataclass(eq=False)
class Outline:
    """Safetensors files of which only the headers were read.

    Attributes:
        files: where the tensors of each lie, by name.
        tensors: the tensors of all on the meta device, by name.
        sealed: descriptions, each with the names of the tensors that its seal covers; none was checked.
    """

    files: dict[Path, Mapping[str, TensorPlace]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sealed: list[tuple[str, frozenset[str]]] = field(default_factory=list)


_OUTLINE: ContextVar[Outline | None] = ContextVar("outline", default=None)


def containing_folder(path: Path, *files: str) -> Path:
    """Return the folder of a path that is one of the named files; any other path unchanged."""
    return path.parent if path.name in files and path.is_file() else path


def read_headers_only(outline: Outline, work: Callable[[], T]) -> T:
    """Read safetensors files without their values: tensors are on the meta device, and seals unchecked.

    Args:
        outline: is filled with what is read.
        work: reads the files.
    """
    return run_with_value(_OUTLINE, outline, work)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, whose header is checked against the size of the file and itself.

    Raises:
        FormatError: the header is truncated, not JSON, has an unknown dtype, shapes that do not fit the offsets,
            overlapping tensors, or leaves bytes that belong to none.
    """
    return _read_header(path)[0]


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorPlace]]:
    """Return the metadata, and the dtype, shape and first byte of every tensor."""
    known, size = _read_raw_header(path)
    metadata = known.get("__metadata__")
    metadata = {} if metadata is None else metadata  # MLX writes null
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _corrupt(path, "its metadata is not a mapping of text to text")
    first = path.stat().st_size - size
    places = {name: _parse_place(path, name, known[name], first) for name in known if name != "__metadata__"}
    _check_places(path, places, first, size)
    return metadata, places


def peek_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; empty where it is something else, or damaged."""
    metadata = _peek_header(path).get("__metadata__")
    if not isinstance(metadata, dict):
        return {}
    return {key: value for key, value in metadata.items() if isinstance(value, str)}


def peek_names(path: Path) -> frozenset[str]:
    """Return the names of the tensors of a safetensors file; empty where it is something else, or damaged."""
    return frozenset(_peek_header(path))


def peek_texts(path: Path) -> frozenset[str]:
    """Return the texts in a pickle, names of tensors among them; empty where it is something else, or damaged."""
    return _peek_pickle(path, _identify(path))


def _peek_header(path: Path) -> JsonMapping:
    return _peek_known_header(path, _identify(path))


def _identify(path: Path) -> tuple[int, ...]:
    """Return what changes when a file does, so that the formats do not each read it anew to recognise it."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=4)
def _peek_known_header(path: Path, identity: tuple[int, ...]) -> JsonMapping:
    try:
        return _read_raw_header(path)[0]
    except (LoracError, OSError):
        return {}


@functools.lru_cache(maxsize=4)
def _peek_pickle(path: Path, identity: tuple[int, ...]) -> frozenset[str]:
    return pickled_tensors.peek_names(path)


def read_weights(folder: Path, config: str, weights: str, pickled: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and metadata of a folder: of its safetensors file, or else of its pickle.

    Args:
        config: the name of its configuration, for the error.
        weights: the name of the safetensors file.
        pickled: the name of the pickle.

    Raises:
        FormatError: both are missing, or as ``read_safetensors`` and ``read_pickle``.
    """
    if (folder / weights).is_file():
        return read_safetensors(folder / weights)
    if (folder / pickled).is_file():
        return read_pickle(folder / pickled), {}
    raise corrupt_error(
        f"'{folder}' has {config}, but neither {weights} nor {pickled}", next_step="copy or download the whole folder"
    )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, in memory of their own, and its metadata.

    Raises:
        FormatError: as ``read_metadata``.
        AdapterError: a tensor holds NaN or infinity.
    """
    metadata, places = _read_header(path)
    if (outline := _OUTLINE.get()) is not None:
        tensors = {n: torch.empty(shape, dtype=dtype, device="meta") for n, (dtype, shape, _) in places.items()}
        outline.files[path] = places
        outline.tensors |= tensors
        return tensors, metadata
    try:
        return _read_tensors(path, places), metadata
    except EOFError as error:
        raise _corrupt(path, str(error)) from error


def _read_tensors(path: Path, places: Mapping[str, TensorPlace]) -> dict[str, Tensor]:
    """Read tensors and look at their values, in several threads."""
    with pause_clock(), ThreadPoolExecutor() as readers:
        parts = list(readers.map(functools.partial(_read_part, path), _split_parts(places)))
    for part, are_finite in parts:
        if not are_finite:
            check_finite(part, f"'{path}'")
    return {name: tensor for part, _ in parts for name, tensor in part.items()}


def _read_part(path: Path, places: Mapping[str, TensorPlace]) -> tuple[dict[str, Tensor], bool]:
    """Return tensors, and whether the sums of their values show that all are finite."""
    with path.open("rb", buffering=0) as file:
        block = read_tensors(file, places)
    return block.tensors, not find_infinite_sums(dict(enumerate(block.runs)))


def _split_parts(places: Mapping[str, TensorPlace]) -> list[dict[str, TensorPlace]]:
    parts, room = list[dict[str, TensorPlace]](), 0
    for name, place in places.items():
        size = place.size
        if size > room or not parts:
            parts.append({})
            room = _PART
        parts[-1][name] = place
        room -= size
    return parts


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.bin` file, through `torch.load(weights_only=True)`.

    Raises:
        FormatError: it is damaged, or holds anything but named dense tensors that lie in the file themselves; or its
            tensors are larger than the file.
        AdapterError: a tensor holds NaN or infinity.
    """
    return check_named_tensors(path, load_pickle(path))


def load_pickle(path: Path) -> object:
    """Return the content of a pickle of tensors, numbers and texts, which ``check_named_tensors`` has not seen.

    Raises:
        FormatError: it is damaged, or names what no tensors need.
    """
    return pickled_tensors.load_pickle(path, lambda reason: _corrupt(path, reason))


def check_named_tensors(path: Path, loaded: object) -> dict[str, Tensor]:
    """Return named tensors from a pickle, checked as ``read_pickle`` says."""
    if not isinstance(loaded, dict):
        raise _corrupt(path, f"it holds a {type(loaded).__name__}, not named tensors")
    for name, value in loaded.items():
        dense = isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
        if not isinstance(name, str) or not dense:
            raise _corrupt(path, f"{str(name)[:LONGEST_NAME]!r} is not a dense tensor")
        _check_name(path, name)
    tensors = _share_views({name: value.detach() for name, value in loaded.items()})
    _check_storages(path, tensors)
    check_finite(tensors, f"'{path}'")
    return tensors


def _share_views(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, with those that are the same view of one memory as one object."""
    first: dict[object, Tensor] = {}
    views = {n: (t.data_ptr(), t.storage_offset(), t.dtype, t.shape, t.stride()) for n, t in tensors.items()}
    return {name: first.setdefault(views[name], tensor) for name, tensor in tensors.items()}


def _check_storages(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse values that do not lie in the file: repeated by a stride, or together much larger than it."""
    for name, tensor in tensors.items():
        size = tensor.untyped_storage().nbytes()
        if tensor.numel() * tensor.itemsize > size:
            raise _corrupt(path, f"'{name}' is {tensor.dtype} {tuple(tensor.shape)}, but has {size} bytes")
    distinct = {id(tensor): tensor.numel() * tensor.itemsize for tensor in tensors.values()}
    claim_memory(sum(distinct.values()) - path.stat().st_size, "its tensors are larger than the file")


def read_json(path: Path) -> JsonMapping:
    """Return a JSON object.

    Raises:
        FormatError: it is not JSON as ``parse_object`` accepts it.
    """
    return parse_object(read_json_text(path), lambda reason: _corrupt(path, f"it {reason}"))


def write_json(path: Path, value: JsonMapping) -> None:
    """Write a JSON object, its own names sorted; nested ones keep their order, which may matter.

    Raises:
        FormatError: as ``encode_config``.
    """
    path.write_text(encode_config({name: value[name] for name in sorted(value)}, indent=2) + "\n", encoding="utf-8")


def encode_config(value: JsonMapping, indent: int | None = None) -> str:
    """Return the description of an adapter as JSON.

    Raises:
        FormatError: it holds NaN, infinity, or whatever else ``read_json`` would refuse.
    """
    try:
        return dump_json(value, indent)
    except ValueError as error:
        raise unsupported_error(
            f"the adapter's configuration cannot be written: {error}",
            next_step="give it finite numbers of ordinary size",
        ) from error


def write_sealed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], text: str) -> None:
    """Write a safetensors file whose metadata seal the tensors and a text that describes them."""
    write_safetensors(path, tensors, {**metadata, SEAL: hash_contents(text, tensors)})


def agrees_with_seal(seal: object, text: str, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a seal, if there is one, is the hash over a description and its tensors."""
    if (outline := _OUTLINE.get()) is not None:
        outline.sealed.append((text, frozenset(tensors)))
        return True
    with pause_clock():
        return seal is None or agrees_with_hash(seal, text, tensors)


def check_seal(path: Path, text: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Check a description and its tensors against the hash that lorac wrote over both; other tools write none.

    Raises:
        FormatError: they do not belong together.
    """
    if not agrees_with_seal(metadata.get(SEAL), text, tensors):
        raise corrupt_error(
            f"the configuration and the tensors of '{path}' do not belong together: they, or one of them, were changed "
            "since lorac wrote both",
            next_step=f"copy or download the file again; where the change is meant, remove '{SEAL}' from the tensors' "
            "metadata",
        )


def _read_raw_header(path: Path) -> tuple[JsonMapping, int]:
    """Return the JSON object of the header, and the number of bytes after it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise _corrupt(path, f"it promises {length} bytes of header, the file has {size} bytes")
        claim_memory(length, "its header")
        text = file.read(length)
    return _parse_header(path, text), size - 8 - length


@functools.lru_cache(maxsize=2)
def _parse_header(path: Path, text: bytes) -> JsonMapping:
    """Return a header, which is looked at to recognise a file, and then again to read it."""
    return parse_object(text, lambda reason: _corrupt(path, f"its header {reason}"))


def _check_name(path: Path, name: str) -> None:
    if len(name) > LONGEST_NAME:
        raise _corrupt(path, f"a tensor's name has {len(name)} characters, more than {LONGEST_NAME}: '{name[:50]}…'")


def _parse_place(path: Path, name: str, entry: object, first: int) -> TensorPlace:
    """Return the place of a tensor whose offsets are counted from a byte of the file."""
    _check_name(path, name)
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_FIELDS:
        raise _corrupt(path, f"the entry of '{name}' is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _corrupt(path, f"'{name}' has the unknown dtype {dtype!r}", nearest_name(str(dtype), DTYPES))
    if not (_is_natural_list(shape) and _is_natural_list(offsets) and len(offsets) == 2):
        raise _corrupt(path, f"the shape or offsets of '{name}' are not whole numbers")
    begin, end = offsets
    place = TensorPlace(DTYPES[dtype], shape, first + begin)
    if end - begin != place.size:
        raise _corrupt(path, f"'{name}' is {dtype} {tuple(shape)}, but has {end - begin} bytes")
    return place


def _check_places(path: Path, places: Mapping[str, TensorPlace], first: int, size: int) -> None:
    """Refuse tensors that overlap, leave a hole, or do not fill the file."""
    reached = 0
    for begin, length, name in sorted((place.begin - first, place.size, name) for name, place in places.items()):
        if begin != reached:
            what = "overlaps the tensor before it" if begin < reached else "leaves a hole before it"
            raise _corrupt(path, f"'{name}' {what}: it begins at byte {begin}, not {reached}")
        reached += length
    if reached != size:
        raise _corrupt(path, f"its header promises {reached} bytes of data, the file has {size}")


def _is_natural_list(value: object) -> bool:
    return isinstance(value, list) and {*map(type, value)} <= {int} and min(value, default=0) >= 0


def _corrupt(path: Path, reason: str, nearest: str | None = None) -> FormatError:
    return corrupt_error(f"'{path}' is damaged: {reason}", nearest=nearest)
