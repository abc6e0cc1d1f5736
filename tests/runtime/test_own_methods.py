"""A method from outside is served where its class is unknown: its artifact holds its forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.formats.native import load_record
from tests.runtime.artifacts import assert_same_folders, run_python
from tests.runtime.own_methods import MODEL, answers, own_adapters
from tests.zoo import ZOO

TARGETS = ("onnxruntime", "eager")

ELSEWHERE = """
import sys
from pathlib import Path
import torch
import lorac
from lorac.formats.native import load_record
from tests.runtime.artifacts import assert_same_folders
import tests.zoo

# The choices and the calls, of a module in which the classes are not defined.
source = Path("tests/runtime/own_methods.py").read_text()
head, _, rest = source.partition("@dataclass")
tail = rest[rest.index("CHOICES:"):]
names = {}
exec(compile(head + tail, "calls", "exec"), names)

folder = Path(sys.argv[1])
assert not {"tilted", "bent", "beside"} & set(lorac.variants())
for target in sys.argv[2:]:
    expected = torch.load(folder / f"{target}.pt")
    loaded = lorac.load(folder / target)
    found = names["answers"](loaded)
    assert len(expected) == len(found)
    for one, other in zip(expected, found):
        assert torch.equal(one, other), target
    assert not {"tilted", "bent", "beside"} & set(lorac.variants())
    assert "tilted: tilted r=4" in str(loaded.explain())
    loaded.save(folder / "again")
    assert_same_folders(folder / target, folder / "again")
    adapter = loaded.adapters["chained"]
    lorac.save_adapter(adapter, folder / "chained.safetensors", format="native")
    assert load_record(folder / "chained.safetensors", "chained").variant == adapter.variant
    for refused in (
        lambda: lorac.load_adapter(folder / "chained.safetensors"),
        lambda: loaded.add_adapter(folder / "chained.safetensors", "another"),
        lambda: loaded.add_adapter(adapter, "another"),
        lambda: lorac.factors(adapter),
        lambda: lorac.Chain.of(loaded.adapters["plain"], adapter, name="more"),
    ):
        try:
            refused()
        except lorac.UnknownMethod as error:
            assert "'tilted'" in error.what and "'tests.runtime.own_methods'" in error.what
            assert "import tests.runtime.own_methods" in error.next_step
            assert "--import tests.runtime.own_methods" in error.next_step
        else:
            raise AssertionError("nothing asked for the class")
    with torch.no_grad():
        loaded.adapters["tilted"].tensors["up"]["A"].add_(1)
    try:
        loaded.swap("tilted")
        loaded(**names["ZOO"]["plain_mlp"].inputs())
    except lorac.UnknownMethod:
        pass
    else:
        raise AssertionError("tensors that were written pass for what was computed of them before")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact, and beside it what it answers where the classes are known."""
    folder = tmp_path_factory.mktemp("own")
    save_answers(folder, "eager")
    return folder


@pytest.fixture(scope="module")
def folders(folder: Path) -> Path:
    """Return the folder, with a program for each target."""
    for target in set(TARGETS) - {"eager"}:
        save_answers(folder, target)
    return folder


def save_answers(folder: Path, target: str) -> None:
    model = ZOO[MODEL].fresh()
    options: dict[str, Any] = {"active": None, "example_inputs": ZOO[MODEL].inputs(), "self_test": False}
    compiled = lorac.compile(model, own_adapters(model), target=target, **options)
    compiled.save(folder / target)
    served = compiled if target == "onnxruntime" else lorac.load(folder / target)
    torch.save(answers(served), folder / f"{target}.pt")


@pytest.mark.medium("the two other tests of the file, in this process")
def test_served_swapped_mixed_and_saved_without_the_class(folders: Path) -> None:
    run_python(f"import sys; sys.argv[1:] = {[str(folders), *TARGETS]!r}\n{ELSEWHERE}")


def test_loads_a_method_by_its_class(folder: Path) -> None:
    loaded = lorac.load(folder / "eager")
    again = folder / "known"
    loaded.save(again)
    assert_same_folders(folder / "eager", again)
    for name in ("tilted", "chained"):
        assert loaded.adapters[name].variant == load_record(*_record(folder / "eager", name)).variant
        loaded.add_adapter(loaded.adapters[name], f"{name} again")
    loaded.swap({"tilted again": 0.7})


def test_stores_formulas_only_of_methods_from_outside(folder: Path) -> None:
    manifest = lorac.storage.artifact.open_artifact(folder / "eager").fields  # type: ignore[attr-defined]
    with_forms = {name for name, entry in manifest["adapters"].items() if "forms" in entry}
    assert with_forms == {"tilted", "bent", "beside", "chained"}
    assert manifest["adapters"]["chained"]["modules"] == {"tilted": "tests.runtime.own_methods"}


def _record(folder: Path, name: str) -> tuple[Path, str]:
    import json

    entry = json.loads((folder / "manifest.json").read_text())["adapters"][name]
    return folder / entry["file"], name
