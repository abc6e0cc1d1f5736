"""LoRAs in GGUF: llama.cpp's names and order of rows, its one alpha, and files that lie."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

import lorac
from lorac.formats.gguf.file import read_gguf
from lorac.formats.reading import AdapterFile
from lorac.limits import charge_reading
from lorac.testing import assert_close
from tests.formats.oracle import assert_equal
from tests.refusing import refuses
from tests.zoo import ZOO

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


def model() -> transformers.PreTrainedModel:
    return ZOO["tiny_llama"].model()


def moved(variant: lorac.LoRA, of: torch.nn.Module | None = None) -> lorac.Adapter:
    adapter = lorac.compile(of or model(), {"a": variant}).adapters["a"]
    generator = torch.Generator().manual_seed(0)
    for tensors in adapter.tensors.values():
        for tensor in tensors.values():
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
    return adapter


def read_by_gguf(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return {tensor.name: tensor.data.copy() for tensor in reader.tensors}, fields


def permuted(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows as llama.cpp's converter does those of weights."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def test_the_gguf_library_reads_saved_files(tmp_path: Path) -> None:
    adapter = moved(lorac.LoRA(r=3, alpha=6, targets=["q_proj", "k_proj", "down_proj", "embed_tokens"]))
    lorac.save_adapter(adapter, tmp_path / "a.gguf", "gguf", model())
    tensors, fields = read_by_gguf(tmp_path / "a.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 6
    config = model().config
    for layer, name, heads in ((Q, "attn_q", config.num_attention_heads), (K, "attn_k", config.num_key_value_heads)):
        own = adapter.tensors[layer]
        change = torch.from_numpy(tensors[f"blk.0.{name}.weight.lora_b"] @ tensors[f"blk.0.{name}.weight.lora_a"])
        assert_close(change, permuted(own["lora_B"] @ own["lora_A"], heads))
    table = adapter.tensors["model.embed_tokens"]
    assert torch.equal(torch.from_numpy(tensors["token_embd.weight.lora_a"]), table["lora_A"].T)
    assert_equal(lorac.load_adapter(tmp_path / "a.gguf", model()), adapter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = moved(lorac.LoRA(r=2, targets=["o_proj"]))
    for tensors in adapter.tensors.values():
        tensors |= {name: tensor.detach().to(dtype) for name, tensor in tensors.items()}
    lorac.save_adapter(adapter, tmp_path / "a.gguf", "gguf", model())
    assert {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors} == {
        {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    }
    assert_equal(lorac.load_adapter(tmp_path / "a.gguf", model()), adapter)


def test_rejects_other_dtypes(tmp_path: Path) -> None:
    adapter = moved(lorac.LoRA(r=2, targets=["o_proj"]))
    for tensors in adapter.tensors.values():
        tensors |= {name: tensor.detach().double() for name, tensor in tensors.items()}
    with refuses("unsupported_field", match="float64"):
        lorac.save_adapter(adapter, tmp_path / "a.gguf", "gguf", model())


@pytest.mark.medium("one field", keep=["fields0"])
@pytest.mark.parametrize(
    "fields",
    [
        {"r": 2, "alpha": 3, "rank_pattern": {"down_proj": 4}, "alpha_pattern": {"q_proj": 5}},
        {"r": 4, "alpha": 6, "rslora": True},
        {"r": 2, "alpha": 0},
    ],
)
def test_scales_are_kept(tmp_path: Path, fields: dict[str, Any]) -> None:
    """One alpha for all layers, or all scales in B; an alpha of 0 means the scale 1 in llama.cpp."""
    adapter = moved(lorac.LoRA(targets=["q_proj", "down_proj"], **fields))
    lorac.save_adapter(adapter, tmp_path / "a.gguf", "gguf", model())
    again = lorac.load_adapter(tmp_path / "a.gguf", model())
    for path, own in adapter.tensors.items():
        other = again.tensors[path]
        first = adapter.variant.at_path(path).scale * own["lora_B"] @ own["lora_A"]
        assert_close(again.variant.at_path(path).scale * other["lora_B"] @ other["lora_A"], first)


def test_models_without_reordered_rows(tmp_path: Path) -> None:
    for entry, target in (("tiny_gpt2", "c_attn"), ("tiny_bert", "query")):
        host = ZOO[entry].model()
        adapter = moved(lorac.LoRA(r=2, targets=[target]), host)
        lorac.save_adapter(adapter, tmp_path / f"{entry}.gguf", "gguf", host)
        assert_equal(lorac.load_adapter(tmp_path / f"{entry}.gguf", host, name="a"), adapter)


def test_q8_0_is_unpacked(tmp_path: Path) -> None:
    values = torch.randn(4, 64).numpy()
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("x", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    finish(writer)
    expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    _, tensors = read_gguf(AdapterFile(tmp_path / "a.gguf"))
    assert np.array_equal(tensors["x"].numpy(), expected)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(path: Path, change: Callable[[gguf.GGUFWriter], None] = lambda _: None, **fields: str) -> Path:
    """Write an adapter of one layer by the library, with something else in it."""
    expected = {"general.type": "adapter", "adapter.type": "lora", **fields}
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in expected.items():
        writer.add_string(key, value)
    writer.add_float32("adapter.lora.alpha", 4.0)
    site = lorac.sites(model())["model.layers.0.self_attn.o_proj"]
    writer.add_tensor("blk.0.attn_output.weight.lora_a", np.ones((2, site.in_features), np.float32))
    writer.add_tensor("blk.0.attn_output.weight.lora_b", np.ones((site.out_features, 2), np.float32))
    change(writer)
    finish(writer)
    return path


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (lambda w: w.add_tensor("blk.0.attn_norm.weight", np.ones(3, np.float32)), "unused_tensors", "attn_norm"),
        (lambda w: w.add_tensor("blk.7.attn_q.weight.lora_a", np.ones((2, 3), np.float32)), "site_not_found", "blk.7"),
        (lambda w: w.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((2, 3), np.float32)), "corrupt_file", "attn_q"),
        (lambda w: w.add_array("adapter.alora.invocation_tokens", [1, -2]), "corrupt_file", "invocation_tokens"),
        (lambda w: w.add_string("adapter.alora.invocation_tokens", "1"), "corrupt_file", "invocation_tokens"),
        (lambda w: w.add_string("adapter.gate", "x"), "unknown_field", "adapter.gate"),
    ],
)
def test_rejects_unknown_fields_and_tensors(
    tmp_path: Path, change: Callable[[gguf.GGUFWriter], None], code: str, said: str
) -> None:
    assert lorac.load_adapter(write(tmp_path / "sound.gguf"), model()).sites
    with refuses(code, match=said):
        lorac.load_adapter(write(tmp_path / "a.gguf", change), model())


def test_keeps_invocation_tokens(tmp_path: Path) -> None:
    change = lambda writer: writer.add_key_value(  # noqa: E731  (llama.cpp's converter gives the types)
        "adapter.alora.invocation_tokens", [5, 3, 5], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
    )
    adapter = lorac.load_adapter(write(tmp_path / "a.gguf", change), model())
    assert adapter.variant.invocation_tokens == (5, 3, 5)
    lorac.save_adapter(adapter, tmp_path / "b.gguf", "gguf", model())
    assert lorac.load_adapter(tmp_path / "b.gguf", model()).variant == adapter.variant
    stored = gguf.GGUFReader(tmp_path / "b.gguf").fields["adapter.alora.invocation_tokens"]
    assert stored.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]


def test_files_of_something_else(tmp_path: Path) -> None:
    with refuses("unsupported_field", match="general.type"):
        lorac.load_adapter(write(tmp_path / "a.gguf", **{"general.type": "model"}), model())
    with refuses("base_needed"):
        lorac.load_adapter(write(tmp_path / "b.gguf"))
    with refuses("unsupported_field", match="architecture 'llama'"):
        lorac.load_adapter(tmp_path / "b.gguf", ZOO["tiny_gpt2"].model())
    with refuses("unsupported_field", match="of type 'vit'"):
        lorac.load_adapter(tmp_path / "b.gguf", ZOO["tiny_vit"].model())


def test_rejects_saving_methods_that_llama_cpp_lacks(tmp_path: Path) -> None:
    for variant in (
        lorac.DoRA(r=2, targets=["q_proj"]),
        lorac.LoRA(r=2, targets=["q_proj"], lora_bias=True),
        lorac.LoRA(r=2, targets=["q_proj"], modules_to_save=["norm"]),
    ):
        with refuses("unsupported_field"):
            lorac.save_adapter(moved(variant), tmp_path / "a.gguf", "gguf", model())
    with refuses("base_needed"):
        lorac.save_adapter(moved(lorac.LoRA(r=2, targets=["q_proj"])), tmp_path / "a.gguf", "gguf")
    tied = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**model().config.to_dict(), **TIED}))
    with refuses("site_unsupported", match="shares its weight with 'lm_head'"):
        lorac.save_adapter(moved(lorac.LoRA(r=2, targets=["embed_tokens"]), tied), tmp_path / "a.gguf", "gguf", tied)


TIED = {"tie_word_embeddings": True}


@pytest.mark.medium("test_strange_tensors.py and the campaign of damaged files")
def test_rejects_every_truncation(tmp_path: Path) -> None:
    content = write(tmp_path / "sound.gguf").read_bytes()
    for length in range(0, len(content), 3):
        (tmp_path / "a.gguf").write_bytes(content[:length])
        with refuses("unknown_format" if length < 4 else "corrupt_file"):
            lorac.load_adapter(tmp_path / "a.gguf", model())


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (8, 2**60, "a text has"),  # tensors: what follows is read as one
        (16, 2**60, "a text has"),  # fields
        (24, 2**40, "a text has"),  # the length of the first key
        (4, 77, "version"),
    ],
)
def test_numbers_that_lie(tmp_path: Path, at: int, value: int, said: str) -> None:
    content = bytearray(write(tmp_path / "sound.gguf").read_bytes())
    content[at : at + 8] = struct.pack("<Q", value)
    (tmp_path / "a.gguf").write_bytes(content)
    with refuses("corrupt_file" if at != 4 else "unsupported_field", match=said):
        lorac.load_adapter(tmp_path / "a.gguf", model())


@pytest.mark.parametrize(
    ("tensors", "fields"),
    [
        pytest.param(0, struct.pack("<Q1sIB", 1, b"a", 0, 7), id="fields"),
        pytest.param(1, b"", id="tensors"),
    ],
)
def test_time_is_counted_for_each(tmp_path: Path, tensors: int, fields: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, bool(fields)) + fields)
    with lorac.budget(seconds=0.0), refuses("over_budget", match="a.gguf' takes longer than 0 s"):
        charge_reading(path, lambda: read_gguf(AdapterFile(path)))
