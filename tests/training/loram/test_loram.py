"""LoRAM: pruned units, the smaller model against the large one with zeros there, and recovered adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import lorac
from lorac.testing import assert_close, assert_parity
from lorac.training import loram
from lorac.training.loram import PruningRecord, UnitGroup
from lorac.training.loram.units import count_kept_units
from tests import zoo
from tests.limits import assert_apart
from tests.refusing import refuses
from tests.training.loops import data, plain_loop

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(*, heads: int = 4, groups: int = 2, layers: int = 2, bias: bool = False) -> Any:
    """A Llama in float64 with heads of 6 over a width of 24, its weights large enough to matter."""
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=6,
        attention_bias=bias,
        mlp_bias=bias,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval().double()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def trained(model: Any, **fields: Any) -> lorac.Adapter:
    """An adapter of all layers of a model, away from its start."""
    variant = lorac.LoRA(r=3, alpha=5, targets=ALL, **fields)
    adapter = lorac.compile(model, {"a": variant}).adapters["a"]
    generator = torch.Generator().manual_seed(4)
    tensors = {
        path: {key: torch.randn(t.shape, generator=generator, dtype=torch.float64) * 0.07 for key, t in own.items()}
        for path, own in adapter.tensors.items()
    }
    return lorac.Adapter("a", adapter.variant, tensors)


def emptied(model: Any, kept: dict[str, PruningRecord]) -> Any:
    """The large model with what was pruned set to 0."""
    model = copy.deepcopy(model)
    for path, one in kept.items():
        layer = model.get_submodule(path)
        rows, columns = (torch.ones(size, dtype=torch.float64) for size in one.shape)
        rows[one.rows], columns[one.columns] = 0, 0
        layer.weight.data *= ((1 - rows)[:, None]) * (1 - columns)
        if layer.bias is not None:
            layer.bias.data *= 1 - rows
    return model


@torch.no_grad()
def logits(model: Any, adapter: lorac.Adapter | None = None) -> Tensor:
    ids = batch()["input_ids"]
    return (model if adapter is None else lorac.compile(model, {"a": adapter}))(input_ids=ids).logits  # type: ignore[no-any-return]


@pytest.mark.medium(
    "all layers and some, with the head and without", keep=["magnitude-None-2-False", "magnitude-layers1-1-True"]
)
@pytest.mark.slow("units chosen by magnitude", cases=["gradient-*", "random-*"])
@pytest.mark.parametrize(("groups", "bias"), [(2, False), (1, True), (4, False)])
@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("by", ["magnitude", "gradient", "random"])
def test_the_pruned_model_equals_the_large_one_with_zeros(groups: int, bias: bool, layers: Any, by: str) -> None:
    """With adapters too: recovered, one does at the emptied large model what it does at the small one."""
    model = llama(groups=groups, bias=bias)
    before = zoo.fingerprint(model)
    smaller = loram.prune(model, heads=0.5, hidden=0.4, layers=layers, by=by, batches=[batch(1)])
    assert zoo.fingerprint(model)[1] == before[1]
    large = emptied(model, dict(smaller.kept))
    assert_close(logits(smaller.model), logits(large))
    assert_apart(logits(large), logits(model))
    adapter = trained(smaller.model)
    recovered = loram.recover(adapter, smaller.kept, model)
    assert_parity(logits(large, recovered), logits(smaller.model, adapter), logits(large))


def test_recovers_factors_at_the_kept_rows_and_columns() -> None:
    """At the untouched large model: W + s·B·A at the rows and columns kept, and W elsewhere."""
    model = llama()
    smaller = loram.prune(model)
    adapter = trained(smaller.model)
    by_hand = copy.deepcopy(model)
    for path, own in adapter.tensors.items():
        one, weight = smaller.kept[path], by_hand.get_submodule(path).weight.data
        weight[one.rows[:, None], one.columns] += 5 / 3 * own["lora_B"] @ own["lora_A"]
    recovered = loram.recover(adapter, smaller.kept, model)
    assert_parity(logits(model, recovered), logits(by_hand), logits(model))


def test_by_hand() -> None:
    """m = n = 3, R = {0, 2}, C = {1}, s = 2, A = [[3]], B = [[1], [−1]]: ΔW = [[0, 6, 0], [0, 0, 0], [0, −6, 0]]."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False)).double()
    own = {"lora_A": torch.tensor([[3.0]]).double(), "lora_B": torch.tensor([[1.0], [-1]]).double()}
    adapter = lorac.Adapter("a", lorac.LoRA(r=1, alpha=2, targets=("0",)), {"0": own})
    kept = {"0": PruningRecord((3, 3), torch.tensor([0, 2]), torch.tensor([1]))}
    found = loram.recover(adapter, kept, model).tensors["0"]
    assert (2 * found["lora_B"] @ found["lora_A"]).tolist() == [[0, 6, 0], [0, 0, 0], [0, -6, 0]]


