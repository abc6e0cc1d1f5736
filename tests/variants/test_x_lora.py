"""X-LoRA: by hand, beside PEFT's own model, off, trained, frozen; and the files of PEFT and of the authors."""

import copy
import functools
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import lorac
from lorac.frontend.last_hidden_state import find_last_hidden_state
from lorac.testing.eager_checks import assert_close
from tests.limits import decimals
from tests.oracles import x_lora as oracle
from tests.parity import assert_parity
from tests.refusing import refuses

_DRAWN = torch.Generator().manual_seed(3)
IDS = torch.randint(0, 61, (2, 9), generator=_DRAWN)
OTHER = torch.randint(0, 61, (3, 5), generator=_DRAWN)
FIELDS = {"layerwise_scalings": True, "softmax_temperature": 0.7, "top_k_lora": 2, "global_scaling_weight": 1.5}
PREFIX = "base_model.internal_xlora_classifier."


def tiny(kind: str = "Llama", **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = getattr(transformers, f"{kind}Config")(**{**sizes, "initializer_range": 0.1, **fields})
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    return getattr(transformers, f"{kind}{head}")(config).eval()


@functools.cache
def model() -> nn.Module:
    return tiny(num_key_value_heads=2)


@functools.cache
def folder() -> Path:
    """Three LoRAs of unequal ranks and targets, PEFT's XLORA of them, and what that answers."""
    here, host = Path(tempfile.mkdtemp()), model()
    torch.manual_seed(0)
    targets = [["q_proj", "v_proj", "down_proj"], ["q_proj", "down_proj"], ["q_proj", "v_proj", "down_proj"]]
    for i, rank in enumerate((4, 2, 3)):
        made = peft.get_peft_model(
            copy.deepcopy(host), peft.LoraConfig(r=rank, lora_alpha=8, target_modules=targets[i])
        )
        with torch.no_grad():
            for name, tensor in made.named_parameters():
                if "lora_B" in name:
                    tensor.copy_(0.06 * torch.randn_like(tensor))
        made.save_pretrained(here / str(i))
    return here


@functools.cache
def of_peft(**fields: Any) -> Any:
    """PEFT's, with other settings than ``FIELDS`` where they are given; its files lie in ``mixed()``."""
    host = copy.deepcopy(model())
    host.config.use_cache = False
    paths = {str(i): str(folder() / str(i)) for i in range(3)}
    torch.manual_seed(0)
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, adapters=paths, xlora_depth=2, xlora_size=16, **(fields or FIELDS)
    )
    made = peft.get_peft_model(host, config).eval()
    with torch.no_grad():
        for tensor in made.base_model.internal_xlora_classifier.parameters():
            tensor.mul_(8)
    made.save_pretrained(mixed(**fields))
    return made


def mixed(**fields: Any) -> Path:
    return folder() / "-".join(["mixed", *map(str, fields.values())])


def classifier(**fields: Any) -> dict[str, torch.Tensor]:
    made = of_peft(**fields).base_model.internal_xlora_classifier
    return {key: tensor.detach().clone() for key, tensor in made.state_dict().items()}


def with_experts(here: Path) -> Path:
    """A folder with the three LoRAs in it."""
    for i in range(3):
        shutil.copytree(folder() / str(i), here / str(i), dirs_exist_ok=True)
    return here


def complete(here: Path, made: dict[str, Any] | None = None, **changed: Any) -> Path:
    """PEFT's file, of what it made with such settings, with the tensors that PEFT drops, next to its experts."""
    tensors = {PREFIX + key: tensor for key, tensor in classifier(**(made or {})).items()}
    config = json.loads((mixed(**(made or {})) / "adapter_config.json").read_text())
    with_experts(here)
    (here / "adapter_config.json").write_text(json.dumps(config | changed))
    save_file(tensors, here / "adapter_model.safetensors")
    return here


@functools.cache
def adapter() -> lorac.Adapter:
    return lorac.load_adapter(complete(folder() / "whole"), model(), "x")


@functools.cache
def emitted() -> Any:
    return lorac.compile(model(), {"x": adapter()}, target="onnxruntime", aux=["router"])


