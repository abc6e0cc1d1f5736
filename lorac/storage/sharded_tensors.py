"""A model's weights as transformers and diffusers save them: one safetensors file, or several with an index."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from lorac.argument_types import JsonMapping, matches_type
from lorac.errors import ArtifactError, FormatError, list_some
from lorac.storage.open_file import OpenFile
from lorac.storage.paths import is_inner_name, translate_os_errors
from lorac.storage.strict_json import parse_object, read_json_text
from lorac.storage.tensor_file import TensorFile

_NAMES = ("model", "diffusion_pytorch_model")
"""The stems of the libraries' names for files of weights."""
_OTHERS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.safetensors")
_SHARD = re.compile(r"-of-\d+\.safetensors$")
_STEP = "download the whole folder again"


class ShardedTensors(Mapping[str, Tensor]):
    """The tensors of a model's folder by name; each is mapped when it is read, and unmapped with its last reader.

    Args:
        path: the folder, or one safetensors file.

    Attributes:
        shards: file name -> the open file.
        index: the contents of the index by entry; None if one file has all tensors.
        index_name: the name of the index's file.

    Raises:
        FormatError: there are no such files; or a file is missing, damaged, or lacks a tensor that the index names.
    """

    def __init__(self, path: Path) -> None:
        folder = path.parent if path.is_file() else path
        only, self.index_name = (path.name, "") if path.is_file() else _find_weights(folder)
        self.index: JsonMapping | None = None
        if (folder / only).is_file():
            self.shards = {only: _open_shard(folder / only)}
        else:
            self.index = _read_index(folder / self.index_name)
            names = {*self.index["weight_map"].values()}
            self.shards = {name: _open_shard(folder / name) for name in sorted(names)}
        self._places = {name: shard for shard, file in self.shards.items() for name in file}
        named: Mapping[str, str] = self._places if self.index is None else self.index["weight_map"]
        absent = [name for name, shard in named.items() if self._places.get(name) != shard]
        if absent:
            raise _damaged(folder / self.index_name, f"names {list_some(absent)}, which the files do not hold")

    def __getitem__(self, name: str) -> Tensor:
        return self.shards[self._places[name]][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def outline(self) -> dict[str, Tensor]:
        """Return all tensors on the meta device: their shapes and dtypes."""
        return {name: tensor for file in self.shards.values() for name, tensor in file.outline().items()}

    def shard_of(self, name: str) -> str:
        """Return the name of the file that stores a tensor."""
        return self._places[name]


def _find_weights(folder: Path) -> tuple[str, str]:
    """Return the names of the single file of all weights and of the index of shards; at least one file exists."""
    found = [names for names in map(_file_names, _NAMES) if any((folder / name).is_file() for name in names)]
    if not found:
        others = sorted(path.name for pattern in _OTHERS for path in folder.glob(pattern))
        held = f", but {list_some(others, 3)}" if others else ""
        raise FormatError(
            f"'{folder}' has neither {_file_names(_NAMES[0])[0]} nor an index of several{held}",
            next_step="load the model with its library and save it again, which writes safetensors"
            if others
            else "download the model's weights too",
            code="unreadable",
        )
    return found[0]


def _file_names(stem: str) -> tuple[str, str]:
    return f"{stem}.safetensors", f"{stem}.safetensors.index.json"


def _open_shard(path: Path) -> TensorFile:
    if not path.is_file():
        raise FormatError(f"'{path}' is missing, and the folder's index names it", next_step=_STEP, code="corrupt_file")
    try:
        with translate_os_errors(path, FormatError, "read", "unreadable"):
            return TensorFile(OpenFile(path.resolve()))  # folders of the hub's cache contain links
    except ArtifactError as error:
        raise FormatError(error.what, next_step=_STEP, code="corrupt_file") from error


def _read_index(path: Path) -> JsonMapping:
    with translate_os_errors(path, FormatError, "read", "unreadable"):
        index = parse_object(read_json_text(path), lambda reason: _damaged(path, reason))
    places = index.get("weight_map")
    if not matches_type(places, dict[str, str]) or not places:
        raise _damaged(path, "has no weight_map, the files of the tensors by name")
    if not isinstance(index.get("metadata", {}), dict):
        raise _damaged(path, "has metadata that are not a mapping")
    outside = next((name for name in places.values() if "/" in name or not is_inner_name(name)), None)
    if outside is not None:
        raise _damaged(path, f"names the file {outside!r}, which is not a file of its folder")
    # An index must not omit a shard of its own series; shards of another series are of an earlier model.
    names = {*places.values()}
    endings = {found[0] for name in names if (found := _SHARD.search(name))}
    others = [one.name for one in path.parent.glob("*.safetensors") if one.name not in names]
    left_out = [name for name in sorted(others) if (found := _SHARD.search(name)) and found[0] in endings]
    if left_out:
        raise _damaged(path, f"does not name {list_some(left_out)}, which is part of the model")
    return index


def _damaged(path: Path, reason: str) -> FormatError:
    return FormatError(f"'{path}' {reason}", next_step=_STEP, code="corrupt_file")
