"""AdapterHub's folders: files of its library give its outputs, and others are rejected."""

import copy
import functools
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorac
from lorac.testing import assert_close
from tests.formats.adapterhub_files import FILES, FOLDERS, changed, expected, inputs, main, model, refused, split
from tests.parity import assert_parity
from tests.refusing import refuses

INCOMPLETE = "vit/compacter"
"""Of a bare model the library leaves out the rule that all hypercomplex layers share."""
WHOLE = [folder for folder in FOLDERS if folder != INCOMPLETE]
FOLDED = ("bert/ia3", "bert/vera", "gpt2/scaled", "llama/dvora", "llama/tasks")
"""Of which the library keeps more factors than lorac, which writes the product."""
SAME = [folder for folder in WHOLE if folder not in FOLDED]
QUICK = ("bert/seq", "llama/inverted", "gpt2/union")
LIBRARY = os.environ.get("ADAPTERHUB_LIBRARY")


@functools.cache
def read(folder):
    return lorac.load_adapter(FILES / folder, model(split(folder)[0]))


@functools.cache
def compiled(name, target):
    adapters = {split(folder)[1]: read(folder) for folder in WHOLE if split(folder)[0] == name}
    return lorac.compile(model(name), adapters, target=target, active=None)


@pytest.mark.medium(
    "checkpoints of BERT and Llama; formats/test_peft_lora.py has GPT-2's transposed layers; BERT's",
    cases=["bart/*", "gpt2/*", "t5/*", "vit/*", "llama/dora"],
)
@pytest.mark.parametrize("folder", WHOLE)
@torch.no_grad()
def test_matches_the_library_that_wrote_the_file(folder):
    name, key = split(folder)
    assert_parity(
        main(compiled(name, "eager")(**inputs(name), adapters=key)), expected(name)[key], expected(name)["base"]
    )


def on_onnxruntime(folder):
    name, key = split(folder)
    emitted = lorac.compile(model(name), {key: read(folder)}, target="onnxruntime")  # two rows of seven are traced
    off = main(emitted(**inputs(name), adapters=None))
    assert_parity(main(emitted(**inputs(name))), expected(name)[key], expected(name)["base"], own_base=off)


@pytest.mark.medium("the same checkpoints in eager, and the kit's bottlenecks there")
@pytest.mark.slow("a BERT", keep=["bert/seq"])
@pytest.mark.parametrize("folder", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in WHOLE])
@torch.no_grad()
def test_matches_the_library_on_onnx_runtime_at_other_sizes(folder):
    on_onnxruntime(folder)


