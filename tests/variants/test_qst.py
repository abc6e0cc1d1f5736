"""QST: its paper's oracles, by hand on whole models, memory in training, every target, and rejected settings."""

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lorac
from lorac import Site, SiteKind
from lorac.ir.slots.execution import FormulaContext
from lorac.testing import assert_close
from tests.limits import decimals
from tests.oracles import qst as oracle
from tests.parity import assert_parity
from tests.refusing import refuses

_DRAWN = torch.Generator().manual_seed(5)
IDS = torch.randint(0, 61, (2, 9), generator=_DRAWN)
OTHER = torch.randint(0, 61, (3, 5), generator=_DRAWN)
SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FORMS = {
    "adapter": {},
    "lora": {"downsample": "lora", "own_first": False, "vectors": True},
    "linear": {"downsample": "linear", "kv_heads": 4, "rope_theta": 100.0},
    "max": {"downsample": "max", "causal": False, "r": 2},
    "avg": {"downsample": "avg", "own_first": False, "vectors": True},
}


@functools.cache
def model(kind: str = "Llama") -> nn.Module:
    torch.manual_seed(0)
    own = {"num_key_value_heads": 2, "initializer_range": 0.1} if kind == "Llama" else {"init_std": 0.1}
    own |= {"ffn_dim": 48, "word_embed_proj_dim": 32} if kind == "OPT" else {}
    config = getattr(transformers, f"{kind}Config")(**SIZES, **own)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def method(**fields: Any) -> lorac.QST:
    return lorac.QST.of(model(), **{"r": 4, "bottleneck": 3, **fields})


@functools.cache
def away(form: str = "adapter", seed: int = 0) -> lorac.Adapter:
    """Every tensor off its start, with a share of the output that the measure admits."""
    given = lorac.compile(model(), {form: method(**FORMS[form])}).adapters[form]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in given.tensors["model.norm"].items():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * (0.05 if key == "alpha" else 0.2))
            if key == "alpha":
                tensor.sub_(0.15)
    tensors = {key: tensor.detach() for key, tensor in given.tensors["model.norm"].items()}
    return lorac.Adapter(form, given.variant, {"model.norm": tensors})


def exact(adapter: lorac.Adapter) -> lorac.Adapter:
    tensors = {path: {key: t.double() for key, t in at.items()} for path, at in adapter.tensors.items()}
    return lorac.Adapter(adapter.name, adapter.variant, tensors)


# ── By hand ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@torch.no_grad()
def by_hand(adapter: lorac.Adapter, **given: Any) -> torch.Tensor:
    """Logits in float64: the model's own hidden states, and the oracle's network, to the model's own head."""
    host, seen = copy.deepcopy(model()).double(), {}
    host.model.norm.register_forward_hook(lambda *args: seen.update(y=args[2]))
    blocks = [host.model.embed_tokens, *host.model.layers]
    for n, block in enumerate(blocks):
        block.register_forward_hook(
            lambda _, __, output, n=n: seen.update({n: output[0] if isinstance(output, tuple) else output})
        )
    host(**given)
    p = {key: t.double().numpy() for key, t in adapter.tensors["model.norm"].items()}
    mask = given.get("attention_mask", torch.ones_like(given["input_ids"]))
    rows = [
        oracle.output(
            seen["y"][i].numpy(), [seen[n][i].numpy() for n in range(3)], p, adapter.variant, mask[i].tolist()
        )
        for i in range(len(mask))
    ]
    return host.lm_head(torch.stack([torch.from_numpy(row) for row in rows]))


@functools.cache
def emitted(*forms: str) -> Any:
    """Forms in one program, which takes a mask, as one that is with them reads it."""
    example = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    adapters = [*map(away, forms), masked()]
    return lorac.compile(model(), adapters, target="onnxruntime", active=None, example_inputs=example)


def masked() -> lorac.Adapter:
    return lorac.Adapter("masked", method(mask="attention_mask"), away().tensors)


