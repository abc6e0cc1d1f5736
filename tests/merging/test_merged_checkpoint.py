"""A model's folder with adapters merged into it, as the library that wrote the folder reads it."""

import copy
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lorac
from examples.pipelines import tiny_unet
from lorac.merging import merge_checkpoint
from tests.merging.test_merged_model import drawn
from tests.refusing import refuses
from tests.zoo import ZOO

INDEX = "model.safetensors.index.json"
MORE = {"tiny_gpt2": ["wte"], "tiny_t5": ["lm_head"]}


@pytest.fixture
def given(tmp_path):
    """A folder of a Llama in several shards, an adapter of its q_proj, and where to write."""
    model = ZOO["tiny_llama"].model()
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    adapter = drawn(model, {"a": lorac.LoRA(r=2, targets=["q_proj"])}, 0.1).adapters["a"]
    lorac.save_adapter(adapter, tmp_path / "a", model=model)
    return tmp_path / "model", tmp_path / "a", tmp_path / "out"


@pytest.mark.medium("a GPT-2 in shards of 40 KB", keep=["tiny_gpt2-40KB"])
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.* were one tensor")
@pytest.mark.parametrize("size", ["40KB", "1GB"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_bert", "tiny_vit", "tiny_t5", "tiny_albert"])
def test_matches_the_merged_model(name, size, tmp_path):
    entry = ZOO[name]
    model, inputs = entry.model(), entry.inputs()
    adapters = drawn(
        model,
        {
            "a": lorac.LoRA(r=2, targets=[*entry.targets, *MORE.get(name, [])], bias="all"),
            "b": lorac.DoRA(r=1, targets=list(entry.targets[:1])),
        },
        0.05,
    ).adapters
    choice = {"a": 0.7, "b": 0.3}
    model.save_pretrained(tmp_path / "model", max_shard_size=size)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "templates").mkdir()
    (tmp_path / "model" / "templates" / "chat.jinja").write_text("chat")
    merge_checkpoint(tmp_path / "model", adapters, tmp_path / "out", choice)
    read = type(model).from_pretrained(tmp_path / "out").eval()
    expected = lorac.merge_into(model, adapters, choice)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in read.state_dict().items())
    assert torch.equal(read(**inputs).logits, expected(**inputs).logits)
    assert (tmp_path / "out" / "templates" / "chat.jinja").read_text() == "chat"
    kept = {path.name for path in (tmp_path / "model").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == kept
    if size == "40KB":
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        held = {name: path.name for path in (tmp_path / "out").glob("*.safetensors") for name in load_file(path)}
        assert index["weight_map"] == held
        assert index["metadata"]["total_size"] == sum(
            tensor.nbytes for path in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(path).values()
        )


@pytest.mark.medium("a GPT-2, and formats/test_diffusers.py reads the same files")
@torch.no_grad()
@pytest.mark.parametrize("format", ["peft", "diffusers", "kohya"])
def test_a_component_of_diffusers(format, tmp_path):
    from diffusers import UNet2DConditionModel

    unet = tiny_unet(12)
    adapter = drawn(unet, {"a": lorac.LoRA(r=2, targets=["to_q", "conv1"])}, 0.1).adapters["a"]
    unet.save_pretrained(tmp_path / "unet", max_shard_size="30KB")
    file = tmp_path / ("a" if format == "peft" else "a.safetensors")
    lorac.save_adapter(adapter, file, format=format, model=unet)
    merge_checkpoint(tmp_path / "unet", file, tmp_path / "out")
    read = UNet2DConditionModel.from_pretrained(tmp_path / "out").eval()
    expected = lorac.merge_into(unet, adapter)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in read.state_dict().items())


