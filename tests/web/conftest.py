"""Pages of a tiny model of letters, with the packages of npm or without."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.testing import adapter_away
from lorac.web import export_web
from tests.letters import CHAT, letters
from tests.zoo import ZOO

PACKAGE = Path(lorac.__file__).parent / "web" / "package"
IDS = [5, 17, 99, 3, 64, 8]
METHODS = {
    "lora": lorac.LoRA(r=3, targets=["q_proj", "k_proj", "o_proj", "down_proj"]),
    "dora": lorac.DoRA(r=2, targets=["q_proj", "v_proj"]),
    "ia3": lorac.IA3(targets=["k_proj", "down_proj"], feedforward=["down_proj"]),
}


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in int4 with three adapters. Its products round nothing, as those of browsers."""
    model, ids = ZOO["tiny_llama"].fresh(), torch.tensor([IDS])
    adapters = [adapter_away(m, model, ids, name=name, seed=i) for i, (name, m) in enumerate(METHODS.items())]
    options: dict[str, Any] = {"weights": "int4", "block_size": 16, "accuracy_level": 1, "self_test": False}
    compiled = lorac.compile(model, adapters, target="onnxruntime", cache=True, active=None, **options)
    folder = tmp_path_factory.mktemp("web") / "artifact"
    compiled.save(folder, tokenizer=letters(CHAT))
    return folder


@pytest.fixture(scope="session")
def fake_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages of the right names and releases, and empty."""
    from lorac.web.node_packages import _FILES

    folder = tmp_path_factory.mktemp("fake_modules")
    for name, release in json.loads((PACKAGE / "package.json").read_text("utf-8"))["dependencies"].items():
        for file in ("package.json", *_FILES[name]):
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_text(json.dumps({"version": release}), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def page(artifact: Path, fake_modules: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page without the packages."""
    folder = tmp_path_factory.mktemp("page") / "page"
    export_web(artifact, folder, modules=fake_modules)
    return folder


@pytest.fixture(scope="session")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lorac-web and what it depends on, as npm installs them."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs Node.js with npm")
    folder = tmp_path_factory.mktemp("node")
    shutil.copytree(PACKAGE, folder / "package")
    (folder / "package.json").write_text("{}", encoding="utf-8")
    install = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--install-links", "./package"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"npm has no packages here: {done.stderr[-200:]}")
    return folder / "node_modules"
