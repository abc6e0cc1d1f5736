"""AdapterHub's folders of methods on layers' weights and of unions: rejected ones, and those that lorac writes.

That they answer what the library answered is in ``test_adapterhub.py``.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import lorac
from lorac.testing import assert_close
from tests.formats.adapterhub_files import FILES, changed, inputs, main, model, refused, split
from tests.limits import assert_apart
from tests.refusing import refuses


@pytest.fixture
def of_layers(tmp_path):
    """Return a function that copies folders to be damaged."""
    return lambda folder: Path(shutil.copytree(FILES / folder, tmp_path / split(folder)[1]))


@pytest.mark.parametrize(
    ("folder", "fields", "error", "match"),
    [
        ("bert/lora", {"use_gating": True}, lorac.FormatError, "use_gating=True(.|\n)*use_gating=False"),
        ("bert/lora", {"new_field": 1}, lorac.FormatError, "new_field"),
        ("bert/lora", {"weights_sharpness": 0.1}, lorac.FormatError, "weights_sharpness"),
        ("bert/lora", {"r": 2}, lorac.AdapterError, "lora_A at 'bert.encoder.layer.0.*expected \\(2, "),
        ("bert/lora", {"r": "2"}, lorac.FormatError, "r='2'(.|\n)*int"),
        ("bert/lora", {"r": 0}, lorac.FormatError, "r=0"),
        ("bert/lora", {"attn_matrices": ["k", "o"]}, lorac.FormatError, "'o'(.|\n)*q, k, v"),
        ("bert/lora", {"attn_matrices": ["q", "k"]}, lorac.FormatError, "lacks 'lora_A' at .*query"),
        ("bert/lora", {"leave_out": []}, lorac.FormatError, "lacks 'lora_A' at .*layer.1"),
        ("bert/lora", {"output_lora": False}, lorac.FormatError, "output.dense"),
        ("bert/lora", {"composition_mode": "mul"}, lorac.FormatError, "composition_mode='mul'"),
        ("bert/lora", {"composition_mode": "scale"}, lorac.FormatError, "'scale' with r=3"),
        ("bert/lora", {"use_dora": True, "alpha": 3}, lorac.FormatError, "DoRA at .* bias"),
        ("llama/dora", {"alpha": 1}, lorac.FormatError, "alpha / r = 0.5"),
        ("llama/tasks", {"task_specific_matrix_type": "linear"}, lorac.FormatError, "'linear'"),
        ("llama/tasks", {"n_up_projection": 2}, lorac.AdapterError, "lora_B at"),
        ("gpt2/lora", {"vera_d": 0.1}, lorac.FormatError, "c_attn.* packs q, k, v"),
        ("gpt2/lora", {"attn_matrices": ["v"]}, lorac.AdapterError, "c_attn.*expected \\(16, 2"),
    ],
)
def test_a_configuration_of_layers_that_means_something_else(of_layers, folder, fields, error, match):
    copy = of_layers(folder)
    changed(copy, **fields)
    refused(copy, error, match, split(folder)[0])


def test_rejects_a_union_with_unsupported_parts(of_layers):
    copy = of_layers("bert/union")
    prefix = {"architecture": "prefix_tuning", "prefix_length": 3}
    parts = json.loads((copy / "adapter_config.json").read_text())["config"]["configs"]
    changed(copy, configs=[*parts, prefix])
    refused(copy, lorac.FormatError, "architecture 'prefix_tuning', which puts keys and values")
    changed(copy, configs=[parts[0], parts[0]])
    refused(copy, lorac.SiteError, "lora and lora both target")
    changed(copy, configs=[])
    refused(copy, lorac.FormatError, "describes a union, and has no configs")


PARTS = {"k": lorac.LoRA(r=2, alpha=3)}
FRESH = {
    "vit": (lorac.LoRA(r=2, alpha=3, rslora=True, targets=["fc2"]), torch.float16),
    "gpt2": (
        lorac.Union(
            parts=(
                lorac.Split(parts=PARTS, dropout=0.1, targets=["c_attn"]),
                lorac.LoRA(r=2, alpha=3, dropout=0.1, targets=["mlp.c_proj"]),
            )
        ),
        torch.float32,
    ),
}
"""Adapters that no library wrote, by model, each with its dtype."""


@pytest.mark.parametrize("name", FRESH)
@torch.no_grad()
def test_a_fresh_adapter_of_layers_goes_there_and_back(name, tmp_path):
    host, (variant, dtype) = model(name), FRESH[name]
    adapter = drawn(lorac.compile(host, {"a": variant}).adapters["a"], dtype)
    lorac.save_adapter(adapter, tmp_path / "a", format="adapterhub", model=host)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["config"]
    assert config["dtype"] == (None if dtype is torch.float32 else "float16")
    again = lorac.load_adapter(tmp_path / "a", host)
    both = lorac.compile(host, {"one": adapter, "other": again}, active=None)
    answers = [main(both(**inputs(name), adapters=key)) for key in ("one", "other", None)]
    assert_close(answers[1], answers[0])
    assert_apart(answers[0], answers[2])
    assert again.numel() == adapter.numel()


def drawn(adapter, dtype):
    """Return the adapter with tensors away from their initialisation."""
    generator = torch.Generator().manual_seed(3)
    for at in adapter.tensors.values():
        at |= {n: (t + 0.3 * torch.randn(t.shape, generator=generator)).detach().to(dtype) for n, t in at.items()}
    return adapter


@pytest.mark.parametrize(
    ("variant", "match"),
    [
        (lorac.LoRA(r=2, targets=["attention.output.dense"]), "AdapterHub does not adapt"),
        (lorac.LoRA(r=2, targets=["query"], lora_bias=True), "has 'lora' at"),
        (lorac.LoRA(r=2, targets=["query", "key"], rank_pattern={"key": 3}), "one rank, scale and dropout"),
        (lorac.LoRA(r=2, targets=["layer.0.attention.self.query", "layer.1.attention.self.key"]), "layers of a kind"),
        (lorac.IA3(targets=["intermediate.dense"], feedforward=["dense"]), "has 'ia3' at"),
        (lorac.DoRA(r=2, targets=["query"]), "has 'dora' at"),
    ],
)
def test_rejects_saving_layers_that_the_format_cannot_hold(variant, match, tmp_path):
    adapter = lorac.compile(model("bert"), {"a": variant}).adapters["a"]
    with refuses("unsupported_field", match=match):
        lorac.save_adapter(adapter, tmp_path / "x", format="adapterhub", model=model("bert"))
    assert not (tmp_path / "x").exists()


def test_a_packed_layer_is_written_by_its_parts(tmp_path):
    variants = (
        lorac.LoRA(r=2, targets=["c_attn"]),
        lorac.Split(parts={"q": lorac.LoRA(r=2)}, groups=2, targets=["c_attn"]),
    )
    for variant in variants:
        adapter = lorac.compile(model("gpt2"), {"a": variant}).adapters["a"]
        with refuses("unsupported_field", match="separately and by one method"):
            lorac.save_adapter(adapter, tmp_path / "x", format="adapterhub", model=model("gpt2"))
