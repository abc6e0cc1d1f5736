"""ONNX Runtime's adapter files: those that it reads and writes itself, and files with false offsets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

import lorac
from lorac.storage.onnx_adapter import read_onnx_adapter, write_onnx_adapter
from tests.formats.oracle import assert_equal
from tests.refusing import refuses
from tests.zoo import ZOO

LAYER = "model.layers.0.self_attn.q_proj"


def write(path: Path, **tensors: np.ndarray) -> Path:
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in tensors.items()})
    adapter.export_adapter(str(path))
    return path


def read_by_ort(path: Path) -> dict[str, np.ndarray]:
    found = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
    return {name: value.numpy() for name, value in found.items()}


def test_onnx_runtime_reads_saved_files(tmp_path: Path) -> None:
    model = ZOO["tiny_llama"].model()
    adapter = lorac.compile(model, {"a": lorac.LoRA(r=3, alpha=6, targets=["q_proj", "down_proj"])}).adapters["a"]
    for tensors in adapter.tensors.values():
        for tensor in tensors.values():
            tensor.data.normal_(generator=torch.Generator().manual_seed(0))
    lorac.save_adapter(adapter, tmp_path / "a.onnx_adapter", "onnx_adapter", model)
    ort.LoraAdapter().Load(str(tmp_path / "a.onnx_adapter"))
    stored, own = read_by_ort(tmp_path / "a.onnx_adapter"), adapter.tensors[LAYER]
    assert np.array_equal(stored[f"{LAYER}.lora_A.weight"], own["lora_A"].detach().T.numpy())
    assert np.array_equal(stored[f"{LAYER}.lora_B.weight"], 2 * own["lora_B"].detach().T.numpy())
    for given in (model, None):
        again = lorac.load_adapter(tmp_path / "a.onnx_adapter", given)
        lorac.save_adapter(again, tmp_path / "b.onnx_adapter", "onnx_adapter", model)
        assert_equal(lorac.load_adapter(tmp_path / "b.onnx_adapter", given, name="a"), again)
        assert (tmp_path / "a.onnx_adapter").read_bytes() == (tmp_path / "b.onnx_adapter").read_bytes()


def test_reads_the_names_that_olive_leaves(tmp_path: Path) -> None:
    """Olive takes PEFT's prefix off paths that begin with "model." alone."""
    model = ZOO["tiny_llama"].model()
    a, b, head = (np.ones(shape, np.float32) for shape in ((64, 2), (2, 96), (2, model.lm_head.out_features)))
    named = {f"{LAYER}.lora_A.weight": a, f"{LAYER}.lora_B.weight": b}
    named |= {"base_model.model.lm_head.lora_A.weight": a, "base_model.model.lm_head.lora_B.weight": head}
    assert {*lorac.load_adapter(write(tmp_path / "a.onnx_adapter", **named), model).tensors} == {LAYER, "lm_head"}
    twice = write(tmp_path / "b.onnx_adapter", **named, **{"lm_head.lora_A.weight": a})
    with refuses("corrupt_file", match="with and without 'base_model.model.'"):
        lorac.load_adapter(twice, model)


@pytest.mark.medium("session/test_artifact.py: it runs alone, with an adapter file")
def test_a_program_that_lorac_saved(tmp_path: Path) -> None:
    """Its slots have A and B too."""
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 5)), torch.randn(2, 8)
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=2, alpha=6, targets=["0", "2"])}, "onnxruntime", (x,))
    for tensors in compiled.adapters["a"].tensors.values():
        tensors["lora_B"].data.normal_()
    adapter = compiled.adapters["a"]
    compiled = lorac.compile(model, {"a": adapter}, "onnxruntime", (x,))
    compiled.save(tmp_path / "it")
    read = lorac.load_adapter(tmp_path / "it/adapters/a.onnx_adapter", model)
    for path, own in adapter.tensors.items():
        assert torch.equal(read.tensors[path]["lora_B"], 3 * own["lora_B"])
        assert torch.equal(read.tensors[path]["lora_A"], own["lora_A"])


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_shapes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.arange(6).reshape(2, 3).to(dtype), "b": torch.ones((), dtype=dtype), "c": torch.ones(0, 4)}
    write_onnx_adapter(tmp_path / "x", tensors)
    with (tmp_path / "x").open("rb") as file:
        read = read_onnx_adapter(file, AssertionError)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor), name
        assert read[name].dtype is tensor.dtype


@pytest.mark.medium("the campaign of damaged files, and test_strange_tensors.py")
def test_rejects_truncated_files_and_harmful_bit_flips(tmp_path: Path) -> None:
    factors = {"x.lora_A.weight": np.ones((4, 2), np.float32), "x.lora_B.weight": np.ones((2, 3), np.float32)}
    content = write(tmp_path / "sound", **factors).read_bytes()
    path = tmp_path / "a.onnx_adapter"
    for length in range(8, len(content), 5):
        path.write_bytes(content[:length])
        with refuses("corrupt_file"):
            lorac.load_adapter(path)
    for at in range(len(content)):
        for value in (0, 255, content[at] ^ 1, content[at] ^ 128):
            path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
            try:
                lorac.load_adapter(path)
            except lorac.LoracError:
                continue


def test_a_shape_that_the_values_do_not_fill(tmp_path: Path) -> None:
    """ONNX Runtime does not compare them."""
    path = write(tmp_path / "a.onnx_adapter", **{"x.lora_A.weight": np.ones((77, 2), np.float32)})
    content = path.read_bytes()
    assert content.count((77).to_bytes(8, "little")) == 1
    path.write_bytes(content.replace((77).to_bytes(8, "little"), (10**9).to_bytes(8, "little")))
    with refuses("corrupt_file", match="but has 616 bytes"):
        lorac.load_adapter(path)


def test_rejects_saving_adapters_that_the_format_cannot_hold(tmp_path: Path) -> None:
    model = ZOO["plain_conv"].model()
    [conv] = [path for path, site in lorac.sites(model).items() if site.conv is not None][:1]
    adapter = lorac.compile(model, {"a": lorac.LoRA(r=2, targets=[conv])}, example_inputs=ZOO["plain_conv"].inputs())
    with refuses("site_unsupported", match=conv):
        lorac.save_adapter(adapter.adapters["a"], tmp_path / "a", "onnx_adapter", model)
    with refuses("base_needed"):
        lorac.save_adapter(adapter.adapters["a"], tmp_path / "a", "onnx_adapter")