def test_a_head_of_keys_takes_its_heads_of_queries_along() -> None:
    """Of 4 heads in 2 groups, without the second group: rows 12 to 23 of q and columns 12 to 23 of o go."""
    model = llama()
    attention = model.model.layers[0].self_attn
    for name in ("k_proj", "v_proj"):
        getattr(attention, name).weight.data[6:] *= 1e-3
    kept = loram.prune(model, hidden=0).kept
    path = "model.layers.0.self_attn"
    assert kept[f"{path}.k_proj"].rows.tolist() == list(range(6))
    assert kept[f"{path}.q_proj"].rows.tolist() == list(range(12))
    assert kept[f"{path}.o_proj"].columns.tolist() == list(range(12))
    assert kept[f"{path}.o_proj"].small == (24, 12)


@pytest.mark.parametrize(
    ("kind", "shared", "count", "share", "left"),
    [("hidden", 1, 28672, 0.85, 4300), ("heads", 8, 8, 0.85, 2), ("heads", 1, 64, 0.85, 9), ("heads", 2, 2, 0.9, 1)],
)
def test_sizes_of_the_paper(kind: str, shared: int, count: int, share: float, left: int) -> None:
    """Llama-2-70B at 0.85: 28672 hidden units to 4300, 8 heads of keys to 2."""
    assert count_kept_units(UnitGroup("", kind, count, shared=shared), share) == left


def test_nothing_pruned_is_lora() -> None:
    model = llama()
    smaller = loram.prune(model, heads=0, hidden=0)
    adapter = trained(model)
    assert_close(logits(smaller.model, adapter), logits(model, adapter))
    assert_close(logits(model, loram.recover(adapter, smaller.kept, model)), logits(model, adapter))
    assert smaller.sizes.parameters[0] == smaller.sizes.parameters[1]


def test_recovering_is_linear_and_begins_at_the_base() -> None:
    model = llama()
    smaller = loram.prune(model, by="random", seed=3)
    fresh = lorac.compile(smaller.model, {"a": lorac.LoRA(r=3, targets=ALL)}).adapters["a"]
    recovered = loram.recover(fresh, smaller.kept, model)
    assert torch.equal(logits(model, recovered), logits(model))
    back = {path: one for path, one in smaller.kept.items()}
    for path, own in loram.recover(trained(smaller.model), smaller.kept, model).tensors.items():
        one, first = back[path], trained(smaller.model).tensors[path]
        assert torch.equal(own["lora_A"][:, one.columns], first["lora_A"])
        assert torch.equal(own["lora_B"][one.rows], first["lora_B"])
    drawn = loram.recover(trained(smaller.model), smaller.kept, model, fill="normal")
    assert_apart(logits(model, drawn), logits(model, loram.recover(trained(smaller.model), smaller.kept, model)))


