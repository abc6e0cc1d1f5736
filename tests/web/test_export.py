"""The folder of a page: its parts, its program in Python's ONNX Runtime, and what is not exported."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.numpy import load

import lorac
from lorac.errors import ArtifactError, OptionError, Unavailable
from lorac.testing import assert_close
from lorac.web import export_web
from tests.web.conftest import IDS, METHODS, PACKAGE
from tests.zoo import ZOO


def read(page: Path, parts: list[dict[str, Any]]) -> bytes:
    return b"".join((page / "files" / part["sha256"]).read_bytes() for part in parts)


def contents(page: Path) -> Any:
    return json.loads((page / "web.json").read_text("utf-8"))


def test_parts_have_the_size_and_hash_that_are_listed(artifact: Path, fake_modules: Path, tmp_path: Path) -> None:
    report = export_web(artifact, tmp_path / "page", modules=fake_modules, part_mib=1)
    files = {path.name: path.read_bytes() for path in (tmp_path / "page" / "files").iterdir()}
    assert {hashlib.sha256(data).hexdigest() for data in files.values()} == files.keys()
    assert report["adapters"] == sorted(METHODS) and report["model_bytes"] == sum(map(len, files.values()))
    found = contents(tmp_path / "page")
    listed = sorted(p.relative_to(tmp_path / "page").as_posix() for p in (tmp_path / "page").rglob("*") if p.is_file())
    assert found["written"] == listed
    parts = [found["neutral"], *found["graphs"].values(), *found["weights"].values()]
    assert all(len(files[part["sha256"]]) == part["bytes"] <= 1 << 20 for each in parts for part in each)


def test_long_files_are_cut(tmp_path: Path) -> None:
    from lorac.web import write_parts

    entries = write_parts(tmp_path, 10, b"abcdefgh", b"", memoryview(b"ijklmnopqrstuvwxyz"))
    assert [entry["bytes"] for entry in entries] == [10, 10, 6]
    assert b"".join((tmp_path / str(e["sha256"])).read_bytes() for e in entries) == b"abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("graph", ["float", "codes"])
@pytest.mark.parametrize("name", [None, "lora", "dora", "ia3"])
def test_its_program_computes_as_the_artifact(
    artifact: Path, page: Path, tmp_path: Path, graph: str, name: str | None
) -> None:
    found = contents(page)
    (tmp_path / "model.onnx").write_bytes(read(page, found["graphs"][graph]))
    for file, parts in found["weights"].items():
        (tmp_path / file).write_bytes(read(page, parts))
    settings = ort.SessionOptions()
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(tmp_path / "model.onnx", settings)
    slots = load(read(page, found["neutral"]))
    assert slots.keys() == found["slots"].keys()
    if name is not None:
        path = tmp_path / "own.onnx_adapter"
        path.write_bytes(read(page, found["adapters"][name]["content"]))
        adapter = ort.AdapterFormat.read_adapter(str(path))  # its tensors lie in it
        slots |= {key: value.numpy().copy() for key, value in adapter.get_parameters().items()}
    given = {
        "input_ids": np.array([IDS]),
        "logits_to_keep": np.arange(len(IDS))[None],
        "past_lengths": np.zeros(1, np.int32),
        "new_lengths": np.array([len(IDS)], np.int32),
    }
    caches = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    given |= {value.name: np.zeros((1, value.shape[1], 8, value.shape[3]), np.float32) for value in caches}
    logits = session.run(["logits"], {**given, **slots})[0]
    ids = torch.tensor([IDS])
    expected = lorac.load(artifact)(input_ids=ids, attention_mask=torch.ones_like(ids), adapters=name).logits
    assert_close(torch.from_numpy(logits), expected)


def test_an_older_page_is_replaced_and_other_folders_stay(
    page: Path, artifact: Path, fake_modules: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(page, copy)
    older = contents(copy)
    older["written"].append("files/older")
    (copy / "files" / "older").write_text("x", encoding="utf-8")
    (copy / "web.json").write_text(json.dumps(older), encoding="utf-8")
    export_web(artifact, copy, modules=fake_modules)
    assert not (copy / "files" / "older").exists() and contents(copy) == contents(page)
    (copy / "notes.txt").write_text("mine", encoding="utf-8")
    export_web(artifact, copy, modules=fake_modules)
    assert (copy / "notes.txt").read_text("utf-8") == "mine"
    before = sorted(artifact.rglob("*"))
    with pytest.raises(ArtifactError, match="is not a page of export-web"):
        export_web(artifact, artifact, modules=fake_modules)
    assert sorted(artifact.rglob("*")) == before


def test_rejects_packages_of_other_releases(artifact: Path, fake_modules: Path, tmp_path: Path) -> None:
    shutil.copytree(fake_modules, tmp_path / "modules")
    (tmp_path / "modules" / "onnxruntime-web" / "package.json").write_text('{"version": "1.2.3"}', encoding="utf-8")
    with pytest.raises(Unavailable, match=r"a page takes onnxruntime-web [\d.]+, and '.*' has 1\.2\.3"):
        export_web(artifact, tmp_path / "page", modules=tmp_path / "modules")
    with pytest.raises(OptionError, match="part_mib cannot be 0"):
        export_web(artifact, tmp_path / "page", part_mib=0)
    assert not (tmp_path / "page").exists()


def test_rejects_programs_without_a_cache_and_of_other_targets(
    artifact: Path, fake_modules: Path, tmp_path: Path
) -> None:
    compiled = lorac.compile(ZOO["tiny_llama"].fresh(), {}, target="onnxruntime", self_test=False)
    compiled.save(tmp_path / "plain")
    lorac.compile(torch.nn.Linear(4, 4), {}, example_inputs=(torch.ones(1, 4),)).save(tmp_path / "linear")
    cases = {"plain": "the program keeps no cache", "linear": "was compiled for eager"}
    for folder, reason in cases.items():
        with pytest.raises(Unavailable, match=reason):
            export_web(tmp_path / folder, tmp_path / "page", modules=fake_modules)
    assert not (tmp_path / "page").exists()


def test_the_policy_names_the_map_of_imports() -> None:
    text = (PACKAGE.parent / "page" / "index.html").read_text("utf-8")
    (script,) = re.findall(r'<script type="importmap">(.*?)</script>', text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in text, "write this hash into the page's policy"
    from lorac.web.node_packages import _FILES

    named = {path.removeprefix("./vendor/") for path in json.loads(script)["imports"].values()}
    assert named <= {f"{package}/{file}" for package, files in _FILES.items() for file in files}
    assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|Storage|cookie", text)


def test_the_module_has_at_most_500_lines() -> None:
    files = [PACKAGE / "lorac-web.js", PACKAGE.parent / "page" / "page.js"]
    assert sum(len(file.read_text("utf-8").splitlines()) for file in files) <= 500
