"""Adapters merged into a model's folder: one weight at a time is in memory, shard by shard."""

import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.errors import OptionError, list_some, unmergeable_error, warn
from lorac.frontend.host import Host
from lorac.frontend.hosts.transformers import TIES
from lorac.ir.slots.choice import ChoiceSpec
from lorac.merging.merged_model import choose_active, read_adapters
from lorac.merging.merged_weights import MergedWeights
from lorac.merging.stored_model import StoredModel, find_kept_ties, find_ties, separate_names
from lorac.progress import progress, step
from lorac.session.api import Adapters
from lorac.session.model_folders import CONFIG
from lorac.session.request.sources import read_sources
from lorac.storage.atomic_folders import flush_folder, replace_atomically
from lorac.storage.paths import check_new, parse_path, translate_os_errors
from lorac.storage.remote import find_source
from lorac.storage.sharded_tensors import ShardedTensors
from lorac.storage.strict_json import dump_json
from lorac.storage.tensor_file import write_safetensors

_WEIGHTS = frozenset({".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".ot", ".pt", ".pth", ".safetensors"})
"""Suffixes of files with weights into which no adapters are merged."""
_INDEX, _ADAPTER, _ONNX = ".index.json", "adapter_", ".onnx"
"""Suffix of an index's name; prefix of PEFT's files, which transformers would load in addition; part of the names of
ONNX models and their data."""


@dataclass(frozen=True)
class MergedCheckpoint:
    """The folder of a model with adapters merged into it.

    Attributes:
        folder: the path of the folder.
        merged: the number of tensors that the adapters changed.
        size: the size of all tensors in bytes.
        left_out: files of the model's folder that were not copied: files with weights without the adapters, and links
            to outside the folder.
    """

    folder: Path
    merged: int
    size: int
    left_out: tuple[str, ...]


def merge_checkpoint(
    folder: str | os.PathLike[str],
    adapters: Adapters,
    destination: str | os.PathLike[str],
    active: ChoiceSpec = "auto",
    *,
    dequantize: bool = False,
) -> MergedCheckpoint:
    """Write a copy of a model's folder with adapters merged into the weights, without loading the model.

    The result has the files of the model's folder: its configuration, its tokenizer, and its weights in the same number
    of safetensors files. One weight at a time is in memory, in float32. The folder appears only when it is complete.

    Args:
        folder: the folder in which transformers saved a model, or diffusers saved a model of a pipeline.
        adapters: as ``merge_into`` takes them.
        destination: the folder to write; it must not exist, or be empty.
        active: as ``merge_into`` takes it.
        dequantize: whether to merge into the float values of weights that bitsandbytes, GPTQ, AWQ or transformers' fp8
            quantised. The whole result is then in floating point.

    Raises:
        OptionError: the folder contains no model that can be built, or the destination is not empty.
        FormatError: the model's weights are missing, damaged, of other shapes, or not in safetensors files.
        CompileError: the weights are quantised, or an adapter cannot be merged into them.
        AdapterError, SiteError, ChoiceError: as ``merge_into``.
    """
    folder = find_source(folder, "the model's folder", OptionError)
    destination = check_new(parse_path(destination, "the folder of the merged model", OptionError))
    with progress("merge") as report:
        report.step("reading")
        source = StoredModel.open(folder, dequantize=dequantize)
        given = read_adapters(read_sources(adapters), source.view)
        merged = MergedWeights(source.view, given, choose_active(active, given))
        with translate_os_errors(destination, OptionError, "written"), replace_atomically(destination) as staged:
            staged.mkdir()
            left_out = _copy_files(source, staged)
            size = _write_weights(source, merged, staged)
    return MergedCheckpoint(destination, len(merged), size, left_out)


def _copy_files(source: StoredModel, staged: Path) -> tuple[str, ...]:
    """Copy all files except weights; return the names of files that are left out.

    Links to outside the folder are not followed: they may lead to files that the user does not want to publish. In a
    cache of the hub, links to the repository's blobs are followed. The configuration is always read.
    """
    left_out, outside, own = list[str](), list[str](), {*source.tensors.shards, source.tensors.index_name}
    folder = source.folder.resolve()
    caches = (path.parent for path in folder.parents if path.name == "snapshots" and (path.parent / "blobs").is_dir())
    root = next(caches, folder)  # in a cache of the hub, links lead to the blobs next to the snapshots
    for path in sorted(source.folder.rglob("*")):
        name = path.relative_to(source.folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or not path.is_file() or name.as_posix() in own:
            continue
        is_part = path.suffix in _WEIGHTS or _ONNX in name.name or name.name.endswith(_INDEX)
        if is_part or name.name.startswith(_ADAPTER):
            left_out.append(name.as_posix())
            continue
        if name.as_posix() != CONFIG and not path.resolve().is_relative_to(root):
            outside.append(name.as_posix())
            continue
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, staged / name)
    if left_out:
        warn(f"not copied from '{source.folder}', since they hold weights without the adapters: {list_some(left_out)}")
    if outside:
        warn(f"not copied from '{source.folder}', since they are links that lead out of it: {list_some(outside)}")
    return (*left_out, *outside)


class _OutputTensors(Mapping[str, Tensor]):
    """The tensors of the result by their stored names; each is computed on access.

    Attributes:
        added: name of a tensor that the model's folder does not store -> the tied tensor that it stores.
    """

    def __init__(self, source: StoredModel, merged: MergedWeights) -> None:
        self._source, self._merged, self.added = source, merged, dict[str, str]()
        missing = [name for name in merged if name not in source.view.stored]
        if missing:
            raise unmergeable_error(
                f"'{source.folder}' does not store {list_some(missing)} as the model has it",
                next_step="load the model, and save lorac.merge_into(model, adapters) by its save_pretrained",
            )
        model, kept = source.view.module, list(find_kept_ties(source.view.module, merged))
        self._names = {source.keys[name]: name for name in merged if name in source.keys}
        groups = dict.fromkeys(source.converted[name] for name in merged if name in source.converted)
        self._groups = {key: group for group in groups for key in group.sources}
        self._made: dict[str, Tensor] = {}
        for names in find_ties(model):
            if names in kept or not any(name in merged for name in names):
                continue
            stored = next(source.keys[name] for name in names if name in source.keys)
            self._names |= {name: name for name in names if name not in source.keys}
            self.added |= {name: stored for name in names if name not in source.keys}
            separate_names(model, names)
        Host.of(model).record_untied_weights()

    def __getitem__(self, key: str) -> Tensor:
        if key in self._groups:
            if key not in self._made:
                group = self._groups[key]
                names = [name for name, one in self._source.converted.items() if one is group]
                self._made |= group.save({name: self._read(name) for name in names})
                self._merged.forget()
            return self._made.pop(key)
        name = self._names.get(key)
        return self._source.tensors[key] if name is None else self._read(name)

    def _read(self, name: str) -> Tensor:
        return self._merged[name] if name in self._merged else self._source.view.stored[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._source.tensors
        yield from self.added

    def __len__(self) -> int:
        return len(self._source.tensors) + len(self.added)

    def outline(self, shard: str) -> dict[str, Tensor]:
        """Return the tensors of a file on the meta device."""
        found = self._source.tensors.shards[shard].outline()
        return found | {name: found[stored] for name, stored in self.added.items() if stored in found}

    def changes(self, shard: str) -> bool:
        """Return whether a file differs from the file in the model's folder."""
        is_kept = isinstance(self._source.tensors, ShardedTensors)
        return not is_kept or not (self._names.keys() | self._groups.keys()).isdisjoint(self.outline(shard))


def _write_weights(source: StoredModel, merged: MergedWeights, staged: Path) -> int:
    """Write the weights, their index and the ``tie_word_embeddings`` setting; return the size in bytes."""
    tensors, size = _OutputTensors(source, merged), 0
    with ThreadPoolExecutor(1) as flusher:  # flush a file to disk while the next one is computed
        flushed = []
        for shard, original in source.tensors.shards.items():
            step(shard)
            outline = tensors.outline(shard)
            size += sum(tensor.nbytes for tensor in outline.values())
            if tensors.changes(shard):
                write_safetensors(staged / shard, tensors, {"format": "pt", **original.notes}, outline)
            else:
                shutil.copyfile(original.file.path, staged / shard)
            flushed.append(flusher.submit(flush_folder, staged / shard))
        for one in flushed:
            one.result()
    if source.tensors.index is not None:
        places = {name: shard for shard in source.tensors.shards for name in tensors.outline(shard)}
        index = {**source.tensors.index, "weight_map": dict(sorted(places.items()))}
        index["metadata"] = {**index.get("metadata", {}), "total_size": size}
        (staged / source.tensors.index_name).write_text(dump_json(index, indent=2), encoding="utf-8")
    is_untied = bool(tensors.added) and getattr(source.view.module.config, TIES, None) is False
    if is_untied or not isinstance(source.tensors, ShardedTensors):
        config = _untie_config(source.config) if is_untied else source.config
        (staged / CONFIG).write_text(dump_json(config, indent=2), encoding="utf-8")
    return size


def _untie_config(config: JsonMapping) -> dict[str, object]:
    """Return a configuration with untied embeddings, nested configurations included."""
    inner = {name: _untie_config(value) for name, value in config.items() if isinstance(value, dict) and TIES in value}
    return {**config, **inner, TIES: False}
