"""X-LoRA's folders of PEFT and of the authors: no file outside is read, and PEFT reads the saved ones."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorac
from tests.limits import within_budget
from tests.parity import assert_parity
from tests.peft_files import of_peft_0_21
from tests.refusing import refuses
from tests.xlora_files import OTHER, adapter, authors, complete, folder, model, of_peft, turned_round


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"scaling_pass_value": None}, lorac.FormatError, "scaling_pass_value=None: expected a number"),
        ({"scaling_pass_value": "half"}, lorac.FormatError, "scaling_pass_value='half': expected a number"),
        ({"adapters": {"x": "nowhere"}}, lorac.FormatError, "the expert 'x', and has no folder of it"),
        ({"adapters": {"a": "0", "b": "0"}}, lorac.FormatError, "two experts .* are one folder"),
        ({"hidden_size": 16}, lorac.AdapterError, "gives 32"),
        ({"xlora_depth": 1}, lorac.FormatError, "layers.3"),
        ({"xlora_depth": 3}, lorac.FormatError, "layers.6.weight"),
        ({"softmaxx": 1}, lorac.FormatError, "softmaxx"),
    ],
)
def test_files_that_do_not_fit(changed: dict[str, Any], error: type[Exception], text: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=text):
        lorac.load_adapter(complete(tmp_path / "x", **changed), model())


@pytest.mark.parametrize("format", ["peft", "xlora"])
@pytest.mark.parametrize("field", ["xlora_size", "xlora_depth"])
@pytest.mark.parametrize("number", [10**7, 2**31 - 1])
def test_a_classifier_is_not_made_larger_than_its_file(format: str, field: str, number: int, tmp_path: Path) -> None:
    here = (complete if format == "peft" else authors)(tmp_path / "x", **{field: number})
    with within_budget(), pytest.raises((lorac.AdapterError, lorac.FormatError), match=r"expected|lacks"):
        lorac.load_adapter(here, model())


def test_rejects_the_authors_softmax_over_the_batch(tmp_path: Path) -> None:
    with refuses("unsupported_field", match=r"enable_softmax_topk=True[\s\S]*depend on the whole batch"):
        lorac.load_adapter(authors(tmp_path, enable_softmax_topk=True), model())
    given = lorac.Adapter("x", replace(adapter().variant, enable_softmax_topk=True), adapter().tensors)
    with refuses("unsupported_field", match="over the whole batch"):
        lorac.save_adapter(given, tmp_path / "w", "xlora", model())


# ── Nothing outside the folder ───────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("escape", ["absolute", "dots", "link", "inner link"])
def test_experts_outside_the_folder_are_not_read(escape: str, tmp_path: Path) -> None:
    """Their path in the configuration exists, and leads to a sound LoRA."""
    here, secret = complete(tmp_path / "x"), tmp_path / "secret"
    (here / "0").rename(secret)
    paths = {"absolute": str(secret), "dots": "../secret", "link": "linked", "inner link": "inner/0"}
    (here / "linked").symlink_to(secret)
    (here / "inner").symlink_to(folder())
    config = json.loads((here / "adapter_config.json").read_text())
    config["adapters"] = {"a": paths[escape], "1": "1", "2": "2"}
    (here / "adapter_config.json").write_text(json.dumps(config))
    with refuses("corrupt_file", match="paths that lead out of the folder are not followed"):
        lorac.load_adapter(here, model())


@pytest.mark.parametrize("format", ["peft", "xlora"])
def test_a_copied_folder_has_experts_of_its_own(format: str, tmp_path: Path) -> None:
    """Whatever becomes of the folder it was copied from; and no path of this machine is written."""
    lorac.save_adapter(adapter(), tmp_path / "first", format, model())
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    (tmp_path / "first").rename(tmp_path / "0")
    changed = complete(tmp_path / "first")
    assert lorac.load_adapter(tmp_path / "copy", model()).variant == adapter().variant
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "copy").glob("*.json"))
    shutil.rmtree(tmp_path / "copy" / "1")
    shutil.copytree(changed / "2", tmp_path / "copy" / "1")
    with refuses("corrupt_file", match="is not the expert '1' that lorac wrote"):
        lorac.load_adapter(tmp_path / "copy", model())


@pytest.mark.medium("the other layout", cases=["peft"])
@pytest.mark.parametrize("format", ["peft", "xlora"])
def test_a_seal_covers_the_classifier_and_the_experts(format: str, tmp_path: Path) -> None:
    lorac.save_adapter(adapter(), tmp_path / "w", format, model())
    files = [path for path in sorted((tmp_path / "w").rglob("*")) if path.suffix == ".safetensors"]
    assert len(files) == 4
    for path in files:
        sound = path.read_bytes()
        path.write_bytes(sound[:-3] + bytes([sound[-3] ^ 1]) + sound[-2:])
        with refuses("corrupt_file", match="do not belong together"):
            lorac.load_adapter(tmp_path / "w", model())
        path.write_bytes(sound)
    experts = [tmp_path / "w" / name for name in "012"]
    for one, other in ((experts[0], experts[2]), (experts[2], experts[0])):
        one.rename(tmp_path / one.name)
        shutil.copytree(other if other.exists() else tmp_path / other.name, one)
    with refuses("corrupt_file", match="is not the expert '0' that lorac wrote"):
        lorac.load_adapter(tmp_path / "w", model())


def test_rejects_an_x_lora_of_x_loras(tmp_path: Path) -> None:
    here = complete(tmp_path / "x")
    shutil.rmtree(here / "1")
    shutil.copytree(complete(tmp_path / "inner"), here / "1")
    with refuses("unsupported_field", match="is an X-LoRA itself"):
        lorac.load_adapter(here, model())


# --- what is read and written ---------------------------------------------------------------------------------------


@of_peft_0_21
def test_rejects_files_from_which_peft_dropped_tensors() -> None:
    of_peft()
    with refuses("corrupt_file", match=r"lacks 'base_model\.internal_xlora_classifier\.layers\.0\.weight'"):
        lorac.load_adapter(folder() / "mixed", model())


def test_rejects_models_without_hidden_states(tmp_path: Path) -> None:
    here = complete(tmp_path / "x")
    with pytest.raises(lorac.BaseNeeded, match="pass model="):
        lorac.load_adapter(here)
    with pytest.raises(lorac.BaseNeeded, match="returns no hidden states"):
        lorac.load_adapter(here, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(lorac.BaseNeeded, match="as they are met in the model"):
        lorac.save_adapter(adapter(), tmp_path / "y")
    plain = lorac.Adapter("p", replace(adapter().variant, activation=False), adapter().tensors)
    with refuses("unsupported_field", match="PEFT's has ReLUs"):
        lorac.save_adapter(plain, tmp_path / "y", model=model())


@pytest.mark.medium("sites in their order", cases=["sites in another order"])
@pytest.mark.parametrize("turned", [False, True], ids=["as read", "sites in another order"])
@torch.no_grad()
def test_peft_reads_saved_files_and_matches(turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = turned_round(adapter()) if turned else adapter()
    lorac.save_adapter(given, tmp_path / "w", model=model())
    monkeypatch.chdir(tmp_path / "w")  # PEFT looks for the experts from there
    host = copy.deepcopy(model())
    host.config.use_cache = False
    read = peft.PeftModel.from_pretrained(host, str(tmp_path / "w")).eval()
    ids, base = OTHER, model()(input_ids=OTHER).logits
    assert_parity(read(input_ids=ids).logits, of_peft()(input_ids=ids).logits, base)
    again = lorac.load_adapter(tmp_path / "w", model(), "x")
    assert again.variant == adapter().variant
    for site, own in adapter().tensors.items():
        assert all(torch.equal(own[key], again.tensors[site][key]) for key in own)
    (tmp_path / "w").rename(tmp_path / "moved")
    assert lorac.load_adapter(tmp_path / "moved", model(), "x").variant == adapter().variant


@torch.no_grad()
def test_the_authors_files(tmp_path: Path) -> None:
    """The authors' layout and lorac's own format hold the same mixture."""
    lorac.save_adapter(adapter(), tmp_path / "own.safetensors", format="native")
    for path in (authors(tmp_path), tmp_path / "own.safetensors"):
        found = lorac.load_adapter(path, model())
        assert found.variant == adapter().variant
        for site, own in adapter().tensors.items():
            assert all(torch.equal(own[key], found.tensors[site][key]) for key in own)
    with refuses("unused_tensors", match=r"inner\.0\.bias"):
        lorac.load_adapter(authors(tmp_path, use_bias=False), model())


@pytest.mark.parametrize(
    ("field", "value"), [("top_k_lora", 99), ("softmax_temperature", 0.0), ("xlora_dropout_p", 2.0)]
)
def test_rejects_an_invalid_value_in_a_file(field: str, value: float, tmp_path: Path) -> None:
    with refuses("unsupported_field", match=f"takes no {field.removeprefix('xlora_')}={value}") as refused:
        lorac.load_adapter(complete(tmp_path / "x", **{field: value}), model(), "x")
    assert str(tmp_path / "x") in refused.value.what


@pytest.mark.parametrize("dropped", [True, False])
def test_blames_peft_only_for_tensors_that_it_drops(dropped: bool, tmp_path: Path) -> None:
    """It takes keys of layers 0, 1 and 2 for those of the three experts, and saves layer 3."""
    here = complete(tmp_path / "x")
    tensors = load_file(here / "adapter_model.safetensors")
    (missing, *_) = [key for key in tensors if (".0." in key) == dropped]
    save_file({key: tensor for key, tensor in tensors.items() if key != missing}, here / "adapter_model.safetensors")
    with refuses("corrupt_file", match=missing.rpartition(".")[2]) as refused:
        lorac.load_adapter(here, model(), "x")
    assert ("PEFT drops" in refused.value.what) == dropped
