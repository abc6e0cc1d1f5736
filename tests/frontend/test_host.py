"""``Host.of`` chooses the library of a model; an installed package may add one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import lorac
from examples.pipelines import tiny_unet
from lorac.frontend.host import GROUP, Host, PlainHost
from lorac.frontend.hosts.diffusers import DiffusersHost
from lorac.frontend.hosts.transformers import TransformersHost
from lorac.testing import assert_close

PACKAGE = """
import torch
from torch import nn
from lorac.frontend.host import Host

class Sound(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
    def forward(self, frames, gain=1.0):
        return self.layer(frames) * gain

class SoundHost(Host):
    @classmethod
    def recognises(cls, model):
        return isinstance(model, Sound)
    def example_inputs(self):
        return {"frames": self.make_wave((2, 5, 4))}
    def axes(self, name, value, inputs):
        return {1: "length"} if name == "frames" else {}
"""


def test_recognises_the_libraries_of_lorac() -> None:
    bert = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    assert isinstance(Host.of(transformers.BertModel(bert)), TransformersHost)
    assert isinstance(Host.of(nn.Linear(2, 3)), PlainHost)
    pytest.importorskip("diffusers")
    assert isinstance(Host.of(tiny_unet(16)), DiffusersHost)


def test_finds_the_sequences_of_a_model_inside_another() -> None:
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    wrapped = nn.ModuleDict({"bert": transformers.BertModel(config)})
    assert isinstance(Host.of(wrapped).find_sequence_host(), TransformersHost)
    assert Host.of(nn.Linear(2, 3)).find_sequence_host() is None


def _install(folder: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    (folder / "sounds.py").write_text(PACKAGE)
    installed = folder / "sounds-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: sounds\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(f"[{GROUP}]\nsounds = sounds:{host}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "sounds", raising=False)


@pytest.mark.parametrize("host", ["Missing", "Sound"])
def test_leaves_out_a_host_that_cannot_be_imported(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, monkeypatch, host)
    with pytest.warns(lorac.LoracWarning, match="the host 'sounds' of another package is left out"):
        assert isinstance(Host.of(nn.Linear(2, 3)), PlainHost)
    assert isinstance(Host.of(nn.Linear(2, 3)), PlainHost)


@torch.no_grad()
def test_compiles_a_model_of_an_installed_librarys_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, monkeypatch, "SoundHost")
    import sounds  # type: ignore[import-not-found]  # written above

    model = sounds.Sound().eval()
    assert type(Host.of(model)) is sounds.SoundHost
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=1, targets=["layer"])}, target="onnxruntime")
    frames = torch.randn(3, 9, 4)
    assert_close(compiled(frames), model(frames))
