"""A bad PEFT file raises a typed error that names the fault, its place and the nearest valid choice."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from lorac import AdapterError, FormatError, LoracError, SiteError, load_adapter, save_adapter
from tests.formats.oracle import assert_equal
from tests.peft_files import CONFIG, WEIGHTS, change_tensors, configure, make_peft, save_small
from tests.refusing import refuses
from tests.zoo import ZOO

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that saves a LoRA for a model of the zoo."""
    return lambda model="plain_mlp", **settings: save_small(tmp_path / "f", "LORA", model, **settings)


def refuse(kind: type[LoracError], folder: Path, match: str, model: nn.Module | None = None) -> LoracError:
    with pytest.raises(kind, match=match) as error:
        load_adapter(folder, model)
    assert type(error.value) is kind
    return error.value


def both(kind: type[LoracError], folder: Path, match: str, name: str = "plain_mlp") -> LoracError:
    """The same error with and without the model."""
    refuse(kind, folder, match)
    return refuse(kind, folder, match, ZOO[name].model())


# The tensors


def test_leftover_tensors(make: Make) -> None:
    folder = make()
    change_tensors(folder, {"model.up.lora_C.weight": torch.ones(2)})
    error = both(FormatError, folder, r"1 tensors: 'base_model.model.up.lora_C.weight'")
    assert error.nearest in ("base_model.model.up.lora_A.weight", "base_model.model.up.lora_B.weight")


def test_tensors_under_another_prefix(make: Make) -> None:
    folder = make()
    stored = load_file(folder / WEIGHTS)
    save_file({f"_orig_mod.{key}": tensor for key, tensor in stored.items()}, folder / WEIGHTS)
    both(FormatError, folder, "4 tensors: '_orig_mod.base_model")


def test_biases_that_bias_none_does_not_account_for(make: Make) -> None:
    folder = make("tiny_bert", target_modules=["query"], bias="all")
    configure(folder, bias="none")
    # Those of adapted sites are copies of the base by PEFT's own rule for embeddings.
    both(FormatError, folder, "LayerNorm.bias", "tiny_bert")


def test_magnitudes_without_dora_and_biases_without_lora_bias(make: Make) -> None:
    folder = make(use_dora=True)
    configure(folder, use_dora=False)
    both(FormatError, folder, "'magnitude' at '(up|down)' that its method does not use")
    folder = make(target_modules=["up"], lora_bias=True)
    configure(folder, lora_bias=False)
    both(FormatError, folder, "'lora_bias' at 'up' that its method does not use")


def test_missing_tensors(make: Make) -> None:
    folder = make()
    change_tensors(folder, {"model.up.lora_B.weight": None})
    both(AdapterError, folder, r"'up' do not belong together: lora_A.weight \(2, 10\)")
    change_tensors(folder, {"model.up.lora_A.weight": None})
    load_adapter(folder)  # only the model can tell
    refuse(FormatError, folder, "lacks tensors .* 'up'", ZOO["plain_mlp"].model())


def test_missing_magnitude(make: Make) -> None:
    folder = make(use_dora=True)
    change_tensors(folder, {"model.up.lora_magnitude_vector": None})
    both(AdapterError, folder, "lacks the tensor 'magnitude' at 'up'")


def test_missing_saved_module(make: Make) -> None:
    folder = make(target_modules=["up"], modules_to_save=["head"])
    change_tensors(folder, {"model.head.bias": None})
    refuse(FormatError, folder, r"lacks tensors .* 'head.bias'", ZOO["plain_mlp"].model())


def test_no_tensors_at_all(make: Make) -> None:
    folder = make()
    save_file({}, folder / WEIGHTS)
    refuse(FormatError, folder, "no tensor of its method")
    refuse(FormatError, folder, "'up', 'down'", ZOO["plain_mlp"].model())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_tensors(make: Make, value: float) -> None:
    folder = make()
    wrong = torch.ones(14, 2)
    wrong[3, 1] = value
    change_tensors(folder, {"model.up.lora_B.weight": wrong})
    both(AdapterError, folder, r"'up.lora_B' of adapter .* holds 1 NaN or infinite of 28")


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        ({"model.up.lora_A.weight": (2, 11)}, r"lora_A at 'up' has shape \(2, 11\), expected \(2, 10\)"),
        ({"model.up.lora_B.weight": (13, 2)}, r"lora_B at 'up' has shape \(13, 2\), expected \(14, 2\)"),
    ],
)
def test_rejects_shapes_that_do_not_fit_the_model(make: Make, shapes: dict[str, Any], match: str) -> None:
    folder = make()
    change_tensors(folder, {name: torch.ones(shape) for name, shape in shapes.items()})
    load_adapter(folder)
    refuse(AdapterError, folder, match, ZOO["plain_mlp"].model())


