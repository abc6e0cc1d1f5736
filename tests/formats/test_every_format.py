"""Every format with a tensor removed, added, renamed or transposed: refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorac
from campaigns import mutations, sound
from lorac.formats.gguf.file import read_gguf
from lorac.formats.peft.peft_type import contains_tensors
from lorac.formats.reading import AdapterFile
from lorac.merging.stored_model import StoredModel
from lorac.storage.onnx_adapter import read_onnx_adapter, write_onnx_adapter
from tests.refusing import refuses

pytestmark = pytest.mark.slow
Tensors = dict[str, Tensor]
RECORD = torch.uint8
"""The dtype of records among a checkpoint's tensors."""


def _write_gguf(tensors: Mapping[str, Tensor], path: Path) -> None:
    fields, _ = read_gguf(path)
    writer = gguf.GGUFWriter(path, str(fields["general.architecture"]))
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_pickle(path: Path) -> Tensors:
    loaded = torch.load(path, weights_only=True)
    return loaded.get("model", loaded) if isinstance(loaded, dict) else {}


def _write_pickle(tensors: Tensors, path: Path) -> None:
    is_part = "model" in torch.load(path, weights_only=True)
    torch.save({"model": tensors} if is_part else tensors, path)


CONTAINERS: dict[str, tuple[Callable[[Path], Tensors], Callable[[Tensors, Path], None]]] = {
    ".safetensors": (load_file, lambda tensors, path: save_file(tensors, path, _metadata(path))),
    ".bin": (_read_pickle, _write_pickle),
    ".pt": (_read_pickle, _write_pickle),
    ".gguf": (lambda path: read_gguf(AdapterFile(path))[1], _write_gguf),
    ".onnx_adapter": (
        lambda path: read_onnx_adapter(AdapterFile(path).open(), AssertionError),
        lambda tensors, path: write_onnx_adapter(path, tensors),
    ),
}
"""Suffix of a file -> how to read its tensors, and to write others in their place."""


def _metadata(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    stored = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    return {key: value for key, value in stored.items() if key not in mutations.SEALS}


def _removed(tensors: Tensors, key: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != key}


def _added(tensors: Tensors, key: str) -> Tensors:
    return {**tensors, f"{key}_more": torch.ones_like(tensors[key])}


def _renamed(tensors: Tensors, key: str) -> Tensors:
    return {(f"{name}_more" if name == key else name): tensor for name, tensor in tensors.items()}


def _transposed(tensors: Tensors, key: str) -> Tensors | None:
    tensor = tensors[key]
    if tensor.ndim < 2 or tensor.shape[-1] == tensor.shape[-2]:
        return None
    return {**tensors, key: tensor.mT.contiguous()}


OPTIONAL = {"kohya": (".alpha", ".dora_scale", ".rescale")}
"""Format -> endings of keys that a file may lack: the scale is 1, a method has no norms of its own, no rescaling."""
DAMAGES = {"removed": _removed, "added": _added, "renamed": _renamed, "transposed": _transposed}


@pytest.fixture(scope="module", params=sorted(sound.FORMATS))
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[sound.Sound]]:
    folder = tmp_path_factory.mktemp("sound")
    sample = sound.SAMPLES.get(request.param)
    written = sample(folder) if sample else sound.write_methods(folder, sound.QUICK)
    yield [one.below(folder) for one in written if one.kind == request.param and not one.is_refused]


@pytest.mark.parametrize("damage", DAMAGES)
def test_rejects_damaged_tensors_by_name(files: list[sound.Sound], damage: str, tmp_path: Path) -> None:
    """Or, of a layer with one tensor in a file that lists no layers, and of a copy of the base: it alone is gone.

    Renamed to another layer's name it would be that layer's.
    """
    for one in files:
        source, host = Path(one.place), sound.model(one.host)
        whole = lorac.load_adapter(source, host)
        for number, (file, key, changed) in enumerate(_changes(source, DAMAGES[damage])):
            place = tmp_path / f"{one.what}-{number}{source.suffix}"
            shutil.copytree(source, place) if source.is_dir() else shutil.copyfile(source, place)
            CONTAINERS[file.suffix][1](changed, place / file.relative_to(source) if source.is_dir() else place)
            mutations.unseal(place)
            _check(one, place, whole, key, changed, damage)


