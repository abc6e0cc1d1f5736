"""A folder is taken for an artifact only where every part of it is as it was written, and written all or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorac
from lorac.ir.calls.output_structure import find_output_class
from lorac.storage import artifact
from lorac.storage.paths import file_stems
from tests.limits import within_budget
from tests.runtime.artifacts import assert_same_folders, make_compiled


# ── What is wrong with a folder ──────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "it"
    make_compiled("plain_mlp", "eager", "live")[0].save(folder)
    return folder


def _edited(change: Callable[[dict[str, Any]], Any], seal: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(seal(manifest)))

    return apply


def _manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The manifest says something else, and its seal agrees."""
    return _edited(change, artifact.seal_manifest)


def _rename(new: str) -> Callable[[Path], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][new] = manifest["files"].pop("program.json")

    return _manifest(change)


def _flip(folder: Path) -> None:
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _cut(folder: Path) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def _truncate(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-40])


def _link(folder: Path) -> None:
    path = folder / "program.json"
    path.rename(folder.parent / "elsewhere.json")
    path.symlink_to(folder.parent / "elsewhere.json")


def _link_folder(folder: Path) -> None:
    (folder / "adapters").rename(folder.parent / "elsewhere")
    (folder / "adapters").symlink_to(folder.parent / "elsewhere")


def _op(name: Any) -> Callable[[Path], None]:
    """The program calls something else, and the hashes say so."""

    def apply(folder: Path) -> None:
        path = folder / "program.json"
        program = json.loads(path.read_text())
        next(node for node in program["main"]["nodes"] if "op" in node)["op"] = name
        path.write_text(json.dumps(program))
        _manifest(lambda m: m["files"].update(artifact.describe_files(folder)) or m["files"].pop("manifest.json"))(
            folder
        )

    return apply


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "parent": (_rename("../program.json"), "leads out of the folder"),
    "inner parent": (_rename("adapters/../../x"), "leads out of the folder"),
    "absolute": (_rename("/etc/hostname"), "leads out of the folder"),
    "backslash": (_rename("..\\x"), "leads out of the folder"),
    "symlink": (_link, "leads out of the folder"),
    "linked folder": (_link_folder, "leads out of the folder"),
    "flipped bit": (_flip, "hash"),
    "cut file": (_cut, "bytes"),
    "missing file": (lambda folder: (folder / "program.json").unlink(), "lacks the file"),
    "extra file": (lambda folder: (folder / "more.bin").write_bytes(b"x"), "not in the artifact's manifest"),
    "truncated manifest": (_truncate, "not JSON"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "not an artifact"),
    "other version": (_manifest(lambda m: m.update(lorac_artifact=99)), "version 99"),
    "field missing": (_manifest(lambda m: m.pop("plans")), "'plans'"),
    "field of another type": (_manifest(lambda m: m.update(adapters=[])), "'adapters'"),
    "changed manifest": (_edited(lambda m: m.update(active={}), dict), "changed after it was written"),
    "manifest without a seal": (_edited(lambda m: m.pop("seal"), dict), "'seal' is missing"),
    "name given twice": (
        lambda folder: (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace('"mode"', '"mode": "live", "mode"', 1)
        ),
        "'mode' is given twice",
    ),
    "unlisted adapter": (_manifest(lambda m: m["adapters"]["a"].update(file="/etc/hostname")), "not in its list"),
    "unknown site": (_manifest(lambda m: m["plans"].update(nowhere=m["plans"]["up"])), "contradicts itself"),
    "op that reads files": (_op("aten.from_file.default"), "', an op that "),
    "function of Python": (_op("operator.methodcaller"), "', an op that "),
    "op of elsewhere": (_op("os.system"), "', an op that "),
    "op of a number": (_op(3), "contradicts itself"),
    "plan of a number": (_manifest(lambda m: m["plans"].update(up=3)), "contradicts itself"),
    "reasons of another form": (_manifest(lambda m: m["plans"]["up"].update(reasons=[[1]])), "contradicts itself"),
    "signature of another form": (
        _manifest(lambda m: m["program"]["graphs"]["main"]["signature"].update(outputs=["a", "b"])),
        "signature of a stored program does not fit together",
    ),
    "ids of another form": (
        _manifest(lambda m: m["program"]["graphs"]["main"]["signature"].update(below={"x": "many"})),
        "signature of a stored program does not fit together",
    ),
    "checks of another form": (
        _manifest(lambda m: m["program"]["graphs"]["main"]["signature"].update(checks=["a"])),
        "does not fit together",
    ),
    "checks of no output": (
        _manifest(lambda m: m["program"]["graphs"]["main"]["signature"].update(checks={"a": "model.py:3"})),
        "signature of a stored program does not fit together",
    ),
    "graph of another name": (
        _manifest(lambda m: m["program"].update(graphs={"other": m["program"]["graphs"]["main"]})),
        "its program the graphs|contradicts itself",
    ),
    "no component": (_manifest(lambda m: m.update(components={})), "has the components"),
    "manifest of gigabytes of nothing": (lambda folder: os.truncate(folder / "manifest.json", 3 << 30), "its JSON"),
}


