"""Registered adapters with the headers of one that was checked: their values alone are read."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.session.registry import AdapterRegistry
from lorac.storage.open_file import OpenFile
from lorac.testing import adapter_away
from lorac.variants.base import Variant
from tests.refusing import refuses
from tests.runtime.switching import ENTRY, X, answer, build, raw

ROOM = lorac.Reserve(targets=("up", "down", "head"), rank=4, scales=True)
LORA = lorac.LoRA(r=3, alpha=5, targets=("up", "down", "head"))
NAMES = [f"n{i}" for i in range(4)]


def make_similar(variant: Variant, dtype: torch.dtype = torch.float32) -> list[lorac.Adapter]:
    """Return adapters of one structure, each with other values."""
    first = adapter_away(variant, ENTRY.fresh(torch.float32), X, name="first", seed=0)

    def change(tensor: torch.Tensor, index: int) -> torch.Tensor:
        return (tensor * (1 + index / 8)).to(dtype)

    def make(index: int, name: str) -> lorac.Adapter:
        tensors = {path: {key: change(t, index) for key, t in at.items()} for path, at in first.tensors.items()}
        return dataclasses.replace(first, name=name, tensors=tensors)

    return [make(index, name) for index, name in enumerate(NAMES)]


def save(adapter: lorac.Adapter, folder: Path, format: str) -> None:
    path = folder / (adapter.name if format == "peft" else f"{adapter.name}.safetensors")
    lorac.save_adapter(adapter, path, format=format, model=ENTRY.fresh(torch.float32))


def save_all(adapters: list[lorac.Adapter], folder: Path, format: str = "native") -> Path:
    folder.mkdir()
    for one in adapters:
        save(one, folder, format)
    return folder


@pytest.fixture(scope="module")
def compiled() -> Any:
    return build([], "onnxruntime", reserve=ROOM, self_test=False)


@pytest.fixture(scope="module", params=["peft", "native"])
def adapters(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder of adapters with the same headers, and their format."""
    folder = tmp_path_factory.mktemp("adapters") / "them"
    return save_all(make_similar(LORA), folder, request.param), request.param


def register(compiled: Any, folder: Path) -> AdapterRegistry:
    """Register the adapters of a folder in the place of all others, in a registry that knows no headers."""
    compiled.swap(None)
    for name in tuple(compiled.pool):
        compiled.remove_adapter(name)
    compiled._registry = AdapterRegistry(compiled.session)
    assert compiled.register(folder) == NAMES
    registry: AdapterRegistry = compiled._registry
    return registry


def answers(compiled: Any, names: list[str]) -> list[bytes]:
    return [raw(answer(compiled, adapters=name)) for name in names]


def answers_of_formats(compiled: Any, folder: Path) -> list[bytes]:
    """Return the answers of adapters that their formats read."""
    register(compiled, folder)._outlines.clear()
    return answers(compiled, NAMES)