def test_a_model_trains_small_and_runs_large(tmp_path: Path) -> None:
    """The whole way, two of three layers pruned, over a file of positions and the format of PEFT."""
    model = zoo.ZOO["tiny_llama"].fresh()
    smaller = loram.prune(model, layers=[0, 2])
    whole = model.model.layers[1].self_attn.q_proj.weight.shape
    assert smaller.model.model.layers[1].self_attn.q_proj.weight.shape == whole
    assert smaller.model.config.num_attention_heads == model.config.num_attention_heads
    compiled = lorac.compile(smaller.model, {"a": lorac.LoRA(r=2, targets=ALL)})
    losses = plain_loop(compiled, data("tiny_llama", 8, distinct=False), lr=1e-2)
    assert losses[-1] < losses[0]
    loram.write_pruning_record(smaller.kept, tmp_path / "kept.safetensors")
    lorac.save_adapter(compiled.adapters["a"], tmp_path / "small", model=smaller.model)
    small = lorac.load_adapter(tmp_path / "small", smaller.model)
    mine = loram.recover(small, loram.read_pruning_record(tmp_path / "kept.safetensors"), model)
    expected = loram.recover(compiled.adapters["a"], smaller.kept, model)
    assert all(torch.equal(mine.tensors[p][k], t) for p, own in expected.tensors.items() for k, t in own.items())
    lorac.save_adapter(mine, tmp_path / "large", model=model)
    lorac.compile(model, {"a": tmp_path / "large"})


def test_generates_when_pruned_evenly() -> None:
    """The configuration of the whole model then says the new numbers too."""
    model = llama()
    small = loram.prune(model, by="random").model
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2, 1)
    assert (small.config.intermediate_size, small.config.head_dim) == (10, 6)
    assert model.config.num_attention_heads == 4
    ids = batch()["input_ids"][:1]
    greedy = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    cached, plain = (small.generate(ids, use_cache=cache, **greedy) for cache in (True, False))
    assert torch.equal(cached, plain)


def test_reports_parameters_and_bytes() -> None:
    """Of each layer half of q, k, v, o (24·24, 2·12·24, 24·24) and of 3·20·24 goes; 4 bytes a value more or less."""
    smaller = loram.prune(llama())
    large, small = smaller.sizes.parameters
    assert large - small == 2 * (2 * 24 * 24 + 2 * 12 * 24 + 3 * 20 * 24) // 2
    assert smaller.sizes.bytes == (8 * large, 8 * small)
    assert f"{large:,} -> {small:,}" in str(smaller.sizes)


@pytest.mark.medium("one pattern", cases=["pattern1"])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_masks(pattern: Any) -> None:
    """Half of the weights are 0, the smaller half; recovering is the identity."""
    model = llama()
    smaller = loram.mask(model, 0.5, pattern=pattern, targets=("q_proj", "down_proj"))
    weight, masked = (m.model.layers[0].self_attn.q_proj.weight for m in (model, smaller.model))
    assert int((masked == 0).sum()) == weight.numel() // 2
    assert torch.equal(masked[masked != 0], weight[masked != 0])
    if pattern:
        assert ((masked == 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
    else:
        assert weight[masked == 0].abs().max() <= weight[masked != 0].abs().min()
    assert smaller.sizes.parameters[0] - smaller.sizes.parameters[1] == sum(
        int((m == 0).sum()) for m in smaller.masks.values()
    )
    adapter = trained(smaller.model)
    assert_close(logits(model, loram.recover(adapter, smaller.kept, model)), logits(model, adapter))


@pytest.mark.medium("the other", cases=["True"])
@pytest.mark.parametrize("masked", [False, True])
def test_aligning(masked: bool) -> None:
    """The loss falls, the head and what is masked stay, and the large model is untouched."""
    model = llama()
    smaller = loram.mask(model) if masked else loram.prune(model)
    head, losses = smaller.model.lm_head.weight.clone(), []
    before = [parameter.clone() for parameter in model.parameters()]
    loram.align(smaller, [batch()] * 30, steps=30, lr=3e-3, each=lambda step, loss: losses.append(loss))
    assert len(losses) == 30 and losses[-1] < 0.8 * losses[0]
    assert torch.equal(smaller.model.lm_head.weight, head)
    assert all(not smaller.model.get_parameter(name)[mask == 0].any() for name, mask in smaller.masks.items())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_rejects_mismatched_models() -> None:
    model = llama()
    smaller, other = loram.prune(model), loram.prune(model, hidden=0.2)
    adapter = trained(smaller.model)
    with refuses("shape_mismatch", match="and the smaller model"):
        loram.recover(adapter, other.kept, model)
    with refuses("shape_mismatch", match="was pruned from a weight of"):
        loram.recover(adapter, smaller.kept, llama(heads=6))
    with refuses("site_not_found"):
        loram.recover(adapter, smaller.kept, llama(layers=1))
    with refuses("shape_mismatch"):
        loram.recover(adapter, {}, model)
    dora = lorac.compile(smaller.model, {"a": lorac.DoRA(r=2, targets=("q_proj",))}).adapters["a"]
    with pytest.raises(lorac.AdapterNotFound, match="dora"):
        loram.recover(dora, smaller.kept, model)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: loram.prune(m, heads=1.0), lorac.OptionError),
        (lambda m: loram.prune(m, by="size"), lorac.OptionError),
        (lambda m: loram.prune(m, layers=[7]), lorac.OptionError),
        (lambda m: loram.prune(m, by="gradient"), lorac.AdapterError),
        (lambda m: loram.prune(nn.Sequential(nn.Linear(3, 3))), lorac.SiteError),
        (lambda m: loram.mask(m, pattern=(4, 7)), lorac.OptionError),
        (lambda m: loram.mask(m, targets=("embed_tokens",)), lorac.SiteError),
        (lambda m: loram.align(loram.prune(m), [], steps=3), lorac.AdapterError),
        (lambda m: loram.recover(trained(m), {}, m, fill="ones"), lorac.OptionError),
    ],
)
def test_refusals(call: Any, error: Any) -> None:
    model = llama()
    before = zoo.fingerprint(model)
    with pytest.raises(error):
        call(model)
    assert zoo.fingerprint(model)[1] == before[1]