@pytest.mark.medium("the other damages", cases=["parent"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_rejects_bad_folders(damage: str, sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it"
    subprocess.run(["cp", "-r", str(sound), str(folder)], check=True)
    harm, words = DAMAGES[damage]
    harm(folder)
    with within_budget(), pytest.raises((lorac.ArtifactError, lorac.FormatError), match=words):
        lorac.load(folder)


@pytest.mark.parametrize("change", ["input", "op"])
def test_names_a_program_that_cannot_compute(change: str, tmp_path: Path) -> None:
    import onnx

    host, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.ones(2, 4)
    options: Any = {"target": "onnxruntime", "self_test": False, "example_inputs": (x,)}
    lorac.compile(host, {"a": lorac.LoRA(r=2)}, **options).save(tmp_path)
    path = next(tmp_path.rglob("*.onnx"))
    model = onnx.load(path, load_external_data=False)
    slot = next(value.name for value in model.graph.input if ":" in value.name)
    for node in model.graph.node if change == "input" else ():
        node.input[:] = ["other" if name == slot else name for name in node.input]
    if change == "input":
        next(value for value in model.graph.input if value.name == slot).name = "other"
    else:  # it fits by its shapes, as far as ONNX Runtime infers them
        taken = next(iter(model.graph.node)).input
        model.graph.node.insert(0, onnx.helper.make_node("Reshape", [taken[0], "five"], ["flat"]))
        model.graph.initializer.append(onnx.helper.make_tensor("five", onnx.TensorProto.INT64, [1], [5]))
        taken[0] = "flat"
    path.write_bytes(model.SerializeToString())
    _manifest(lambda m: m["files"].update(artifact.describe_files(tmp_path)) or m["files"].pop("manifest.json"))(
        tmp_path
    )
    with pytest.raises((lorac.ArtifactError, lorac.InputMismatch), match=r"cannot compute|fit together|ONNX"):
        lorac.load(tmp_path)(x)


def test_a_constant_of_a_node_lies_in_no_file(tmp_path: Path) -> None:
    import onnx_ir as ir

    from lorac.backends.onnx.model_files import read_model_files
    from lorac.storage.open_file import open_files

    shape = ir.Shape((2,))
    (tmp_path / "model.onnx.data").write_bytes(bytes(8))
    tensor = ir.ExternalTensor("model.onnx.data", 0, 8, ir.DataType.FLOAT, shape=shape, name="c", base_dir=tmp_path)
    node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], num_outputs=1)
    graph = ir.Graph([], node.outputs, nodes=[node], opset_imports={"": 18})
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")
    with pytest.raises(lorac.ArtifactError, match=r"constant of a node in the file 'model\.onnx\.data'"):
        read_model_files(open_files(tmp_path, ["model.onnx", "model.onnx.data"]), "main")


@pytest.mark.parametrize(
    "name",
    [
        None,
        "os.path.join",
        "builtins.eval",
        "transformers.pipeline",
        "transformers.a b",
        "transformers.nope.X",
        "transformers.utils.generic.ModelOutput.__init__",
        "transformers.utils.generic.ModelOutput",
        "transformers.modeling_outputs.torch",
        "transformers.modeling_outputs.dataclass",
        "transformers.modeling_outputs.__doc__",
        "transformers.modeling_outputs.Nothing",
        "transformers.models.bert.modeling_bert.BertModel",
        "transformers.models.nope.modeling_nope.Output",
        "transformers.models.bert.convert_bert_original_tf_checkpoint_to_pytorch.X",
        "diffusers.pipelines.pipeline_utils.DiffusionPipeline",
        "diffusers.models.modeling_utils.ModelMixin",
        "diffusers.models.x\n.Y",
    ],
)
def test_only_output_classes_of_transformers_are_restored(name: str | None) -> None:
    before = {name for name in sys.modules if name.startswith(("transformers.", "diffusers."))}
    assert find_output_class(name) is dict
    imported = {name for name in sys.modules if name.startswith(("transformers.", "diffusers."))} - before
    assert not any("pipelines" in name or "convert" in name for name in imported)


def test_an_output_class_of_transformers_is_restored() -> None:
    assert find_output_class("transformers.modeling_outputs.CausalLMOutput").__name__ == "CausalLMOutput"


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_failed_save_leaves_nothing(sound: Path, tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half").write_bytes(b"x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        artifact.write_artifact(tmp_path / "new", fail)
    assert not list(tmp_path.iterdir())
    compiled = lorac.load(sound)
    compiled.save(tmp_path / "it")
    with pytest.raises(OSError, match="disk full"):
        artifact.write_artifact(tmp_path / "it", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    assert_same_folders(sound, tmp_path / "it")


def test_an_artifact_can_replace_its_own_folder(sound: Path, tmp_path: Path) -> None:
    compiled = lorac.load(sound)
    compiled.save(tmp_path / "it")
    again = lorac.load(tmp_path / "it")
    again.swap("b")
    again.save(tmp_path / "it")
    assert lorac.load(tmp_path / "it").active == {"b": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


@pytest.mark.medium("a folder below it", cases=["."])
@pytest.mark.parametrize("inside", [".", "below"])
def test_the_folder_that_the_process_works_in_stays(
    inside: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaced by another folder it would lie nowhere, and no relative path would lead anywhere."""
    (tmp_path / "here" / inside).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / inside)
    compiled, target = lorac.load(sound), "." if inside == "." else ".."
    for save in (
        lambda: compiled.save("."),
        lambda: lorac.save_adapter(compiled.adapters["a"], target),
        lambda: lorac.save_adapter(compiled.adapters["a"], tmp_path / "here"),
    ):
        with pytest.raises(lorac.LoracError, match="this process works in that folder"):
            save()
    assert Path.cwd().is_dir()
    compiled.save("artifact")
    assert lorac.load("artifact").active == compiled.active


def test_avoids_names_of_windows_devices() -> None:
    names = ["CON", "aux", "com1", "console", "lpt9", "nul", "prn0"]
    assert file_stems(names) == {
        "CON": "_0", "aux": "_1", "com1": "_2", "console": "console", "lpt9": "_4", "nul": "_5", "prn0": "prn0",
    }  # fmt: skip


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PWA = '{"name": "my app", "icons": [], "files": {"index.html": {}}}'


@pytest.mark.medium("no manifest, and somebody else's", keep=["None", '{"name"*'])
@pytest.mark.parametrize("manifest", [None, PWA, "not JSON", '{"lorac_artifact": "1", "files": {"index.html": {}}}'])
def test_other_folders_are_not_touched(manifest: str | None, sound: Path, tmp_path: Path) -> None:
    """A web app's folder has a manifest.json too."""
    (tmp_path / "index.html").write_text("mine")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    before = _contents(tmp_path)
    with pytest.raises(lorac.ArtifactError, match="not an artifact") as error:
        lorac.load(sound).save(tmp_path)
    assert "new folder" in str(error.value)
    assert _contents(tmp_path) == before


@pytest.mark.medium("a file within and an empty folder", keep=["adapters/notes.txt", "empty/"])
@pytest.mark.parametrize("name", ["notes.txt", "adapters/notes.txt", "more/notes.txt", "empty/"])
def test_rejects_a_folder_with_foreign_files(name: str, sound: Path, tmp_path: Path) -> None:
    compiled, folder = lorac.load(sound), tmp_path / "it"
    compiled.save(folder)
    foreign = folder / name
    if name.endswith("/"):
        foreign.mkdir()
    else:
        foreign.parent.mkdir(exist_ok=True)
        foreign.write_text("mine")
    before = _contents(folder)
    with pytest.raises(lorac.ArtifactError, match=f"also holds '{name.rstrip('/')}'") as error:
        compiled.save(folder)
    assert "elsewhere" in str(error.value)
    assert _contents(folder) == before
    assert foreign.exists()


def test_replaces_a_damaged_or_older_artifact(sound: Path, tmp_path: Path) -> None:
    compiled = lorac.load(sound)
    for harm in (_flip, _cut, _manifest(lambda m: m.update(lorac_artifact=1)), _edited(lambda m: m.pop("seal"), dict)):
        compiled.save(tmp_path / "it")
        harm(tmp_path / "it")
        compiled.save(tmp_path / "it")
        assert_same_folders(sound, tmp_path / "it")
