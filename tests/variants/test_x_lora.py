"""X-LoRA: by hand, beside PEFT's own model, off, trained and frozen."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from torch import nn

import lorac
from lorac.frontend.transformer_blocks import find_last_hidden_state
from lorac.testing import assert_close
from tests.limits import decimals
from tests.oracles import x_lora as oracle
from tests.parity import assert_parity
from tests.refusing import refuses
from tests.xlora_files import IDS, OTHER, adapter, complete, model, of_peft, tiny


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
def test_a_single_layer_matches_the_oracle(fields: dict[str, Any]) -> None:
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
@pytest.mark.medium("another batch and length", cases=["as captured"])
@pytest.mark.parametrize("ids", [IDS, OTHER], ids=["as captured", "another batch and length"])
@torch.no_grad()
def test_matches_peft(ids: torch.Tensor) -> None:
    y, base = of_peft()(input_ids=ids).logits, model()(input_ids=ids).logits
    assert_parity(lorac.compile(model(), {"x": adapter()})(input_ids=ids).logits, y, base)
    assert_parity(emitted()(input_ids=ids).logits, y, base, own_base=emitted()(input_ids=ids, adapters=None).logits)
    router = torch.stack(list(emitted().aux["router"].values())) if emitted()(input_ids=ids) else None
    assert router is not None and (router == 0).sum(-1).eq(1).all()  # two of three are kept
    assert router.amax((0, 1, 2)).gt(0).all()  # and every expert is chosen by some token
    latest = of_peft().base_model.internal_xlora_scalings.permute(2, 0, 1, 3)
    kept = latest * (latest > latest.amin(-1, keepdim=True))
    assert_close(router, kept)


def test_experts_train_as_in_peft(tmp_path: Path) -> None:
    """Each expert's alpha/r stays outside of its B, in the program and in its file."""
    fields = {"use_trainable_adapters": True, "xlora_dropout_p": 0.0}
    begun = complete(tmp_path / "begun", fields)
    ours, losses = lorac.compile(tiny(num_key_value_heads=2), {"x": begun}), []
    for trained in (ours.train(), of_peft(**fields).train()):
        optimizer = torch.optim.AdamW([t for t in trained.parameters() if t.requires_grad], lr=1e-2)
        losses.append(torch.zeros(4))
        for step in range(4):
            loss = trained(input_ids=IDS, labels=IDS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1][step] = loss.detach()
    assert_close(*losses)
    lorac.save_adapter(ours.adapters["x"], tmp_path / "ended", model=model())
    read = lorac.load_adapter(tmp_path / "ended", model())
    assert isinstance(read.variant, lorac.XLoRA)
    assert read.variant.scales == (8 / 4, 8 / 2, 8 / 3)
    assert_close(lorac.compile(model(), {"x": read})(IDS).logits, ours.eval()(IDS).logits)


@torch.no_grad()
def test_causal_and_the_base_off() -> None:
    changed = IDS.clone()
    changed[:, 5] = (changed[:, 5] + 7) % 61
    y, other = emitted()(input_ids=IDS).logits, emitted()(input_ids=changed).logits
    assert_close(y[:, :5], other[:, :5])
    assert not torch.equal(y[:, 5:], other[:, 5:])


@pytest.mark.medium("variants/test_once.py: an inactive program computes only the base")
def test_costs_the_base_while_inactive(tmp_path: Path) -> None:
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


# ── Where it reads ───────────────────────────────────────────────────────────────────────────────────────────────────
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