def xlora(**fields: Any) -> lorac.XLoRA:
    return lorac.XLoRA(**{"hidden": "h", "hidden_size": 4, "experts": 3, "targets": ["a", "b"], **fields})


# ── By hand ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0.628532, 0.231224, 0.140244]),
        ({"top_k_lora": 2}, [0.628532, 0.231224, 0]),
        ({"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2}, [0.731059, 0.268941, 0]),
        ({"enable_softmax": False}, [2, 1, 0.5]),
        ({"softmax_temperature": 0.5}, [0.843795, 0.114195, 0.042010]),
    ],
)
def test_scalings_by_hand(fields: dict[str, Any], expected: list[float]) -> None:
    logits = torch.tensor([2, 1, 0.5], dtype=torch.float64)
    assert decimals(xlora(**fields).scalings(logits), 6) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k_lora": 2},
        {"top_k_lora": 2, "enable_softmax_topk": True},
        {"top_k_lora": 1, "enable_softmax": False, "enable_softmax_topk": True},
        {"enable_softmax": False, "enable_softmax_topk": True},
    ],
)
def test_a_model_of_one_layer_is_the_oracles(fields: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    host, x = (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh()).double().eval(),
        torch.randn(2, 3, 4, generator=generator).double(),
    )
    method = lorac.XLoRA(
        hidden="1", hidden_size=5, experts=3, r=2, depth=2, size=6, global_scaling_weight=0.7, **fields
    )
    compiled = lorac.compile(host, {"x": method})
    tensors = compiled.adapters["x"].tensors["0"]
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    p = {key: tensor.detach().numpy() for key, tensor in tensors.items()}
    layers = [(p[f"classifier_{j}_weight"], p[f"classifier_{j}_bias"]) for j in range(2)]
    expected = torch.empty(2, 3, 5, dtype=torch.float64)
    for at in np.ndindex(2, 3):
        given, y = x[at].numpy(), host[0](x[at]).detach().numpy()
        weights = oracle.scalings(oracle.classified(np.tanh(y), layers), method)
        expected[at] = torch.from_numpy(np.tanh(oracle.site(given, y, p["lora_A"], p["lora_B"], weights, method)))
    assert_close(compiled(x).detach(), expected)


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 36_873),
        ({"depth": 8}, 33_587_209),
        ({"depth": 8, "layerwise_scalings": True, "targets": [f"l{i}" for i in range(224)]}, 37_699_552),
    ],
)
def test_the_classifiers_size(fields: dict[str, Any], count: int) -> None:
    specs = xlora(hidden_size=4096, experts=9, **fields).classifier()
    assert sum(torch.Size(spec.shape).numel() for spec in specs.values()) == count


def test_layers_are_weighed_by_their_places() -> None:
    with pytest.raises(lorac.AdapterError, match="needs a list of the sites"):
        lorac.compile(model(), {"x": xlora(targets="all-linear", layerwise_scalings=True)})
    with pytest.raises(lorac.AdapterError, match="does not list"):
        lorac.compile(
            model(), {"x": xlora(targets=["q_proj"], layerwise_scalings=True, hidden="model.norm", hidden_size=32)}
        )


# ── PEFT's ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("ids", [IDS, OTHER], ids=["as captured", "another batch and length"])
@torch.no_grad()
def test_it_is_pefts(ids: torch.Tensor) -> None:
    y, base = of_peft()(input_ids=ids).logits, model()(input_ids=ids).logits
    assert_parity(lorac.compile(model(), {"x": adapter()})(input_ids=ids).logits, y, base)
    assert_parity(emitted()(input_ids=ids).logits, y, base, own_base=emitted()(input_ids=ids, adapters=None).logits)
    router = torch.stack(list(emitted().aux["router"].values())) if emitted()(input_ids=ids) else None
    assert router is not None and (router == 0).sum(-1).eq(1).all()  # two of three are kept
    assert router.amax((0, 1, 2)).gt(0).all()  # and every expert is chosen by some token
    latest = of_peft().base_model.internal_xlora_scalings.permute(2, 0, 1, 3)
    kept = latest * (latest > latest.amin(-1, keepdim=True))
    assert_close(router, kept)


