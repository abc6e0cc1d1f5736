"""Adapters merged into the folders of quantised models, whose float values come from the libraries' codes."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lorac
from lorac.merging import merge_checkpoint
from lorac.testing import assert_close
from tests.merging.test_merged_model import drawn
from tests.refusing import refuses

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 20}
INDEX = "model.safetensors.index.json"
GROUP = 16
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def packed(values: torch.Tensor) -> torch.Tensor:
    """Return eight numbers of 4 bits along the last axis in each int32, the first in the lowest bits."""
    grouped = values.unflatten(-1, (-1, 8)).to(torch.int64)
    return sum(grouped[..., i] << 4 * i for i in range(8)).to(torch.uint32).view(torch.int32)


def eight_bits(weight):
    """As LLM.int8() does: each row by its largest value."""
    rows = weight.abs().amax(1)
    whole = (weight * 127 / rows[:, None]).round().to(torch.int8)
    parts = {"weight": whole, "SCB": rows, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, whole.float() * (rows / 127)[:, None]


def four_bits(weight, nested=False):
    """As QLoRA does: blocks of 64 values, and with ``nested`` their scales in blocks of 256 to 8 bits."""
    table, blocks = torch.tensor(NF4), weight.flatten().unflatten(0, (-1, 64))
    scale = blocks.abs().amax(1)
    codes = ((blocks / scale[:, None]).unsqueeze(-1) - table).abs().argmin(-1).flatten().to(torch.uint8)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    parts = {"weight": (codes[::2] << 4 | codes[1::2])[:, None], "weight.quant_map": table, "weight.absmax": scale}
    if nested:
        map, offset = torch.linspace(-1, 1, 256), float(scale.mean())
        largest = (scale - offset).abs().amax().reshape(1)
        small = (((scale - offset) / largest)[:, None] - map).abs().argmin(-1).to(torch.uint8)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        parts |= {"weight.absmax": small, "weight.nested_absmax": largest, "weight.nested_quant_map": map}
        scale = map[small.long()] * largest + offset
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    parts["weight.quant_state.bitsandbytes__nf4"] = text
    return parts, (table[codes.long()].unflatten(0, (-1, 64)) * scale[:, None]).reshape(weight.shape)


def groups(weight):
    """Return numbers (in, out), zero points and scales (groups, out), and the float values (out, in)."""
    grouped = weight.T.unflatten(0, (-1, GROUP))
    low, high = grouped.amin(1).clamp_max(-1e-3), grouped.amax(1).clamp_min(1e-3)
    scale = (high - low) / 15
    zero = (-low / scale).round().clamp(1, 15)
    whole = (grouped / scale[:, None] + zero[:, None]).round().clamp(0, 15)
    value = ((whole - zero[:, None]) * scale[:, None]).flatten(0, 1).T
    return whole.flatten(0, 1), zero, scale, value


def gptq(weight, version=1):
    """As AutoGPTQ packs: inputs down the rows, zero points along the columns and in the first version less one."""
    whole, zero, scale, value = groups(weight)
    order = torch.arange(len(whole)) // GROUP
    qzeros = packed(zero - 1 if version == 1 else zero)
    return {"qweight": packed(whole.T).T.contiguous(), "qzeros": qzeros, "scales": scale, "g_idx": order}, value


def awq(weight):
    """As AutoAWQ packs: outputs along the columns, of eight the even ones first."""
    whole, zero, scale, value = groups(weight)

    def interleaved(values):
        return packed(values.unflatten(-1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(-2))

    return {"qweight": interleaved(whole), "qzeros": interleaved(zero), "scales": scale}, value


def fp8(weight, block=(32, 16)):
    rows, columns = (-(-size // each) for size, each in zip(weight.shape, block, strict=True))
    wide = torch.zeros(rows * block[0], columns * block[1])
    wide[: weight.shape[0], : weight.shape[1]] = weight
    scale = wide.unflatten(1, (columns, -1)).unflatten(0, (rows, -1)).abs().amax((1, 3)) / 448
    spread = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: len(weight), : weight.shape[1]]
    small = (weight / spread).to(torch.float8_e4m3fn)
    return {"weight": small, "weight_scale_inv": scale}, small.float() * spread


def fp8_rows(weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    small = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": small, "weight_scale": scale}, small.float() * scale


HOW = {
    "8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, eight_bits),
    "4 bits": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, four_bits),
    "4 bits, nested": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, lambda w: four_bits(w, nested=True)),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq"}, gptq),
    "gptq, v2": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
        lambda w: gptq(w, version=2),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [32, 16]}, fp8),
    "fp8 of rows": ({"quant_method": "fbgemm_fp8"}, fp8_rows),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A Llama, its folder in shards, and an adapter of it."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2)).eval()
    model.save_pretrained(folder / "model", max_shard_size="20KB")
    adapter = drawn(model, {"a": lorac.LoRA(r=2, targets=["q_proj", "down_proj"])}, 0.1).adapters["a"]
    return model, folder / "model", adapter


def quantised(folder, out, settings, quantise):
    """Write a folder with the linear layers of another quantised, and return their float values."""
    shutil.copytree(folder, out)
    index, values = json.loads((out / INDEX).read_text()), {}
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if "_proj.weight" in name]:
            parts, values[name] = quantise(tensors.pop(name))
            named = {f"{name.removesuffix('weight')}{part}": tensor.contiguous() for part, tensor in parts.items()}
            del index["weight_map"][name]
            index["weight_map"] |= dict.fromkeys(named, path.name)
            tensors |= named
        save_file(tensors, path, metadata={"format": "pt"})
    (out / INDEX).write_text(json.dumps(index))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return values


@pytest.mark.medium("a layout of each family", keep=["8 bits", "gptq", "awq", "fp8", "4 bits, nested"])
@torch.no_grad()
@pytest.mark.parametrize("how", HOW)
def test_matches_the_merged_model_of_dequantised_weights(how, whole, tmp_path):
    model, folder, adapter = whole
    values = quantised(folder, tmp_path / "model", *HOW[how])
    with refuses("not_mergeable", match="dequantize=True"):
        merge_checkpoint(tmp_path / "model", adapter, tmp_path / "out")
    merge_checkpoint(tmp_path / "model", adapter, tmp_path / "out", dequantize=True)
    read = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    base = transformers.LlamaForCausalLM.from_pretrained(folder)
    base.load_state_dict(values, strict=False)
    expected = lorac.merge_into(base, adapter).state_dict()
    for name, tensor in read.items():
        assert_close(tensor, expected[name])
    assert any(not torch.equal(expected[name], model.state_dict()[name]) for name in expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    written = {name for path in (tmp_path / "out").glob("*.safetensors") for name in load_file(path)}
    assert written == set(json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"])


WRONG = {
    "a part is missing": (
        "corrupt_file", "qzeros", {}, lambda t: {n: v for n, v in t.items() if "0.self_attn.q_proj.qzeros" not in n},
    ),
    "parts of other sizes": (
        "corrupt_file", "do not belong", {}, lambda t: {n: v[:1] if "q_proj.scales" in n else v for n, v in t.items()},
    ),
    "three bits": ("not_mergeable", "to 3 bits", {"bits": 3}, lambda t: t),
    "another library": ("not_mergeable", "known are bitsandbytes, gptq", {"quant_method": "aqlm"}, lambda t: t),
    "no such matrix": (
        "not_mergeable", "no matrix", {}, lambda t: {n.replace("qweight", "codes"): v for n, v in t.items()},
    ),
    "another layout": (
        "not_mergeable", "scales.codes'.* in a layout of gptq", {},
        lambda t: {**t, **{f"{n}.codes": torch.ones(4, dtype=torch.int8) for n in t if "scales" in n}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_rejects_codes_that_cannot_be_dequantised(what, whole, tmp_path):
    _, folder, adapter = whole
    code, match, changed, spoil = WRONG[what]
    settings, quantise = HOW["gptq"]
    quantised(folder, tmp_path / "model", {**settings, **changed}, quantise)
    held = {}
    for path in (tmp_path / "model").glob("*.safetensors"):
        tensors = spoil(load_file(path))
        save_file(tensors, path, metadata={"format": "pt"})
        held |= dict.fromkeys(tensors, path.name)
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": held}))
    with refuses(code, match=match):
        merge_checkpoint(tmp_path / "model", adapter, tmp_path / "out", dequantize=True)
    assert not (tmp_path / "out").exists()


def test_dequantize_has_no_effect_on_float_weights(whole, tmp_path):
    model, folder, adapter = whole
    merge_checkpoint(folder, adapter, tmp_path / "out", dequantize=True)
    read = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = lorac.merge_into(model, adapter).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.items())
