"""Files of mlx-lm and llama.cpp against their own answers (``make_tools.py``)."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lorac
from lorac.testing import assert_parity
from tests.formats.oracle import assert_equal
from tests.limits import assert_apart
from tests.refusing import refuses

HERE = Path(__file__).parent / "tools"
IDS = [5, 9, 33, 7, 21, 12]
MLX = ("mlx_lora", "mlx_dora", "mlx_full")


@functools.cache
def tiny() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig.from_pretrained(HERE)
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(load_file(HERE / "model.safetensors"))
    return model


def answer(adapter: lorac.Adapter | None) -> torch.Tensor:
    model = tiny() if adapter is None else lorac.compile(tiny(), {"a": adapter})
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([IDS])).logits[0, -1], -1)


def assert_same(adapter: lorac.Adapter, name: str, base: str) -> None:
    """Compare an adapter's answer with a tool's, whose own base may round differently."""
    answers = load_file(HERE / "answers.safetensors")
    assert_apart(answers[name], answers[base])
    assert_parity(answer(adapter), answers[name], answers[base], own_base=answer(None))


@pytest.mark.parametrize("name", MLX)
def test_mlx_computes_the_same(name: str, tmp_path: Path) -> None:
    adapter = lorac.load_adapter(HERE / name, tiny())
    assert_same(adapter, name, "base")
    lorac.save_adapter(adapter, tmp_path / "again", "mlx", tiny())
    assert_equal(lorac.load_adapter(tmp_path / "again", tiny(), name=adapter.name), adapter)
    stored = (load_file(folder / "adapters.safetensors") for folder in (HERE / name, tmp_path / "again"))
    first, second = stored
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_llama_cpp_computes_the_same(tmp_path: Path) -> None:
    adapter = lorac.load_adapter(HERE / "llama_cpp.gguf", tiny())
    assert_same(adapter, "llama_cpp", "llama_cpp_base")
    lorac.save_adapter(adapter, tmp_path / "again.gguf", "gguf", tiny())
    assert (tmp_path / "again.gguf").read_bytes() == (HERE / "llama_cpp.gguf").read_bytes()


def _mlx(tmp_path: Path, name: str = "mlx_lora", **fields: object) -> Path:
    """Return a copy of mlx-lm's folder with other fields."""
    folder = tmp_path / "it"
    folder.mkdir()
    config = json.loads((HERE / name / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    (folder / "adapters.safetensors").write_bytes((HERE / name / "adapters.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"lora_parameters": {"rank": 4, "scale": 1.0}}, "corrupt_file", "the rank 3"),
        ({"lora_parameters": {"rank": 3, "alpha": 6}}, "unsupported_field", "scale"),
        ({"lora_parameters": {"rank": 3, "scale": 1.0, "gates": 2}}, "unknown_field", "gates"),
        ({"fine_tune_type": "dora"}, "corrupt_file", "dora needs"),
        ({"fine_tune_type": "loha"}, "unsupported_field", "fine_tune_type"),
        ({"sharpness": 2}, "unknown_field", "sharpness"),
    ],
)
def test_fields_of_mlx_that_do_not_fit(tmp_path: Path, fields: dict[str, object], code: str, said: str) -> None:
    with refuses(code, match=said):
        lorac.load_adapter(_mlx(tmp_path, **fields), tiny())


def test_mlx_needs_the_model_only_for_full_weights(tmp_path: Path) -> None:
    assert lorac.load_adapter(HERE / "mlx_lora").sites
    with refuses("base_needed"):
        lorac.load_adapter(HERE / "mlx_full")


def test_rejects_mlx_dora_on_embeddings(tmp_path: Path) -> None:
    folder = _mlx(tmp_path, "mlx_dora")
    tensors = load_file(folder / "adapters.safetensors")
    layer = "model.layers.1.mlp.down_proj"
    table = {"lora_a": torch.ones(40, 3), "lora_b": torch.ones(3, 16), "m": torch.ones(40)}
    for leaf, tensor in table.items():
        del tensors[f"{layer}.{leaf}"]
        tensors[f"model.embed_tokens.{leaf}"] = tensor
    save_file(tensors, folder / "adapters.safetensors")
    for model in (None, tiny()):
        with refuses("unsupported_field", match="embed_tokens"):
            lorac.load_adapter(folder, model)


def test_rejects_saving_several_ranks_as_mlx(tmp_path: Path) -> None:
    variants = (
        lorac.LoRA(r=2, targets=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}),
        lorac.LoRA(r=2, targets=["q_proj"], lora_bias=True),
        lorac.VeRA(r=2, targets=["q_proj"]),
    )
    for variant in variants:
        adapter = lorac.compile(tiny(), {"a": variant}).adapters["a"]
        with refuses("unsupported_field"):
            lorac.save_adapter(adapter, tmp_path / "a", "mlx", tiny())