@torch.no_grad()
def test_causal_and_the_base_off() -> None:
    changed = IDS.clone()
    changed[:, 5] = (changed[:, 5] + 7) % 61
    y, other = emitted()(input_ids=IDS).logits, emitted()(input_ids=changed).logits
    assert_close(y[:, :5], other[:, :5])
    assert not torch.equal(y[:, 5:], other[:, 5:])


def test_off_costs_what_the_base_does(tmp_path: Path) -> None:
    emitted().save(tmp_path / "mixed")
    lorac.compile(model(), {}, target="onnxruntime").save(tmp_path / "base")
    mixed, base = (onnx_ir.load(next((tmp_path / name).rglob("*.onnx"))).graph for name in ("mixed", "base"))
    assert 0 < products(base) == products(mixed)
    inside = [node for node in mixed.all_nodes() if node.graph is not mixed]
    assert sum(products_of(node) for node in inside) > products(base)  # a pass of the base, and the experts
    shared = {value.name for node in mixed.all_nodes() for value in node.inputs if value is not None}
    reads = [
        v.name for node in mixed.all_nodes() for v in node.inputs if v is not None and str(v.name).startswith("once:")
    ]
    assert len(reads) == 4 <= len(shared)  # the classifier's weights and biases, once for all sites


def products(graph: Any) -> int:
    """Multiplications by weights, per token, outside of gates."""
    return sum(products_of(node) for node in graph)


def products_of(node: Any) -> int:
    if node.op_type not in {"MatMul", "Gemm"}:
        return 0
    turned = node.inputs[1].producer()
    weight = turned.inputs[0] if turned is not None and turned.op_type == "Transpose" else node.inputs[1]
    static = weight.shape is not None and len(weight.shape) == 2 and all(isinstance(size, int) for size in weight.shape)
    return weight.shape[0] * weight.shape[1] if static else 0


def test_only_the_classifier_trains() -> None:
    compiled = lorac.compile(model(), {"x": adapter()}).train()
    trained = {n.rpartition("/")[2] for n, p in compiled.named_parameters() if p.requires_grad}
    assert trained == {f"classifier_{j}_{kind}" for j in range(2) for kind in ("weight", "bias")}
    optimizer = torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    before = {n: p.detach().clone() for n, p in compiled.named_parameters()}
    losses = []
    for _ in range(8):
        loss = compiled.eval()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for n, p in compiled.named_parameters():
        assert torch.equal(before[n], p) != p.requires_grad


# ── Frozen ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@torch.no_grad()
def test_a_frozen_router_is_a_lora_and_fuses() -> None:
    share = {"classifier_1_weight": 0.0, "classifier_0_weight": 0.0, "classifier_0_bias": 0.0, "classifier_1_bias": 0.0}
    given = adapter()
    tensors = {
        path: {key: torch.zeros_like(t) if key in share else t for key, t in at.items()}
        for path, at in given.tensors.items()
    }
    flat = lorac.Adapter("flat", replace(given.variant, top_k_lora=None), tensors)
    y, base = lorac.compile(model(), {"f": flat})(input_ids=IDS).logits, model()(input_ids=IDS).logits
    mixture = lorac.freeze_router(flat, [1 / 3] * 3)
    assert isinstance(mixture.variant, lorac.LoRA)
    for mode in ("live", "fused"):
        assert_parity(lorac.compile(model(), {"m": mixture}, mode=mode)(input_ids=IDS).logits, y, base)
    with refuses("not_mergeable"):
        lorac.compile(model(), {"f": flat}, mode="fused")
    per_site = lorac.freeze_router(given, torch.rand(len(given.sites), 3))
    assert per_site.sites == given.sites
    with refuses("shape_mismatch", match="3 experts"):
        lorac.freeze_router(given, [1, 2])
    with pytest.raises(lorac.AdapterError, match="routes between no experts"):
        lorac.freeze_router(mixture, [1])


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_what_peft_dropped_is_told_by_name() -> None:
    of_peft()
    with refuses("corrupt_file", match=r"lacks 'base_model\.internal_xlora_classifier\.layers\.0\.weight'"):
        lorac.load_adapter(folder() / "mixed", model())