@pytest.mark.medium("another batch and length", cases=["*-as captured"])
@pytest.mark.parametrize("ids", [IDS, OTHER], ids=["as captured", "another batch and length"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_matches_the_oracle(form: str, ids: torch.Tensor) -> None:
    host = copy.deepcopy(model()).double()
    eager = lorac.compile(host, {form: exact(away(form))})
    assert_parity(eager(input_ids=ids).logits, by_hand(away(form), input_ids=ids), host(input_ids=ids).logits)


@pytest.mark.medium("eager against the oracle, and generation/test_branches.py")
@pytest.mark.parametrize(
    "forms", [(), pytest.param(tuple(FORMS), marks=pytest.mark.slow)], ids=["one form", "all forms"]
)
@torch.no_grad()
def test_onnx_runtime_is_the_oracles_at_another_batch_and_length(forms: tuple[str, ...]) -> None:
    for form, ids in itertools.product((*forms, "masked"), (IDS, OTHER)):
        compiled, told = emitted(*forms), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected, off = (
            by_hand(masked() if form == "masked" else away(form), input_ids=ids),
            compiled(**told, adapters=None).logits,
        )
        found = compiled(**told, adapters=form).logits
        assert_parity(found, expected.float(), model()(input_ids=ids).logits, own_base=off)


@torch.no_grad()
def test_padding_is_seen_by_no_token_where_the_mask_is_named() -> None:
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    told, real = {"input_ids": IDS, "attention_mask": mask}, mask.bool()
    host = copy.deepcopy(model()).double()
    eager = lorac.compile(host, {"m": exact(masked())})
    assert_parity(eager(**told).logits[real], by_hand(masked(), **told)[real], host(**told).logits[real])
    with refuses("site_unreached", match="attention_mask"):
        eager(input_ids=IDS)


@pytest.mark.medium("the same in eager, and generation/test_branches.py compiles such a program with caches")
@torch.no_grad()
def test_padding_is_seen_by_no_token_in_onnx_runtime() -> None:
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    told, real = {"input_ids": IDS, "attention_mask": mask}, mask.bool()
    expected, base = by_hand(masked(), **told)[real].float(), model()(**told).logits[real]
    off = emitted()(**told, adapters=None).logits[real]
    assert_parity(emitted()(**told, adapters="masked").logits[real], expected, base, own_base=off)


@pytest.mark.medium("test_starts_at_the_base_bit_for_bit, and runtime/test_adapter_pool.py adds adapters there")
@torch.no_grad()
def test_another_side_network_is_swapped_in_without_a_rebuild_and_starts_as_the_base() -> None:
    compiled, told = emitted(), {"input_ids": OTHER, "attention_mask": torch.ones_like(OTHER)}
    fresh = lorac.compile(model(), {"fresh": method(mask="attention_mask")}).adapters["fresh"]
    sessions = compiled.engine
    compiled.add_adapter(fresh)
    assert compiled.engine is sessions
    off = compiled(**told, adapters=None).logits
    assert torch.equal(compiled(**told, adapters="fresh").logits, off)
    compiled.remove_adapter("fresh")


def test_gates_and_pools_by_hand() -> None:
    x = torch.tensor([1.0, 3, 5, 7])
    for downsample, expected in {"avg": [2, 6], "max": [3, 7]}.items():
        variant = lorac.QST(blocks=("b",), heads=1, intermediate=4, r=2, downsample=downsample)
        assert variant._downsample(x, None, 1, FormulaContext(_site(4))).tolist() == expected
    beta = torch.sigmoid(torch.tensor([0.0, 0.5], dtype=torch.float64))
    assert decimals(beta, 6) == [0.5, 0.622459]


def _site(width: int) -> Site:
    return Site("norm", SiteKind.BLOCK, width, width, torch.float32, None)


@pytest.mark.parametrize(
    ("downsample", "total", "share"),
    [("adapter", 28_623_104, 0.0784), ("linear", 59_932_928, 0.5599), ("avg", 26_378_496, 0)],
)
def test_the_papers_counts_of_llama_2_7b(downsample: str, total: int, share: float) -> None:
    llama = {"blocks": tuple(f"l.{n}" for n in range(32)), "heads": 32, "intermediate": 11008}
    specs = lorac.QST(**llama, downsample=downsample, vectors=True, own_first=False).params(_site(4096))
    counts = {key: torch.Size(spec.shape).numel() for key, spec in specs.items()}
    assert sum(counts.values()) == total
    assert round(sum(n for key, n in counts.items() if key.startswith("down_")) / total, 4) == share


def test_the_papers_count_of_llama_2_70b() -> None:
    llama = {"blocks": tuple(f"l.{n}" for n in range(80)), "heads": 64, "kv_heads": 8, "intermediate": 28672}
    specs = lorac.QST(**llama, vectors=True, own_first=False).params(_site(8192)).values()
    assert round(sum(torch.Size(spec.shape).numel() for spec in specs) / 1e6, 1) == 282.9


# ── At the start, and in training ────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_starts_at_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    host = copy.deepcopy(model()).to(dtype)
    compiled = lorac.compile(host, {"side": method()})
    assert torch.equal(compiled(input_ids=IDS).logits, host(input_ids=IDS).logits)
    assert compiled(input_ids=IDS, labels=IDS).loss == host(input_ids=IDS, labels=IDS).loss


@torch.no_grad()
def test_a_model_in_half_precision() -> None:
    y = lorac.compile(copy.deepcopy(model()).half(), {"a": away()})(input_ids=IDS).logits
    assert y.dtype is torch.float16
    assert (y - by_hand(away(), input_ids=IDS)).abs().max() < 1e-2 * y.abs().max()


def kept(variant: Any, batch: dict[str, torch.Tensor], host: nn.Module) -> tuple[int, list[torch.Size]]:
    """What a training step keeps for its backward pass, weights left out: bytes, and the shapes."""
    compiled = lorac.compile(host, {"a": variant}).train()
    held: dict[int, torch.Tensor] = {}
    weights = {t.untyped_storage().data_ptr() for t in (*host.parameters(), *compiled.parameters())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held.setdefault(storage.data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compiled(**batch).logits.square().mean()
    loss.backward()
    return sum(t.untyped_storage().nbytes() for t in held.values()), [t.shape for t in held.values()]


def test_training_stores_few_activations_and_leaves_the_model() -> None:
    host, batch = copy.deepcopy(model()), {"input_ids": IDS}
    own, _ = kept(method(), batch, host)
    other, _ = kept(lorac.LoRA(r=4), batch, host)
    assert own <= 0.6 * other
    before = {key: t.clone() for key, t in host.state_dict().items()}
    compiled = lorac.compile(host, {"side": method(dropout=0.1)}).train()
    start = {key: t.detach().clone() for key, t in compiled.adapters["side"].tensors["model.norm"].items()}
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=3e-2, weight_decay=0.1)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = compiled(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == host(input_ids=IDS, labels=IDS).loss.item()
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(t, before[key]) for key, t in host.state_dict().items())
    assert all(parameter.grad is None for parameter in host.parameters())
    trained = compiled.adapters["side"].tensors["model.norm"]
    assert [key for key, t in trained.items() if torch.equal(t, start[key])] == []


def test_training_stores_only_the_activations_of_downsamplers() -> None:
    widths = [shape[-1] for shape in kept(method(), {"input_ids": IDS}, copy.deepcopy(model()))[1] if shape]
    taps, blend = 3, 1
    assert widths.count(32) == taps + blend
    assert 48 not in widths, "nothing of the model's MLPs"
    pooled = [
        shape[-1] for shape in kept(method(downsample="avg"), {"input_ids": IDS}, copy.deepcopy(model()))[1] if shape
    ]
    assert pooled.count(32) == blend


def test_stops_gradients_at_the_side_networks_inputs() -> None:
    tensors = {key: torch.zeros_like(t) if key == "alpha" else t for key, t in away().tensors["model.norm"].items()}
    side = lorac.Adapter("side", away().variant, {"model.norm": tensors})
    lora = lorac.LoRA(r=2, targets=["down_proj"])
    compiled = lorac.compile(model(), {"side": side, "lora": lora}).train()
    compiled(input_ids=IDS, adapters={"side": 1.0, "lora": 1.0}).logits.square().mean().backward()
    assert not any(bool(t.grad.any()) for t in compiled.adapters["lora"].parameters() if t.grad is not None)
    assert all(t.grad is not None for t in compiled.adapters["side"].parameters())


# ── A model's, files, refusals ───────────────────────────────────────────────────────────────────────────────────────
def test_a_models_parts_are_found_by_structure() -> None:
    found = {kind: lorac.QST.of(model(kind), r=4) for kind in ("Llama", "OPT")}
    assert found["Llama"] == lorac.QST(
        targets=r"model\.norm", blocks=("model.layers.0", "model.layers.1"), heads=4, kv_heads=2, intermediate=48, r=4
    )
    assert found["OPT"].targets == r"model\.decoder\.final_layer_norm"
    assert found["OPT"].kv_heads is None
    sequence = nn.Sequential(*(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(2)))
    plain = nn.ModuleDict({"blocks": sequence, "norm": nn.LayerNorm(8)})
    assert lorac.QST.of(plain, heads=2, r=2).blocks == ("blocks.0", "blocks.1")
    assert lorac.QST.of(model(), targets=["model.norm"], r=4) == found["Llama"]
    with refuses("site_not_found", match="names 4 modules"):
        lorac.QST.of(model(), targets=["input_layernorm", "post_attention_layernorm"])
    with pytest.raises(lorac.AdapterError, match="number of attention heads"):
        lorac.QST.of(plain)
    bert = transformers.BertConfig(**SIZES)
    with refuses("site_not_found", match="one last norm next to a list of blocks"):
        lorac.QST.of(transformers.BertModel(bert))


def test_rejects_invalid_settings_and_modes() -> None:
    with pytest.raises(lorac.AdapterError, match=r"a side network of width 32/r with 4 heads"):
        lorac.compile(model(), {"side": method(r=16)})
    with pytest.raises(lorac.OptionError, match="adapter"):
        lorac.compile(model(), {"side": method(downsample="adaptor")})
    for mode in ("fused", "baked"):
        with refuses("not_mergeable", match="no weight form"):
            lorac.compile(model(), {"a": away()}, mode=mode)


@pytest.mark.medium("the kit's saving and loading")
@torch.no_grad()
def test_files(tmp_path: Any) -> None:
    compiled = lorac.compile(model(), {"a": away()})
    lorac.save_adapter(compiled.adapters["a"], tmp_path / "a.safetensors", "native", model())
    again = lorac.load_adapter(tmp_path / "a.safetensors", model(), "a")
    assert again.variant == away().variant
    y = compiled(input_ids=IDS).logits
    assert torch.equal(lorac.compile(model(), {"a": again})(input_ids=IDS).logits, y)
    compiled.save(tmp_path / "whole")
    assert_close(lorac.load(tmp_path / "whole")(input_ids=IDS).logits, y)