@pytest.mark.medium(
    "checkpoints of BERT and Llama; formats/test_peft_lora.py has GPT-2's transposed layers",
    cases=["bart/*", "gpt2/*", "t5/*", "vit/*"],
)
@pytest.mark.parametrize("folder", SAME)
def test_writes_the_same_keys_and_fields(folder, tmp_path):
    name, key = split(folder)
    lorac.save_adapter(read(folder), tmp_path / key, format="adapterhub", model=model(name))
    again = lorac.load_adapter(tmp_path / key, model(name))
    assert again.variant == read(folder).variant and again.sites == read(folder).sites
    for path, tensors in read(folder).tensors.items():
        assert all(torch.equal(again.tensors[path][leaf], tensor) for leaf, tensor in tensors.items())
    file = FILES / folder / "adapter.safetensors"
    theirs = load_file(file) if file.exists() else torch.load(FILES / folder / "pytorch_adapter.bin")
    ours = load_file(tmp_path / key / "adapter.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    original, written = (json.loads((f / "adapter_config.json").read_text()) for f in (FILES / folder, tmp_path / key))
    ignored = {"model_name", "config"} | ({"model_class"} if name == "vit" else set())
    assert {k: v for k, v in original.items() if k not in ignored} == {
        k: v for k, v in written.items() if k not in ignored
    }
    assert started(original["config"]) == started(written["config"])


def started(config):
    """Return a configuration without the fields about initialisation, which the values have outlived."""
    if config.get("architecture") == "union":
        return {**config, "configs": [started(part) for part in config["configs"]]}
    return {k: v for k, v in config.items() if k != "init_weights" or config.get("architecture") != "lora"}


@pytest.mark.medium(
    "checkpoints of BERT and Llama; formats/test_peft_lora.py has GPT-2's transposed layers", cases=["gpt2/*"]
)
@pytest.mark.parametrize("folder", FOLDED)
def test_reads_folded_adapters_after_saving(folder, tmp_path):
    name, key = split(folder)
    lorac.save_adapter(read(folder), tmp_path / key, format="adapterhub", model=model(name))
    again = lorac.load_adapter(tmp_path / key, model(name))
    assert again.variant == read(folder).variant
    for path, tensors in read(folder).tensors.items():
        assert all(torch.equal(again.tensors[path][leaf], tensor) for leaf, tensor in tensors.items())


@pytest.mark.slow
@pytest.mark.skipif(LIBRARY is None, reason="ADAPTERHUB_LIBRARY names no folder with AdapterHub's library in it")
def test_the_library_reads_saved_files_and_matches(tmp_path):
    for folder in WHOLE:
        name, _ = split(folder)
        (tmp_path / name).mkdir(exist_ok=True)
        lorac.save_adapter(read(folder), tmp_path / folder, format="adapterhub", model=model(name))
    script = Path(__file__).parent / "make_adapterhub.py"
    folders = [str(tmp_path / folder) for folder in WHOLE]
    command, environment = [sys.executable, script, "read", *folders], {**os.environ, "PYTHONPATH": str(LIBRARY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for folder in WHOLE:
        name, key = split(folder)
        found = load_file(tmp_path / folder / "answer.safetensors")["answer"]
        assert_parity(found, expected(name)[key], expected(name)["base"])


@pytest.mark.slow
@torch.no_grad()
def test_an_artifact_keeps_the_adapter(tmp_path):
    name, key = split("bert/seq")
    lorac.compile(model(name), {key: FILES / "bert" / "seq"}).save(tmp_path / "saved")
    again = lorac.load(tmp_path / "saved")
    assert again.adapters[key].variant == read("bert/seq").variant
    assert_parity(main(again(**inputs(name))), expected(name)[key], expected(name)["base"])


# ── What is refused ──────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def copied(tmp_path):
    """Return a copy of a folder, to be damaged."""
    return Path(shutil.copytree(FILES / "bert" / "houlsby", tmp_path / "houlsby"))


def test_rejects_a_file_without_its_model():
    with pytest.raises(lorac.BaseNeeded, match="blocks by number"):
        lorac.load_adapter(FILES / "bert" / "houlsby")


def test_rejects_files_that_the_library_left_incomplete():
    refused(FILES / INCOMPLETE, lorac.FormatError, "phm_rule.*\n.*bare model", "vit")


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"new_field": 1}, lorac.FormatError, "new_field"),
        ({"architecture": "lora"}, lorac.FormatError, "adapter_residual_before_ln"),
        ({"architecture": "prefix_tuning"}, lorac.FormatError, "architecture 'prefix_tuning'"),
        ({"architecture": "reft"}, lorac.FormatError, "architecture 'reft', which rewrites hidden states"),
        ({"architecture": "union"}, lorac.FormatError, "adapter_residual_before_ln"),
        ({"inv_adapter": "glow"}, lorac.FormatError, "glow"),
        ({"non_linearity": "gulu"}, lorac.FormatError, "nearest: gelu"),
        ({"reduction_factor": -4}, lorac.FormatError, "reduction_factor"),
        ({"reduction_factor": 8}, lorac.AdapterError, "down"),
        ({"ln_before": "yes"}, lorac.FormatError, "ln_before"),
        ({"ln_before": True}, lorac.FormatError, "lacks 'down'"),
        ({"mh_adapter": False}, lorac.FormatError, "attention.output"),
        ({"leave_out": [1]}, lorac.FormatError, "layer.1"),
        ({"cross_adapter": 3}, lorac.FormatError, "cross_adapter"),
        ({"model_type": "gpt_neo"}, lorac.FormatError, "gpt_neo"),
        ({"name": "other"}, lorac.FormatError, "houlsby"),
    ],
)
def test_a_configuration_that_means_something_else(copied, fields, error, match):
    changed(copied, **fields)
    refused(copied, error, match)


