"""X-LoRA whose scaling pass has the experts in it: beside PEFT's, in programs, trained, generating, and its files."""

import copy
import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir
import peft
import pytest
import torch
from torch import nn

import lorac
from lorac.testing import HOSTS, assert_close, conformance
from tests.oracles import x_lora as oracle
from tests.parity import assert_parity
from tests.refusing import refuses
from tests.variants.test_x_lora import products, xlora
from tests.xlora_files import FIELDS, IDS, OTHER, authors, complete, folder, model, of_peft

HALF = {"scaling_pass_value": 0.5, **FIELDS}
SLIGHT = {"scaling_pass_value": 1e-3}
KEPT = {"scaling_pass_value": 1e-3, "enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2}
LAYERWISE = {"scaling_pass_value": -0.5, "layerwise_scalings": True}


@functools.cache
def adapter(number: int = 0) -> lorac.Adapter:
    fields = (HALF, SLIGHT, KEPT, LAYERWISE)[number]
    return lorac.load_adapter(complete(folder() / f"whole-{number}", fields), model(), "x")


@functools.cache
def of_the_base() -> lorac.Adapter:
    """The same tensors, the scaling pass one of the base."""
    return lorac.Adapter("z", replace(adapter().variant, scaling_pass_value=0.0), adapter().tensors)


@functools.cache
def emitted() -> lorac.Compiled:
    return lorac.compile(model(), {"x": adapter(), "z": of_the_base()}, target="onnxruntime", active="x")


@pytest.mark.medium("the classifier that chooses", keep=["top-k"])
@pytest.mark.parametrize("number", range(4), ids=["top-k", "slight", "a softmax behind top-k", "layerwise"])
@torch.no_grad()
def test_matches_peft(number: int) -> None:
    made = of_peft(**(HALF, SLIGHT, KEPT, LAYERWISE)[number])
    given = adapter(number)
    other = lorac.Adapter("o", replace(given.variant, scaling_pass_value=0.0), given.tensors)
    compiled = lorac.compile(model(), {"x": given, "o": other}, active="x")
    for ids in (IDS, OTHER):
        y, base = made(input_ids=ids).logits, model()(input_ids=ids).logits
        assert_parity(compiled(input_ids=ids).logits, y, base)
        with pytest.raises(AssertionError):  # it matters: what the base's pass gives is another answer
            assert_parity(compiled(input_ids=ids, adapters="o").logits, y, base)


@pytest.mark.slow("the comparison with PEFT, and test_x_lora.py counts the base's cost")
@torch.no_grad()
def test_a_program_matches_peft_and_costs_the_base_while_inactive(tmp_path: Path) -> None:
    """Beside an adapter whose scaling pass is the base's, at another batch and length, off and on, saved and loaded."""
    found = emitted()
    found.save(tmp_path / "mixed")
    z = lorac.compile(model(), {"z": of_the_base()})
    for compiled, ids in ((found, IDS), (found, OTHER), (lorac.load(tmp_path / "mixed"), OTHER)):
        y, base = of_peft(**HALF)(input_ids=ids).logits, model()(input_ids=ids).logits
        compiled.swap(None)
        own = compiled(input_ids=ids).logits
        compiled.swap("x")
        assert_parity(compiled(input_ids=ids).logits, y, base, own_base=own)
        compiled.swap("z")
        assert_parity(compiled(input_ids=ids).logits, z(input_ids=ids).logits, base, own_base=own)
    graph = onnx_ir.load(next((tmp_path / "mixed").rglob("*.onnx"))).graph
    assert products(graph) == sum(m.weight.numel() for m in model().modules() if isinstance(m, nn.Linear))


@pytest.mark.slow("the comparison with PEFT, and backends/onnx/test_gates.py")
@torch.no_grad()
def test_sizes_that_a_pass_and_the_branches_share_go_through_a_gate() -> None:
    """As they do where the exporter tells nothing of the sizes that a reshape joins."""
    fields = {"depth": 1, "experts": 4, "r": 8, "targets": ("q_proj", "v_proj", "down_proj")}
    made = lorac.XLoRA(hidden="model.norm", hidden_size=32, scaling_pass_value=0.5, **fields)
    eager = lorac.compile(model(), {"x": made})
    generator = torch.Generator().manual_seed(0)
    for tensor in eager.adapters["x"].parameters():
        tensor.normal_(0, 0.1, generator=generator)
    given = eager.adapters["x"]
    other = lorac.Adapter("z", replace(given.variant, scaling_pass_value=0.0), given.tensors)
    emitted = lorac.compile(model(), {"x": given, "z": other}, "onnxruntime", (IDS,), active="x")
    y, base = eager(input_ids=OTHER).logits, model()(input_ids=OTHER).logits
    assert_parity(emitted(input_ids=OTHER).logits, y, base)


@pytest.mark.medium("the comparison with PEFT, and mixtures in test_swap.py")
@torch.no_grad()
def test_a_mixture_is_the_sum_of_its_adapters() -> None:
    """The scaling pass is of the adapter whole, whatever its strength and whatever else is on."""
    eager = lorac.compile(model(), {"x": adapter(), "z": of_the_base()}, active="x")
    choice = {"x": 0.4, "z": 0.5}
    y, base = eager(input_ids=OTHER, adapters=choice).logits, model()(input_ids=OTHER).logits
    own = emitted()(input_ids=OTHER, adapters=None).logits
    assert_parity(emitted()(input_ids=OTHER, adapters=choice).logits, y, base, own_base=own)


def test_its_gradients_are_pefts() -> None:
    made, compiled = of_peft(**HALF), lorac.compile(model(), {"x": adapter()})
    layers = made.base_model.internal_xlora_classifier.layers
    made(input_ids=IDS, labels=IDS).loss.backward()
    compiled(input_ids=IDS, labels=IDS).loss.backward()
    found = compiled.adapters["x"].tensors[adapter().sites[0]]
    for j, layer in enumerate((layers[0], layers[3])):
        for kind in ("weight", "bias"):
            assert_close(found[f"classifier_{j}_{kind}"].grad, getattr(layer, kind).grad)
            getattr(layer, kind).grad = None


@torch.no_grad()
def test_eager_generates_without_a_cache() -> None:
    compiled = lorac.compile(model(), {"x": adapter()})
    row = IDS[:1, :4]
    answer = compiled.generate(input_ids=row, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for length in range(4, 8):
        assert compiled(input_ids=answer[:, :length]).logits[0, -1].argmax() == answer[0, length]
    cache = compiled(input_ids=row, use_cache=True).past_key_values
    with pytest.raises(lorac.Unavailable, match=r"fill the call's cache(.|\n)*cache=True"):
        compiled(input_ids=answer[:, 4:5], past_key_values=cache)


@pytest.mark.slow
@torch.no_grad()
def test_generates_with_a_second_cache_for_the_scaling_pass() -> None:
    eager = lorac.compile(model(), {"x": adapter()})
    grown = lorac.compile(model(), {"x": adapter()}, target="onnxruntime", cache=True)
    for choice in ("x", None, {"x": 0.5}, [None, "x"]):
        wanted = eager.generate(input_ids=IDS, max_new_tokens=9, adapters=choice)
        assert torch.equal(grown.generate(input_ids=IDS, max_new_tokens=9, adapters=choice), wanted)


@pytest.mark.slow
def test_compiles_for_tensorrt() -> None:
    """What it builds is held against the captured program without a GPU (``lorac.backends.tensorrt.cpu_check``)."""
    pytest.importorskip("tensorrt_rtx")
    with pytest.warns(lorac.LoracWarning, match="cannot run here"):
        assert lorac.compile(model(), {"x": adapter()}, target="tensorrt").active == {"x": 1.0}


def checks() -> Any:
    """The kit, of two layers in half precision too; what it asks of targets and of files waits for the long run."""
    method = lorac.XLoRA(**oracle.FIELDS, r=2, scaling_pass_value=0.5, top_k_lora=1, global_scaling_weight=0.7)
    for check in conformance(method, oracle, hosts={name: HOSTS[name] for name in ("linear", "two_read")}):
        at_once = check.name.rpartition("-")[2] in {"formula", "sizes", "half", "training"}
        yield pytest.param(check, id=str(check), marks=() if at_once else pytest.mark.slow)


@pytest.mark.medium("the formula, and the kit's checks without an own pass", keep=["*-formula"])
@pytest.mark.parametrize("check", list(checks()))
def test_conforms(check: Any) -> None:
    check()


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@torch.no_grad()
def test_files_hold_the_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT reads what is written and answers the same; the authors' layout says it too, and lorac's own."""
    lorac.save_adapter(adapter(), tmp_path / "w", model=model())
    assert json.loads((tmp_path / "w" / "adapter_config.json").read_text())["scaling_pass_value"] == 0.5
    host = copy.deepcopy(model())
    host.config.use_cache = False
    monkeypatch.chdir(tmp_path / "w")  # PEFT looks for the experts from there
    read = peft.PeftModel.from_pretrained(host, str(tmp_path / "w")).eval()
    base = model()(input_ids=OTHER).logits
    assert_parity(read(input_ids=OTHER).logits, of_peft(**HALF)(input_ids=OTHER).logits, base)
    lorac.save_adapter(adapter(), tmp_path / "own.safetensors", format="native")
    for path in (tmp_path / "w", tmp_path / "own.safetensors"):
        assert lorac.load_adapter(path, model()).variant == adapter().variant


@torch.no_grad()
def test_the_authors_files_hold_the_value(tmp_path: Path) -> None:
    written = authors(tmp_path, scaling_pass_value=0.5)
    assert lorac.load_adapter(written, model()).variant == adapter().variant
    with refuses("unsupported_field", match="scaling_pass_value=None: expected a number"):
        lorac.load_adapter(authors(tmp_path, scaling_pass_value=None), model())


def test_the_authors_layout_is_written(tmp_path: Path) -> None:
    """With ReLUs between the classifier's layers and without; read again it is the same, wherever the folder lies."""
    for activation in (True, False):
        given = lorac.Adapter("x", replace(adapter().variant, activation=activation), adapter().tensors)
        lorac.save_adapter(given, tmp_path / "w", format="xlora", model=model())
        assert json.loads((tmp_path / "w" / "xlora_config.json").read_text())["scaling_pass_value"] == 0.5
        (tmp_path / "w").rename(tmp_path / f"moved-{activation}")
        found = lorac.load_adapter(tmp_path / f"moved-{activation}", model())
        assert found.variant == given.variant
        for site, own in given.tensors.items():
            assert all(torch.equal(own[key], found.tensors[site][key]) for key in own)
    with pytest.raises(lorac.BaseNeeded, match="as they are met in the model"):
        lorac.save_adapter(adapter(), tmp_path / "v", format="xlora")
    with refuses("unsupported_field", match="is of lora, and the format 'xlora' holds"):
        plain = lorac.load_adapter(folder() / "0", model())
        lorac.save_adapter(plain, tmp_path / "v", format="xlora", model=model())


# ── By hand ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("value", "error"),
    [(None, lorac.WrongType), ("0.5", lorac.WrongType), (True, lorac.WrongType), (float("nan"), lorac.AdapterError)],
)
def test_a_value_is_a_number(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="scaling_pass_value"):
        lorac.compile(model(), {"x": xlora(scaling_pass_value=value, hidden="model.norm", hidden_size=32)})
