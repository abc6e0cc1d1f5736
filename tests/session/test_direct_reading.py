"""Adapters of one layout are read straight into their slots, once two of them have shown how."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.adapters.stored import SlotLayout
from lorac.formats._file_layout import FileHeader, FileLayout
from lorac.ir.slots.stacks import StackShape
from lorac.ir.traces.tensor_origins import TensorOrigin
from lorac.session.direct_reading import DirectWays, _find_copies
from lorac.storage.open_file import OpenFile
from lorac.storage.tensor_file import TensorPlace
from lorac.testing import adapter_away
from lorac.variants.base import Variant
from tests.refusing import refuses
from tests.runtime.switching import ENTRY, X, answer, build, raw

ROOM = lorac.Reserve(targets=("up", "down", "head"), rank=4, scales=True)
LORA = lorac.LoRA(r=3, alpha=5, targets=("up", "down", "head"))
NAMES = [f"n{i}" for i in range(4)]


def make_alike(variant: Variant, dtype: torch.dtype = torch.float32) -> list[lorac.Adapter]:
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
    """A folder of adapters of one layout, and their format."""
    folder = tmp_path_factory.mktemp("adapters") / "them"
    return save_all(make_alike(LORA), folder, request.param), request.param


def register(compiled: Any, folder: Path) -> DirectWays:
    """Register the adapters of a folder in the place of all others; return the ways, of which none is known."""
    compiled.swap(None)
    for name in tuple(compiled.pool):
        compiled.remove_adapter(name)
    assert compiled.register(folder) == NAMES
    ways = compiled._registry.direct_ways = DirectWays(compiled.session)
    return ways


def answers(compiled: Any, names: list[str]) -> list[bytes]:
    return [raw(answer(compiled, adapters=name)) for name in names]


def answers_of_the_long_way(compiled: Any, folder: Path) -> list[bytes]:
    found = []
    for name in NAMES:
        register(compiled, folder)
        found += answers(compiled, [name])
    return found


def read_two(compiled: Any, folder: Path) -> None:
    """Read two adapters, which show the way."""
    ways = register(compiled, folder)
    answers(compiled, NAMES[:2])
    assert None not in ways.known.values()
    assert len(ways.known) == 1


@pytest.mark.medium("PEFT's files", cases=["native"])
def test_the_third_is_read_without_its_format_and_gives_the_same_bits(
    compiled: Any, adapters: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = adapters
    expected = answers_of_the_long_way(compiled, folder)
    assert len({*expected}) == len(NAMES)
    read_two(compiled, folder)
    monkeypatch.setattr("lorac.session.registry.load_adapter", None)
    assert answers(compiled, NAMES) == expected
    compiled.swap(NAMES[3])
    assert raw(answer(compiled)) == expected[3]
    compiled.swap(None)
    images = compiled._states._images._images
    for is_written in (False, True):  # writing takes longer than reading once more
        compiled.memory.limit = 0
        assert compiled.memory.used == 0
        assert [name in images for name in NAMES[2:]] == [is_written] * 2
        compiled.memory.limit = None
        assert answers(compiled, NAMES) == expected


@pytest.mark.medium("the other dtype", cases=["dtype1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_that_are_cast_and_scaled_are_read_so(dtype: torch.dtype, compiled: Any, tmp_path: Path) -> None:
    folder = save_all(make_alike(LORA, dtype), tmp_path / "them")
    expected = answers_of_the_long_way(compiled, folder)
    read_two(compiled, folder)
    assert answers(compiled, NAMES) == expected


@pytest.mark.medium("DoRA, which does both", keep=["DoRA*"])
@pytest.mark.parametrize(
    "variant", [lorac.DoRA(r=2, targets=("up",)), lorac.VeRA(r=3, targets=("up",)), lorac.IA3(targets=("up",))], ids=str
)
def test_methods_that_read_the_base_are_not_read_directly(variant: Variant, compiled: Any, tmp_path: Path) -> None:
    folder = save_all(make_alike(variant), tmp_path / "them")
    expected = answers_of_the_long_way(compiled, folder)
    ways = register(compiled, folder)
    assert answers(compiled, NAMES) == expected
    assert [*ways.known.values()] == [None]


def test_values_are_checked_as_ever(compiled: Any, adapters: tuple[Path, str], tmp_path: Path) -> None:
    folder = shutil.copytree(adapters[0], tmp_path / "them")
    expected = answers_of_the_long_way(compiled, folder)
    read_two(compiled, folder)
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
def test_a_file_of_another_layout_is_read_by_its_format(
    compiled: Any, adapters: tuple[Path, str], tmp_path: Path
) -> None:
    folder = shutil.copytree(adapters[0], tmp_path / "them")
    read_two(compiled, folder)
    other = make_alike(dataclasses.replace(LORA, r=2))[3]
    save(other, folder, adapters[1])
    found = answers(compiled, NAMES[3:])
    assert found == answers_of_the_long_way(compiled, folder)[3:]


def test_reads_a_file_while_its_digest_matches(compiled: Any, tmp_path: Path) -> None:
    folder = save_all(make_alike(LORA), tmp_path / "them")
    read_two(compiled, folder)
    path = folder / f"{NAMES[3]}.safetensors"
    compiled.register_file(path, "new", OpenFile(path).digest())
    assert answers(compiled, ["new"]) == answers(compiled, NAMES[3:])
    compiled.remove_adapter("new")
    compiled.register_file(path, "new", OpenFile(folder / f"{NAMES[2]}.safetensors").digest())
    with refuses("corrupt_file", match="changed since it was registered"):
        answer(compiled, adapters="new")


def test_copies_of_all_layers_are_few_and_write_every_slot() -> None:
    layers, kinds, shape = 12, ("q", "up"), (3, 4)
    # A file has its tensors in the order of their names, so that the tenth layer follows the first.
    names = sorted(f"layers.{layer}.{kind}" for layer in range(layers) for kind in kinds)
    places = {name: TensorPlace(torch.float32, shape, 48 * index) for index, name in enumerate(names)}
    files = FileLayout(FileHeader(b"", None, None), places, None)
    slots = tuple(f"layers.{layer}.{kind}" for layer in range(layers) for kind in kinds)
    layout = SlotLayout({}, ((StackShape(len(slots), (4, 3), torch.float32), slots),))
    origins = {name: TensorOrigin(name, torch.empty(shape, device="meta").t()) for name in slots}
    copies = [*_find_copies(origins, layout, files)]
    assert len(copies) == 6, "layers 0 and 1, 10 and 11, and 2 to 9 of each kind"
    file = torch.randn(len(names), *shape, generator=torch.Generator().manual_seed(0))
    memory = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for copy in copies:
        copy.run(file.view(torch.uint8).flatten(), memory)
    for index, name in enumerate(names):
        assert torch.equal(layout.view(memory)[name], file[index].t())