def _changes(source: Path, damage: Callable[[Tensors, str], Tensors | None]) -> Iterator[tuple[Path, str, Tensors]]:
    """Yield every file of tensors, each of its keys, and the tensors with that one damaged."""
    for file in sorted(path for path in (source, *source.rglob("*")) if path.suffix in CONTAINERS):
        tensors = CONTAINERS[file.suffix][0](file)
        damaged = {key: damage(dict(tensors), key) for key, value in tensors.items() if value.dtype is not RECORD}
        yield from ((file, key, changed) for key, changed in damaged.items() if changed is not None)


def _check(one: sound.Sound, place: Path, whole: lorac.Adapter, key: str, changed: Tensors, damage: str) -> None:
    host = sound.model(one.host)
    try:
        read = lorac.load_adapter(place, host)
    except lorac.LoracError as error:
        names = {key, *key.rsplit(".", 1), *(path for path in lorac.sites(host) if path in key)}
        assert any(name and name in str(error) for name in names), f"{one.kind} {one.what} {key}: {error}"
        return
    assert damage == "removed", f"{one.kind} {one.what}: '{key}' was {damage}, and the file loads"
    if key.endswith(OPTIONAL.get(one.kind, "\0")):
        return
    left_out = {name for part in _parts(whole) for name in part} - {name for part in _parts(read) for name in part}
    assert len(left_out) == 1, f"{one.kind} {one.what}: '{key}' was removed, and {left_out} is gone"
    others = [other for other in changed if min(left_out) in other]
    assert not others, f"{one.kind} {one.what}: '{key}' was removed, and {others} are not used"


def _parts(adapter: lorac.Adapter) -> tuple[Iterable[str], ...]:
    return adapter.tensors, adapter.replaced, adapter.provenance.get("copies", {})


def test_reads_with_a_model_in_a_folder_as_with_one_in_memory(files: list[sound.Sound], tmp_path: Path) -> None:
    """Or says that the format needs a run of the model."""
    for one in files:
        host = sound.model(one.host)
        if not isinstance(host, transformers.PreTrainedModel):
            continue
        host.save_pretrained(tmp_path / one.host)
        try:
            read = lorac.load_adapter(one.place, StoredModel.open(tmp_path / one.host).view)
        except lorac.BaseNeeded:
            continue
        whole = lorac.load_adapter(one.place, host)
        assert contains_tensors(read.replaced, whole.replaced)
        for path, tensors in whole.tensors.items():
            assert contains_tensors(read.tensors[path], tensors)


def test_two_formats_with_equal_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata that lorac writes wins over layouts, these over names of tensors; of equals none is taken."""
    formats = lorac.formats.formats()
    save_file({"model_dict.x.weight_lora": torch.ones(2)}, tmp_path / "a.safetensors", {"lorac": "{}"})
    with refuses("corrupt_file", match="has no version"):
        lorac.load_adapter(tmp_path / "a.safetensors")  # native, before autolora
    save_file({"model_dict.x.weight_lora": torch.ones(2)}, tmp_path / "b.safetensors")
    monkeypatch.setattr(type(formats["gguf"]), "recognises", lambda *_: True)
    monkeypatch.setattr(type(formats["gguf"]), "evidence", formats["autolora"].evidence)
    with refuses("unknown_format", match="'autolora' .* as of 'gguf'"):
        lorac.load_adapter(tmp_path / "b.safetensors")
    monkeypatch.setattr(type(formats["autolora"]), "refines", "gguf")
    with refuses("unsupported_field", match="gates of AutoLoRA"):
        lorac.load_adapter(tmp_path / "b.safetensors")