def test_rejects_missing_and_extra_tensors(copied):
    file = copied / "adapter.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != first}, file)
    refused(copied, lorac.FormatError, "lacks")
    save_file({**tensors, "bert.pooler.weight": torch.zeros(3)}, file)
    refused(copied, lorac.FormatError, "pooler")


def test_an_adapter_for_other_base_weights(tmp_path):
    lorac.save_adapter(read("bert/lora"), tmp_path / "own", format="adapterhub", model=model("bert"))
    other = copy.deepcopy(model("bert"))
    with torch.no_grad():
        other.bert.encoder.layer[0].attention.self.key.weight.mul_(2)
    with refuses("base_mismatch"):
        lorac.load_adapter(tmp_path / "own", other)


def test_warns_of_a_prediction_head_and_rejects_an_interface(copied):
    (copied / "model_head.safetensors").write_bytes(b"")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lorac.load_adapter(copied, model("bert"))
    assert any("prediction head" in str(warning.message) for warning in caught)
    (copied / "adapter_interface.json").write_text("{}")
    refused(copied, lorac.FormatError, "adapter_interface")


def test_files_of_the_first_versions(copied):
    """Other keys, an activation by its old name, an invertible adapter that is named and not there."""
    file = copied / "adapter.safetensors"
    old = {
        key.replace("attention.output.adapters", "attention.output.attention_text_task_adapters").replace(
            ".output.adapters", ".output.layer_text_task_adapters"
        ): tensor
        for key, tensor in load_file(file).items()
    }
    save_file(old, file)
    changed(copied, non_linearity="gelu_orig", invertible_adapter={"block_type": "nice", "reduction_factor": 2})
    raw = json.loads((copied / "adapter_config.json").read_text())
    del raw["version"]
    (copied / "adapter_config.json").write_text(json.dumps({**raw, "type": "text_task"}))
    found = lorac.load_adapter(copied, model("bert"))
    assert found.variant.non_linearity == "gelu" and found.variant.inv_adapter is None
    for path, tensors in read("bert/houlsby").tensors.items():
        assert_close(found.tensors[path]["down"], tensors["down"])


def test_rejects_saving_adapters_that_the_format_cannot_hold(tmp_path):
    host = model("bert")
    vera = lorac.compile(host, {"a": lorac.VeRA(r=2, targets=["query"])}).adapters["a"]
    places = ["layer.0.attention.output.LayerNorm", "layer.1.output.LayerNorm"]
    one = lorac.compile(host, {"a": lorac.Bottleneck(targets=places)}).adapters["a"]
    for adapter, match in ((vera, "has 'vera' at"), (one, "acts, or reads, elsewhere")):
        with refuses("unsupported_field", match=match):
            lorac.save_adapter(adapter, tmp_path / "x", format="adapterhub", model=host)
    with pytest.raises(lorac.BaseNeeded):
        lorac.save_adapter(read("bert/houlsby"), tmp_path / "x", format="adapterhub")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("file", "text"),
    [("adapter_fusion_config.json", "a fusion that attends"), ("adapter_setup.json", "how adapters are stacked")],
)
def test_rejects_compositions_by_name(file, text, tmp_path):
    (tmp_path / file).write_text("{}")
    with refuses("unsupported_field", match=text):
        lorac.load_adapter(tmp_path, model("bert"))