def test_a_file_of_positions_that_are_none(tmp_path: Path) -> None:
    kept = {"0": PruningRecord((3, 3), torch.tensor([0, 5]), torch.tensor([1]))}
    loram.write_pruning_record(kept, tmp_path / "kept.safetensors")
    with refuses("corrupt_file", match="does not have"):
        loram.read_pruning_record(tmp_path / "kept.safetensors")


def test_rejects_a_changed_file_of_positions(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    loram.write_pruning_record({"0": PruningRecord((3, 3), torch.tensor([0, 2]), torch.tensor([1]))}, path)
    sound = path.read_bytes()
    for at in range(len(sound)):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        try:
            found = loram.read_pruning_record(path)
        except lorac.FormatError:
            continue
        assert found["0"].rows.tolist() == [0, 2], f"byte {at} changed a number"
    with refuses("unreadable"):
        loram.read_pruning_record(tmp_path / "nowhere")


def test_reads_the_authors_files_of_removed_units(tmp_path: Path) -> None:
    """Their own recovery by the positions in both kinds of files, ``3_recovered_low_rank_matrix_generation.py``."""
    model = llama()
    smaller = loram.prune(model, layers=[1], by="random")
    loram.write_removed_units(smaller.kept, tmp_path, model)
    layer, head_dim, heads, groups = "model.layers.1", 6, 4, 2
    hidden, keys = (
        torch.load(tmp_path / f"{layer}.{name}.pt", weights_only=True)["pruned_idx"]
        for name in ("mlp.gate_proj", "self_attn.k_proj")
    )
    starts = keys[::head_dim] * (heads // groups)
    queries = torch.cat([torch.arange(start, start + head_dim * (heads // groups)) for start in starts])
    read = loram.read_removed_units(tmp_path, model)
    mine = loram.recover(trained(smaller.model), read, model)
    for leaf, factor, removed in (
        ("mlp.down_proj", "lora_A", hidden), ("mlp.gate_proj", "lora_B", hidden), ("mlp.up_proj", "lora_B", hidden),
        ("self_attn.o_proj", "lora_A", queries), ("self_attn.q_proj", "lora_B", queries),
        ("self_attn.k_proj", "lora_B", keys), ("self_attn.v_proj", "lora_B", keys),
    ):  # fmt: skip
        small, axis = trained(smaller.model).tensors[f"{layer}.{leaf}"][factor], 1 if factor == "lora_A" else 0
        length = len(removed) + small.shape[axis]
        saved = [i for i in range(length) if i not in removed]
        expected = torch.zeros((3, length) if axis else (length, 3), dtype=torch.float64)
        expected.index_copy_(axis, torch.tensor(saved), small)
        assert torch.equal(mine.tensors[f"{layer}.{leaf}"][factor], expected), leaf
    loram.write_removed_units(read, tmp_path / "again", model)
    for file in tmp_path.glob("*.pt"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "kind", [torch.Tensor.int, torch.Tensor.tolist, torch.Tensor.numpy, lambda idx: idx.int().numpy()]
)
def test_reads_positions_of_any_kind_of_whole_numbers(tmp_path: Path, kind: Any) -> None:
    model = llama()
    smaller = loram.prune(model, layers=[1], by="random")
    loram.write_removed_units(smaller.kept, tmp_path, model)
    for file in tmp_path.glob("*.pt"):
        torch.save({"pruned_idx": kind(torch.load(file, weights_only=True)["pruned_idx"])}, file)
    read = loram.read_removed_units(tmp_path, model)
    assert read.keys() == smaller.kept.keys()
    for path, record in read.items():
        assert torch.equal(record.rows, smaller.kept[path].rows), path


def test_rejects_invalid_files_of_removed_units(tmp_path: Path) -> None:
    model, file = llama(), tmp_path / "model.layers.0.self_attn.k_proj.pt"
    with refuses("corrupt_file", match="holds no file"):
        loram.read_removed_units(tmp_path, model)
    for wrong in (torch.arange(5), torch.arange(12), torch.arange(6) + 12, torch.ones(6), torch.arange(6)[None],
                  [0.5, 1.5], [[0], [1, 2]], ["a"], np.ones(6), np.array(["a"]), {}):  # fmt: skip
        torch.save({"pruned_idx": wrong}, file)
        with refuses("corrupt_file", match=r"k_proj\.pt' is damaged"):
            loram.read_removed_units(tmp_path, model)
    torch.save({"kept_idx": torch.arange(6)}, file)
    with refuses("corrupt_file", match="pruned_idx"):
        loram.read_removed_units(tmp_path, model)
    file.rename(tmp_path / "model.layers.0.self_attn.k_prj.pt")
    with refuses("corrupt_file", match="nearest: model.layers.0.self_attn.k_proj"):
        loram.read_removed_units(tmp_path, model)


def test_a_lora_of_a_pruned_and_quantised_model_helps_the_large_one(tmp_path: Path) -> None:
    """QLoRAM, with bitsandbytes' NF4."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, use_cache=False, **sizes)
    large = transformers.LlamaForCausalLM(config).eval()
    smaller = loram.prune(large)
    smaller.model.save_pretrained(tmp_path)
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4, device_map="cpu")
    ids = torch.randint(64, (4, 12))
    small: Any = lorac.compile(packed, {"mine": lorac.LoRA(r=4)}, example_inputs={"input_ids": ids})
    optimizer = torch.optim.AdamW([p for p in small.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        small(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    mine = loram.recover(small.adapters["mine"], smaller.kept, large)
    whole: Any = lorac.compile(large, {"mine": mine}, example_inputs={"input_ids": ids})
    with torch.no_grad():
        assert whole(input_ids=ids, labels=ids).loss < whole(input_ids=ids, labels=ids, adapters=None).loss - 0.3
    with refuses("site_unsupported", match="prune the model before it is quantised"):
        loram.prune(packed)


class Codes(nn.Parameter):
    """Stands for a library's class of quantised weights."""


def test_rejects_quantised_layers() -> None:
    model = llama()
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = Codes(layer.weight.detach())
    with refuses("site_unsupported", match=r"layers\.1\.mlp\.up_proj' is quantised \(Codes\)"):
        loram.prune(model)