def test_a_file_needs_a_model_that_tells_its_last_hidden_state(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("turned", [False, True], ids=["as read", "sites in another order"])
@torch.no_grad()
def test_peft_reads_what_is_written_and_answers_the_same(
    turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def turned_round(given: lorac.Adapter) -> lorac.Adapter:
    """The same mixture, the classifier's layers in the opposite order."""
    targets, held = given.variant.targets, {path: dict(given.tensors[path]) for path in reversed(given.variant.targets)}
    for key in ("classifier_1_weight", "classifier_1_bias"):
        last = given.tensors[targets[0]][key].unflatten(0, (len(targets), -1)).flip(0).flatten(0, 1)
        held = {path: {**own, key: last} for path, own in held.items()}
    return lorac.Adapter("x", replace(given.variant, targets=targets[::-1]), held)


def authors(here: Path, **changed: Any) -> Path:
    """Write the same mixture as X-LoRA's authors do, with a list of the experts' names."""
    tensors = classifier()
    layers = {"inner.0": "layers.0", "last": "layers.3"}
    written = {
        f"{own}.{kind}": tensors[f"{name}.{kind}"] for own, name in layers.items() for kind in ("weight", "bias")
    }
    config = {
        "hidden_size": 32,
        "base_model_id": "tiny",
        "adapters": ["0", "1", "2"],
        "xlora_depth": 2,
        "xlora_size": 16,
    }
    config |= {"enable_relu_and_dropout": True, "use_bias": True, **FIELDS, **changed}
    (with_experts(here) / "xlora_config.json").write_text(json.dumps(config))
    save_file(written, here / "xlora_classifier.safetensors")
    return here


@torch.no_grad()
def test_the_authors_files(tmp_path: Path) -> None:
    """The same mixture in their layout, and lorac's own format."""
    lorac.save_adapter(adapter(), tmp_path / "own.safetensors", format="native")
    for path in (authors(tmp_path), tmp_path / "own.safetensors"):
        found = lorac.load_adapter(path, model())
        assert found.variant == adapter().variant
        for site, own in adapter().tensors.items():
            assert all(torch.equal(own[key], found.tensors[site][key]) for key in own)
    with refuses("unused_tensors", match=r"inner\.0\.bias"):
        lorac.load_adapter(authors(tmp_path, use_bias=False), model())


@pytest.mark.parametrize(
    ("kind", "fields", "path"),
    [
        ("Llama", {}, "model.norm"),
        ("GPT2", {"n_embd": 32, "n_layer": 1, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}, "transformer.ln_f"),
        ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "model.decoder.final_layer_norm"),
    ],
)
def test_the_last_hidden_state(kind: str, fields: dict[str, Any], path: str) -> None:
    assert find_last_hidden_state(tiny(kind, **fields)) == (path, 32)


@pytest.mark.parametrize(
    ("field", "value"), [("top_k_lora", 99), ("softmax_temperature", 0.0), ("xlora_dropout_p", 2.0)]
)
def test_a_value_that_the_method_does_not_take_is_refused_in_a_file(field: str, value: float, tmp_path: Path) -> None:
    with refuses("unsupported_field", match=f"takes no {field.removeprefix('xlora_')}={value}") as refused:
        lorac.load_adapter(complete(tmp_path / "x", **{field: value}), model(), "x")
    assert str(tmp_path / "x") in refused.value.what


@pytest.mark.parametrize("dropped", [True, False])
def test_peft_is_blamed_for_the_tensors_that_it_drops_alone(dropped: bool, tmp_path: Path) -> None:
    """It takes keys of layers 0, 1 and 2 for those of the three experts, and saves layer 3."""
    here = complete(tmp_path / "x")
    tensors = load_file(here / "adapter_model.safetensors")
    (missing, *_) = [key for key in tensors if (".0." in key) == dropped]
    save_file({key: tensor for key, tensor in tensors.items() if key != missing}, here / "adapter_model.safetensors")
    with refuses("corrupt_file", match=missing.rpartition(".")[2]) as refused:
        lorac.load_adapter(here, model(), "x")
    assert ("PEFT drops" in refused.value.what) == dropped
