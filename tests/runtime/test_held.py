"""A folder that is replaced or removed under a running model changes nothing (invariant 10)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.storage import open_file
from tests.runtime.artifacts import assert_same_folders, make_compiled
from tests.runtime.switching import X, answer, raw

ENGINES = [(target, mode) for target in ("eager", "onnxruntime") for mode in ("live", "fused")]
CHOICES: tuple[Any, ...] = ("a", None, {"a": 0.7, "b": 0.4}, "b")
Saved = tuple[Path, lorac.Adapter]


@pytest.fixture(scope="module", params=ENGINES, ids="-".join)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    compiled, late = make_compiled("plain_mlp", *request.param)
    folder = tmp_path_factory.mktemp("saved") / "it"
    compiled.save(folder)
    return folder, late


def _removed(folder: Path) -> None:
    shutil.rmtree(folder)


def _replaced(folder: Path) -> None:
    """By an artifact of the same host and adapters, with other values everywhere."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    lorac.compile(model, [lorac.LoRA(r=1, targets=["0"])], example_inputs=(torch.ones(1, 4),)).save(folder)


def _everything(compiled: lorac.Compiled, late: lorac.Adapter, elsewhere: Path) -> list[bytes]:
    """Return the answers of everything that reads base weights, the program or adapters again."""
    found = [raw(answer(compiled, X))]
    for choice in CHOICES:
        compiled.swap(choice)
        found.append(raw(answer(compiled, X)))
        found.append(raw(answer(compiled, X, adapters="a")))
    compiled.add_adapter(late, name="late")
    compiled.add_adapter(lorac.DoRA(r=1, targets=["up"]), name="fresh")
    compiled.swap({"late": 0.5, "fresh": 1.0})
    found.append(raw(answer(compiled, X)))
    if compiled.engine.target == "onnxruntime" and compiled.mode == "fused":
        assert compiled.swap({"late": 1.0}, settle=True).state == "settled"
        found.append(raw(answer(compiled, X)))
    compiled.remove_adapter("fresh")
    compiled.save(elsewhere)
    return found


@pytest.mark.medium("folders that were removed; live; eager", cases=["*_replaced", "eager-fused-*", "onnxruntime-*"])
@pytest.mark.skipif(not open_file._has_handle_paths(), reason="open files have no paths here")
@pytest.mark.parametrize("gone", [_removed, _replaced])
def test_a_removed_folder_changes_nothing(saved: Saved, gone: Callable[[Path], None], tmp_path: Path) -> None:
    source, late = saved
    folder = tmp_path / "it"
    shutil.copytree(source, folder)
    expected = _everything(lorac.load(source), late, tmp_path / "expected")
    compiled = lorac.load(folder)
    gone(folder)
    assert _everything(compiled, late, tmp_path / "elsewhere") == expected
    assert_same_folders(tmp_path / "elsewhere", tmp_path / "expected")
    with pytest.raises(lorac.BaseNeeded):
        compiled.export()
    if compiled.engine.target == "onnxruntime":
        assert "@emitted" in str(compiled.graph)
        return
    with pytest.raises(lorac.Unavailable):
        _ = compiled.graph


def test_loads_one_whole_artifact_while_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is held, the adapters are not yet: what is loaded is one artifact, here the new one."""
    from lorac.storage import artifact

    compiled, _ = make_compiled("plain_mlp", "eager", "live")
    compiled.save(tmp_path / "it")
    compiled.swap("b")
    before = lorac.load(tmp_path / "it")
    honest, left = artifact.Manifest.open_adapter, [1]

    def late(*given: Any) -> Any:
        if left and left.pop():
            with torch.no_grad():
                for tensor in compiled.parameters():  # type: ignore[attr-defined]
                    tensor.mul_(1.5)
            compiled.save(tmp_path / "it")
        return honest(*given)

    monkeypatch.setattr(artifact.Manifest, "open_adapter", late)
    loaded = lorac.load(tmp_path / "it")
    monkeypatch.undo()
    assert loaded.active == {"b": 1.0}
    assert raw(answer(loaded, X)) == raw(answer(lorac.load(tmp_path / "it"), X))
    assert raw(answer(loaded, X)) != raw(answer(before, X))


@pytest.mark.medium("test_a_removed_folder_changes_nothing")
@pytest.mark.parametrize("has_paths", [True, False], ids=["held", "by name"])
def test_saves_a_program_whose_folder_was_removed(
    has_paths: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody empties the temporary directory. What is held is saved whole; what is not is refused, typed."""
    compiled, _ = make_compiled("plain_mlp", "onnxruntime", "live")
    if has_paths and not open_file._has_handle_paths():
        pytest.skip("open files have no paths here")
    compiled.save(tmp_path / "it")
    shutil.copytree(tmp_path / "it", tmp_path / "before")
    shutil.rmtree(compiled.engine.folder)  # type: ignore[attr-defined]
    if has_paths:
        compiled.save(tmp_path / "it")
        assert raw(answer(lorac.load(tmp_path / "it"), X)) == raw(answer(compiled, X))
    else:
        monkeypatch.setattr(open_file, "_has_handle_paths", lambda: False)
        with pytest.raises(lorac.ArtifactError, match="removed or replaced since it was opened"):
            compiled.save(tmp_path / "it")
    assert_same_folders(tmp_path / "it", tmp_path / "before")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "it"]