@torch.no_grad()
def test_each_tensor_keeps_its_dtype_and_is_rounded_once(given):
    model, adapter, out = given
    changed = {}
    for number, path in enumerate(sorted(model.glob("*.safetensors"))):
        dtype = (torch.bfloat16, torch.float16, torch.float32)[number % 3]
        changed |= {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
        save_file({n: t.to(dtype) for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    merge_checkpoint(model, adapter, out)
    found = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    factors = lorac.load_adapter(adapter)
    for name, before in changed.items():
        site = name.removesuffix(".weight")
        wide = before.float()
        if site in factors.tensors:
            at = factors.tensors[site]
            wide = torch.addmm(wide, at["lora_B"] * (factors.variant.alpha / 2), at["lora_A"])
        assert torch.equal(found[name], wide.to(before.dtype))


def test_names_that_transformers_changes_are_found(given):
    """A checkpoint of the base model alone lacks the prefix that the model with a head has."""
    model, adapter, out = given
    for path in model.glob("*.safetensors"):
        renamed = {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}
        save_file(renamed, path, metadata={"format": "pt"})
    index = json.loads((model / INDEX).read_text())
    index["weight_map"] = {name.removeprefix("model."): shard for name, shard in index["weight_map"].items()}
    (model / INDEX).write_text(json.dumps(index))
    made = merge_checkpoint(model, adapter, out)
    read = type(ZOO["tiny_llama"].model()).from_pretrained(out)
    expected = lorac.merge_into(ZOO["tiny_llama"].model(), adapter)
    assert made.merged == 3
    assert torch.equal(read.model.layers[2].self_attn.q_proj.weight, expected.model.layers[2].self_attn.q_proj.weight)


def test_links_are_followed_as_the_hub_lays_them_out(given, tmp_path):
    model, adapter, out = given
    hub, snapshot = tmp_path / "models--a--b", tmp_path / "models--a--b" / "snapshots" / "5e0f" / "unet"
    snapshot.mkdir(parents=True)
    model.rename(hub / "blobs")
    for path in (hub / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("..", "..", "..", "blobs", path.name))
    assert not merge_checkpoint(snapshot, adapter, out).left_out
    assert {path.name for path in out.iterdir()} == {path.name for path in snapshot.iterdir()}
    assert not any(path.is_symlink() for path in out.iterdir())


def test_leaves_out_links_that_lead_out_of_the_folder(given, tmp_path):
    model, adapter, out = given
    (tmp_path / "secret").write_text("mine")
    (model / "notes.txt").symlink_to(tmp_path / "secret")
    (model / "more.txt").symlink_to("generation_config.json")
    (model / "folder").symlink_to(tmp_path)
    with pytest.warns(lorac.LoracWarning, match="'notes.txt'") as said:
        made = merge_checkpoint(model, adapter, out)
    assert len(said) == 1
    assert made.left_out == ("notes.txt",)
    assert (out / "more.txt").read_bytes() == (model / "generation_config.json").read_bytes()
    assert not (out / "notes.txt").exists()
    assert not (out / "folder").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [1e39, 1.0])
def test_rejects_merged_values_that_are_not_finite(strength, dtype, tmp_path):
    model = ZOO["tiny_llama"].fresh().to(dtype)
    model.save_pretrained(tmp_path / "model")
    adapter = drawn(model, {"a": lorac.LoRA(r=1, targets=["q_proj"])}, 0.1).adapters["a"]
    with torch.no_grad():
        for tensor in adapter.tensors["model.layers.1.self_attn.q_proj"].values():
            tensor.fill_(1e20 if dtype is not torch.float16 else 6e4)
    for into in (model, tmp_path / "model"):
        with refuses("non_finite", match=r"'model.layers.\d.self_attn.q_proj.weight'"):
            if into is model:
                lorac.merge_into(model, {"a": adapter}, {"a": strength})
            else:
                merge_checkpoint(into, {"a": adapter}, tmp_path / "out", {"a": strength})
    assert not (tmp_path / "out").exists()


def test_names_the_folder_where_the_disk_is_full(given, monkeypatch):
    model, adapter, out = given

    def fill(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr(shutil, "copyfile", fill)
    with refuses("option_error", match=rf"^'{out}' cannot be written: No space"):
        merge_checkpoint(model, adapter, out)
    assert not out.exists()


def test_files_that_hold_other_weights_are_left_out_with_a_word(given):
    model, adapter, out = given
    (model / "onnx").mkdir()
    names = ("pytorch_model.bin", "adapter_config.json", "consolidated.safetensors", "onnx/model.onnx.data")
    for name in names:
        (model / name).write_bytes(b"old")
    with pytest.warns(lorac.LoracWarning, match="not copied.*'adapter_config.json', 'consolidated.safetensors', 'onn"):
        made = merge_checkpoint(model, adapter, out)
    assert made.left_out == tuple(sorted(names))
    assert not any((out / name).exists() for name in made.left_out)


def test_rejects_an_existing_folder(given):
    model, adapter, out = given
    out.mkdir()
    merge_checkpoint(model, adapter, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with refuses("option_error", match="exists already"):
        merge_checkpoint(model, adapter, out)
    with refuses("option_error", match="exists already"):
        merge_checkpoint(model, adapter, model)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_interrupted_merge_leaves_nothing(given, monkeypatch):
    model, adapter, out = given
    from lorac.merging import merged_checkpoint

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(merged_checkpoint, "dump_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(model, adapter, out)
    assert sorted(path.name for path in out.parent.iterdir()) == ["a", "model"]


def shard(model):
    return sorted(model.glob("*.safetensors"))[1]


def changed(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def indexed(path):
    return json.loads(path.read_text())["weight_map"]


def whole_numbers(path):
    save_file({name: tensor.int() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def unnamed(path, shard):
    """Take all tensors of a shard out of an index."""
    changed(path, weight_map={name: place for name, place in indexed(path).items() if place != shard})


WRONG = {
    "missing shard": ("corrupt_file", lambda m: shard(m).unlink()),
    "cut shard": ("corrupt_file", lambda m: shard(m).write_bytes(shard(m).read_bytes()[:-9])),
    "index names fewer": ("corrupt_file", lambda m: unnamed(m / INDEX, shard(m).name)),
    "ten million layers": ("corrupt_file", lambda m: changed(m / "config.json", num_hidden_layers=10**7)),
    "index names more": (
        "corrupt_file",
        lambda m: changed(m / INDEX, weight_map={**indexed(m / INDEX), "x": shard(m).name}),
    ),
    "index leads out": ("corrupt_file", lambda m: changed(m / INDEX, weight_map={"x": "../a/x.safetensors"})),
    "metadata of another form": ("corrupt_file", lambda m: changed(m / INDEX, metadata=[1])),
    "index names a long file": ("corrupt_file", lambda m: changed(m / INDEX, weight_map={"x": "x" * 300})),
    "whole numbers": ("corrupt_file", lambda m: whole_numbers(shard(m))),
    "index is damaged": ("corrupt_file", lambda m: (m / INDEX).write_text("{")),
    "no weights": ("unreadable", lambda m: [path.unlink() for path in m.glob("*.safetensors*")]),
    "other shapes": ("corrupt_file", lambda m: changed(m / "config.json", hidden_size=32)),
    "quantised": ("not_mergeable", lambda m: changed(m / "config.json", quantization_config={"quant_method": "fp8"})),
    "no configuration": ("option_error", lambda m: (m / "config.json").unlink()),
    "unknown class": ("option_error", lambda m: changed(m / "config.json", architectures=["Nothing"])),
    "a pipeline": ("option_error", lambda m: (m / "model_index.json").write_text("{}")),
}


@pytest.mark.parametrize("what", WRONG)
def test_rejects_wrong_folders(what, given):
    model, adapter, out = given
    code, spoil = WRONG[what]
    spoil(model)
    with refuses(code):
        merge_checkpoint(model, adapter, out)
    assert not out.exists()


EXPERTS = {
    "Mixtral": {"num_local_experts": 3},
    "Qwen2Moe": {"num_experts": 3, "moe_intermediate_size": 8, "num_experts_per_tok": 2},
}


@pytest.mark.medium("one model", keep=["Mixtral-4KB"])
@torch.no_grad()
@pytest.mark.parametrize("size", ["4KB", "1GB"])
@pytest.mark.parametrize("name", EXPERTS)
def test_merges_experts_that_are_stored_separately(name, size, tmp_path):
    """Their shards may lie anywhere: those of one stack are merged together, and written where each was."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, num_key_value_heads=2, vocab_size=20, **EXPERTS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).bfloat16().eval()
    model.save_pretrained(tmp_path / "model", max_shard_size=size)
    stacks = [f"model.layers.{layer}.mlp.experts.{leaf}" for layer in (0, 1) for leaf in ("gate_up_proj", "down_proj")]
    adapters = drawn(
        model,
        {
            "a": lorac.LoRA(r=1, targets=["q_proj"], parameters=stacks[:3]),
            "b": lorac.LoRA(r=2, targets=(), parameters=stacks[1:2]),
        },
        0.1,
    ).adapters
    choice = {"a": 0.7, "b": 0.3}
    made = merge_checkpoint(tmp_path / "model", adapters, tmp_path / "out", choice)
    assert made.merged == 5
    stored, written = (
        {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}
        for folder in (tmp_path / "model", tmp_path / "out")
    )
    assert written.keys() == stored.keys()
    assert torch.equal(stored[f"{UNTOUCHED[name]}"], written[f"{UNTOUCHED[name]}"])
    read = type(model).from_pretrained(tmp_path / "out").state_dict()
    expected = lorac.merge_into(model, adapters, choice).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in read.items())


UNTOUCHED = {
    "Mixtral": "model.layers.1.block_sparse_moe.experts.2.w2.weight",
    "Qwen2Moe": "model.layers.1.mlp.experts.2.down_proj.weight",
}


def test_rejects_experts_that_are_missing_or_of_other_shapes(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=2, vocab_size=20))
    model.save_pretrained(tmp_path / "model")
    file, key = tmp_path / "model" / "model.safetensors", "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    sound = load_file(file)
    adapter = drawn(model, {"a": lorac.LoRA(r=1, targets=["q_proj"])}, 0.1).adapters["a"]
    for spoilt in ({n: t for n, t in sound.items() if n != key}, {**sound, key: sound[key].T.contiguous()}):
        save_file(spoilt, file, metadata={"format": "pt"})
        with refuses("corrupt_file", match="mlp.experts.down_proj"):
            merge_checkpoint(tmp_path / "model", adapter, tmp_path / "out")


def test_rejects_an_adapter_of_another_model(given):
    model, adapter, out = given
    with refuses("base_mismatch"):
        path = next(path for path in model.glob("*.safetensors") if any("q_proj" in name for name in load_file(path)))
        save_file({n: t + 1 for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
        merge_checkpoint(model, adapter, out)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("format", ["peft", "native"])
@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
@torch.no_grad()
def test_merges_an_adapter_that_holds_a_copy_of_the_base(layer, format, tmp_path):
    """PEFT saves the embedding or the head whole where it is adapted."""
    model = ZOO["tiny_llama"].fresh()
    model.save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", layer], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "peft")
    adapter = lorac.load_adapter(tmp_path / "peft")
    lorac.save_adapter(adapter, tmp_path / "native", "native")
    merge_checkpoint(tmp_path / "model", tmp_path / format, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = lorac.merge_into(model, adapter).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    model.get_submodule(next(path for path in adapter.tensors if path.endswith(layer))).weight[3] += 1
    model.save_pretrained(tmp_path / "other")
    with refuses("base_mismatch"):
        merge_checkpoint(tmp_path / "other", tmp_path / format, tmp_path / "none")


MEASURED = """
import resource, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
from lorac.merging import merge_checkpoint

def peak():
    marks = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(marks["VmHWM"].split()[0]) * 1024

folder = Path(sys.argv[1])
merge_checkpoint(folder / "model", folder / "a", folder / "first")  # imports what is needed
Path("/proc/self/clear_refs").write_text("5")
before = peak()
merge_checkpoint(folder / "model", folder / "a", folder / "second")
print(peak() - before)
"""


@pytest.mark.slow("test_matches_the_merged_model merges shard by shard; only memory would grow")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no high-water mark that starts anew")
def test_keeps_one_weight_at_a_time_in_memory(tmp_path):
    """Of a model of four shards, its peak is below 1.3 times the largest shard."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).bfloat16()
    model.save_pretrained(tmp_path / "model", max_shard_size="20MB")
    adapter = drawn(model, {"a": lorac.LoRA(r=4, targets="all-linear")}, 0.01).adapters["a"]
    lorac.save_adapter(adapter, tmp_path / "a", model=model)
    shards = [path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors")]
    assert len(shards) > 3
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.3 * max(shards), done.stdout
    assert_same_files(tmp_path / "first", tmp_path / "second")


def assert_same_files(one, other):
    """Equal input gives equal bytes."""
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()


def test_rejects_files_whose_sites_need_a_run_of_the_model(tmp_path):
    model = ZOO["tiny_bert"].model()
    model.save_pretrained(tmp_path / "model")
    adapter = drawn(model, {"a": lorac.LoRA(r=2, targets=["query"])}, 0.1).adapters["a"]
    lorac.save_adapter(adapter, tmp_path / "a", "adapterhub", model)
    with refuses("base_needed", match=r"a run of the model.*\n.*merge_into"):
        merge_checkpoint(tmp_path / "model", tmp_path / "a", tmp_path / "out")