@pytest.mark.medium("PEFT's files", cases=["native"])
def test_reads_values_without_the_format_and_gives_the_same_bits(
    compiled: Any, adapters: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = adapters
    expected = answers_of_formats(compiled, folder)
    assert len({*expected}) == len(NAMES)
    assert len(register(compiled, folder)._outlines) == 1
    monkeypatch.setattr("lorac.session.registry.load_adapter", None)
    assert answers(compiled, NAMES) == expected
    for name, path in zip(NAMES, sorted(folder.iterdir()), strict=True):
        assert compiled._registry.read(path, name).provenance["source"] == str(path)
    compiled.swap(NAMES[3])
    assert raw(answer(compiled)) == expected[3]
    compiled.swap(None)
    compiled.memory.limit = 0
    assert compiled.memory.used == 0
    compiled.memory.limit = None
    assert answers(compiled, NAMES) == expected


@pytest.mark.medium("the other dtype", cases=["dtype1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reads_values_of_half_precision(dtype: torch.dtype, compiled: Any, tmp_path: Path) -> None:
    folder = save_all(make_similar(LORA, dtype), tmp_path / "them")
    expected = answers_of_formats(compiled, folder)
    register(compiled, folder)
    assert answers(compiled, NAMES) == expected


@pytest.mark.medium("half precision", cases=["dtype0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_values_straight_into_slots_once_two_of_a_structure_were_used(
    dtype: torch.dtype, compiled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_all(make_similar(LORA, dtype), tmp_path / "them", "peft")
    expected = answers_of_formats(compiled, folder)
    register(compiled, folder)
    assert answers(compiled, NAMES[:2]) == expected[:2]
    monkeypatch.setattr("lorac.adapters.preparation.Preparer.prepare", None)
    assert answers(compiled, NAMES[2:]) == expected[2:]
    assert {*compiled.pool.resident} == {*NAMES}


@pytest.mark.medium("DoRA, which also reads the base", keep=["*DoRA*"])
@pytest.mark.parametrize(
    "variant", [lorac.DoRA(r=2, targets=("up",)), lorac.VeRA(r=3, targets=("up",)), lorac.IA3(targets=("up",))], ids=str
)
def test_reads_values_of_any_method(variant: Variant, compiled: Any, tmp_path: Path) -> None:
    folder = save_all(make_similar(variant), tmp_path / "them")
    expected = answers_of_formats(compiled, folder)
    register(compiled, folder)
    assert answers(compiled, NAMES) == expected


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@pytest.mark.parametrize(
    "variant",
    [lorac.Bottleneck(targets=("up", "down"), ln_before=True), lorac.AutoLoRA(r=2, targets=("up", "down"))],
    ids=lambda variant: variant.name,
)
def test_parameters_of_branches_have_the_order_of_their_method(variant: Variant, target: str, tmp_path: Path) -> None:
    """Files list them by name; the program was compiled with an adapter that is removed, and lists them as made."""
    saved = save_all(make_similar(variant), tmp_path / "saved")
    alone = build([lorac.load_adapter(saved / "n1.safetensors", ENTRY.fresh(torch.float32))], target)
    registered = build([adapter_away(variant, ENTRY.fresh(torch.float32), X, name="z", seed=3)], target, active=None)
    registered.remove_adapter("z")
    registered.register(saved)
    assert raw(answer(registered, adapters="n1")) == raw(answer(alone, adapters="n1"))


def test_rejects_wrong_values(compiled: Any, adapters: tuple[Path, str], tmp_path: Path) -> None:
    folder = shutil.copytree(adapters[0], tmp_path / "them")
    expected = answers_of_formats(compiled, folder)
    register(compiled, folder)
    path = max(folder.rglob("*.safetensors"))
    whole = path.read_bytes()
    wrong = {
        "non_finite": whole[:-4] + torch.tensor(torch.nan).numpy().tobytes(),
        "corrupt_file": whole[:-4] + torch.tensor(2.0).numpy().tobytes(),
    }
    for code, contents in (*wrong.items(), ("corrupt_file", whole[:-4]), ("corrupt_file", whole + bytes(4))):
        path.write_bytes(contents)
        with refuses(code):
            compiled.swap(NAMES[3])
        assert compiled.active == {}
    path.write_bytes(whole)
    assert answers(compiled, NAMES[3:]) == expected[3:]


@pytest.mark.medium("PEFT's files", cases=["native"])
def test_a_file_with_other_headers_is_read_by_its_format(
    compiled: Any, adapters: tuple[Path, str], tmp_path: Path
) -> None:
    folder = shutil.copytree(adapters[0], tmp_path / "them")
    register(compiled, folder)
    other = make_similar(dataclasses.replace(LORA, r=2))[3]
    save(other, folder, adapters[1])
    found = answers(compiled, NAMES[3:])
    assert found == answers_of_formats(compiled, folder)[3:]


def test_a_file_with_a_digest_is_read_while_it_has_it(compiled: Any, tmp_path: Path) -> None:
    folder = save_all(make_similar(LORA), tmp_path / "them")
    register(compiled, folder)
    path = folder / f"{NAMES[3]}.safetensors"
    compiled.register_file(path, "new", OpenFile(path).digest())
    assert answers(compiled, ["new"]) == answers(compiled, NAMES[3:])
    compiled.remove_adapter("new")
    compiled.register_file(path, "new", OpenFile(folder / f"{NAMES[2]}.safetensors").digest())
    with refuses("corrupt_file", match="changed since it was registered"):
        answer(compiled, adapters="new")