def test_rank_of_the_tensors_and_of_the_configuration(make: Make) -> None:
    folder = make(rank_pattern={"down": 3})
    configure(folder, rank_pattern={"down": 4})
    both(AdapterError, folder, r"lora_A at 'down' has shape \(3, 14\), expected \(4, 14\)")
    configure(folder, rank_pattern={}, r=3)
    both(AdapterError, folder, r"lora_A at 'up' has shape \(2, 10\), expected \(3, 10\)")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((2, 10), (14, 3)),
        ((2, 10), (14, 2, 1, 1)),
        ((2, 5, 2), (14, 2, 2)),
        ((20,), (28,)),
        ((4, 10), (14, 2)),
        ((0, 10), (14, 0)),
        ((0, 10), (14, 2)),
    ],
)
def test_pairs_that_do_not_belong_together(make: Make, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    folder = make()
    change_tensors(folder, {"model.up.lora_A.weight": torch.ones(a), "model.up.lora_B.weight": torch.ones(b)})
    both(AdapterError, folder, "'up' do not belong together")


def test_kinds_of_sites(make: Make) -> None:
    folder = make("plain_conv", target_modules=["stem"])
    stored = load_adapter(folder).tensors["stem"]
    turned = {
        "model.stem.lora_A.weight": stored["lora_A"].reshape(2, 6, 1, 9),
        "model.stem.lora_B.weight": stored["lora_B"].reshape(10, 2, 1, 1),
    }
    change_tensors(folder, turned)
    match = r"of a conv2d \(10, 6, 1, 9\) for 'stem', which is a conv2d \(10, 6, 3, 3\)"
    refuse(AdapterError, folder, match, ZOO["plain_conv"].model())
    change_tensors(folder, {key: tensor.flatten(1) for key, tensor in turned.items()})
    refuse(AdapterError, folder, r"of a linear \(10, 54\)", ZOO["plain_conv"].model())


def test_groups(make: Make) -> None:
    folder = make("plain_conv", target_modules=["grouped"])
    change_tensors(folder, {"model.grouped.lora_B.weight": torch.ones(8, 2, 1, 1)})
    refuse(AdapterError, folder, r"is a conv2d .* in 2 groups", ZOO["plain_conv"].model())


# The sites


def test_rejects_targets_that_match_nothing(make: Make) -> None:
    folder = make()
    configure(folder, target_modules=["upp"])
    error = refuse(SiteError, folder, "targets 'upp', which matches no site", ZOO["plain_mlp"].model())
    assert error.nearest == "up (1 sites, linear 10 -> 14)"


def test_another_model(make: Make) -> None:
    folder = make("tiny_llama", target_modules=["q_proj"])
    small = ZOO["tiny_llama"].fresh()
    del small.get_submodule("model.layers")[2]  # type: ignore[operator]
    error = refuse(SiteError, folder, "'model.layers.2.self_attn.q_proj', which is not a module", small)
    assert error.nearest == "model.layers.1.self_attn.q_proj"


def test_rejects_modules_that_are_not_sites(tmp_path: Path) -> None:
    def build(cls: Any) -> nn.Module:
        return nn.Sequential(cls(3, 4, 3, padding=1), nn.Conv1d(4, 3, 1))

    inputs = {"input": torch.randn(2, 3, 5)}
    config = LoraConfig(r=2, target_modules=["0", "1"])
    make_peft(build(nn.Conv1d), tmp_path, config, inputs=inputs)
    refuse(SiteError, tmp_path, "'0', a ConvTranspose1d that lorac cannot adapt", build(nn.ConvTranspose1d))


def test_sites_that_are_not_targeted(make: Make) -> None:
    folder = make()
    configure(folder, target_modules=["up"])
    both(FormatError, folder, "tensors for 'down', which its configuration does not target")
    configure(folder, target_modules=["up", "down"], exclude_modules=["down"])
    both(FormatError, folder, "tensors for 'down'")
    configure(folder, exclude_modules=None, ensure_weight_tying=True, target_modules=["up"])
    both(FormatError, folder, "tensors for 'down'.*\n.*ensure_weight_tying")


def test_replacements_the_model_does_not_have(make: Make) -> None:
    folder = make(target_modules=["up"], modules_to_save=["head"])
    change_tensors(folder, {"model.head.scale": torch.ones(3)})
    error = refuse(SiteError, folder, "replaces 'head.scale'", ZOO["plain_mlp"].model())
    assert str(error.nearest).startswith("head.")
    change_tensors(folder, {"model.head.scale": None, "model.head.bias": torch.ones(8)})
    refuse(AdapterError, folder, r"'head.bias' by a tensor of shape \(8,\)", ZOO["plain_mlp"].model())


@pytest.mark.medium("one field", keep=["rank_pattern"])
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
def test_patterns_that_backtrack_without_end(make: Make, field: str) -> None:
    endless = "((.|..)+)+(?<![a-z])"
    folder = make("tiny_llama", target_modules=["q_proj"])
    value: Any = {
        "rank_pattern": {endless: 2},
        "alpha_pattern": {endless: 2},
        "layers_pattern": [endless],
    }.get(field, endless)
    extra = {"layers_to_transform": [0, 1, 2]} if field == "layers_pattern" else {}
    configure(folder, **{field: value}, **extra)
    start = time.process_time()  # other work on the machine does not count
    both(FormatError, folder, "did not finish matching", "tiny_llama")
    assert time.process_time() - start < 10


def test_patterns_that_are_none(make: Make) -> None:
    folder = make()
    configure(folder, target_modules="(up|down")
    both(FormatError, folder, "not a regular expression")


# The base


def test_copies_of_another_base(make: Make) -> None:
    folder = make("tiny_llama", target_modules=["embed_tokens", "q_proj"])
    name = "model.model.embed_tokens.base_layer.weight"
    copy = load_file(folder / WEIGHTS)[f"base_model.{name}"]
    copy[3, 4] += 1e-3
    change_tensors(folder, {name: copy})
    model = ZOO["tiny_llama"].model()
    refuse(AdapterError, folder, "copy of 'model.embed_tokens.weight', and this model's differs", model)
    later = load_adapter(folder)  # nothing to hold it against yet
    with refuses("base_mismatch", match=r"copy of 'model\.embed_tokens\.weight'"):
        save_adapter(later, folder.parent / "g", model=model)


def test_copies_of_a_resized_base(make: Make) -> None:
    folder = make("tiny_llama", target_modules=["embed_tokens", "q_proj"])
    grown = ZOO["tiny_llama"].fresh()
    grown.resize_token_embeddings(130, mean_resizing=False)  # type: ignore[operator]
    refuse(AdapterError, folder, r"shape \(2, 128\), expected \(2, 130\)", grown)


def test_copies_that_differ_among_themselves(make: Make) -> None:
    folder = make("tiny_bert", target_modules=["query"], bias="all", modules_to_save=["classifier"])
    wrong = torch.full((5,), 3.0)
    change_tensors(folder, {"model.classifier.modules_to_save.bias": wrong})
    match = "'classifier.modules_to_save.bias' and 'classifier.bias' are copies of one tensor, and differ"
    both(FormatError, folder, match, "tiny_bert")


def test_the_hash_of_the_base(make: Make, tmp_path: Path) -> None:
    model = ZOO["plain_mlp"].fresh()
    adapter = load_adapter(make(), model)
    save_adapter(adapter, tmp_path / "g", model=model)
    again = load_adapter(tmp_path / "g", model)
    assert again.provenance["base"].startswith("float32:")
    assert_equal(again, adapter)
    with torch.no_grad():
        model.get_parameter("head.weight").add_(1)  # not adapted
    load_adapter(tmp_path / "g", model)
    with torch.no_grad():
        model.get_parameter("up.weight").add_(1)
    refuse(AdapterError, tmp_path / "g", "made for other base weights", model)


# The folder


def test_folders_without_weights(make: Make) -> None:
    folder = make()
    (folder / WEIGHTS).unlink()
    refuse(FormatError, folder, "neither adapter_model.safetensors nor adapter_model.bin")


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"r": 1, "r": 2}', '{"lora_alpha": NaN}', "[" * 100_000])
def test_rejects_configurations_that_are_not_a_json_object(make: Make, text: str) -> None:
    folder = make()
    (folder / CONFIG).write_text(text)
    refuse(FormatError, folder, "is damaged: it")
