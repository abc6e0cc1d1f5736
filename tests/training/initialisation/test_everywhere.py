"""Every initialiser: its start, training over an untouched base, files, ONNX Runtime, and rejected input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorac
from lorac.testing import assert_close
from lorac.training import initialisation as starts
from tests import parity, zoo
from tests.limits import assert_apart
from tests.refusing import refuses
from tests.training.initialisation.hosts import ALPHA, AT_BASE, LORA, OFF_BASE, RANK, STARTS, batches, begun, net

DATA = {name: start for name, start in STARTS.items() if start.reads}


def moved(name: str, dtype: torch.dtype) -> tuple[Any, lorac.Adapter]:
    """A host, and an adapter that was begun and trained on it for a while."""
    model = net(dtype)
    compiled, batch = lorac.compile(model, {"a": begun(name, model, dtype)}), batches(1, dtype)[0]
    first = float(compiled(**batch).loss.detach())
    optimizer = torch.optim.AdamW((p for p in compiled.train().parameters() if p.requires_grad), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        compiled(**batch).loss.backward()
        optimizer.step()
    assert float(compiled.eval()(**batch).loss.detach()) < first
    assert all(torch.equal(t, net(dtype).state_dict()[k]) for k, t in model.named_parameters())
    return model, compiled.adapters["a"]


@pytest.mark.parametrize("name", STARTS)
def test_starts_at_the_model_and_leaves_it_unchanged(name: str) -> None:
    model = net()
    model.down.weight.grad = torch.ones_like(model.down.weight)
    before, state, stream = zoo.fingerprint(model), net().state_dict(), torch.get_rng_state()
    adapter = begun(name, model)
    assert zoo.fingerprint(model)[1] == before[1]
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(t.is_contiguous() for own in adapter.tensors.values() for t in own.values())  # as Trainer saves them
    assert torch.equal(model.down.weight.grad, torch.ones_like(model.down.weight))
    assert model.up.weight.grad is None and model.up.weight.requires_grad
    x = batches(1)[0]["x"]
    found, base = lorac.compile(model, {"a": adapter})(x), model(x)
    if name in OFF_BASE:
        assert_apart(found.detach(), base.detach())
    else:
        assert_close(found.detach(), base.detach())


@pytest.mark.parametrize("name", AT_BASE)
def test_starts_away_from_zero_by_default(name: str) -> None:
    tensors = begun(name, net()).tensors.values()
    assert all(bool(own["lora_A"].any()) for own in tensors)
    assert all(bool(own["lora_B"].any()) == (name != "eva") for own in tensors)


@pytest.mark.medium("each start in eager, and session/test_artifact.py; PiSSA")
@pytest.mark.parametrize("name", ["pissa", "lora_sb"])
def test_exports(name: str) -> None:
    model, adapter = moved(name, torch.float32)
    x = batches(1, torch.float32)[0]["x"]
    eager = lorac.compile(model, {"a": adapter}, example_inputs=(x,))
    runtime = eager.export(target="onnxruntime")
    parity.assert_parity(runtime(x), eager(x).detach(), model(x).detach())


LOADS = """
import sys, torch, lorac
from tests.training.initialisation.hosts import batches, net
x = batches(1, torch.float32)[0]["x"]
for path in sys.argv[2:]:
    model = net(torch.float32)
    torch.save(lorac.compile(model, {"a": lorac.load_adapter(path, model)})(x).detach(), path + ".pt")
"""


@pytest.mark.slow("test_exports")
def test_files_give_the_same_in_a_new_process(tmp_path: Path) -> None:
    """lorac's format holds all; PEFT's holds what LoRAs are, a residual as one of twice the rank."""
    x, paths, expected = batches(1, torch.float32)[0]["x"], [], {}
    for name in ("pissa", "eva", "lora_one", "lora_sb"):
        model, adapter = moved(name, torch.float32)
        for format in ("native", "peft") if name != "lora_sb" else ("native",):
            path = str(tmp_path / f"{name}_{format}")
            lorac.save_adapter(adapter, path, format=format, model=model)
            paths.append(path)
            expected[path] = lorac.compile(model, {"a": adapter})(x).detach()
    subprocess.run([sys.executable, "-c", LOADS, "-", *paths], check=True, timeout=120)
    for path in paths:
        parity.assert_parity(torch.load(path + ".pt"), expected[path], net(torch.float32)(x).detach())


def test_of_dora() -> None:
    """DoRA over PiSSA's residual (DuDe) begins at the base, with factors that are not zero."""
    model = net()
    fresh = lorac.DoRA(r=RANK, alpha=ALPHA, targets=("up", "down"))
    adapter = starts.PiSSA()(fresh, model)
    x = batches(1)[0]["x"]
    assert_close(lorac.compile(model, {"a": adapter})(x).detach(), model(x).detach())
    assert adapter.tensors["up"]["lora_B"].any()


def test_patterns_hold() -> None:
    fresh = lorac.LoRA(r=2, alpha=3, rank_pattern={"up": 3}, alpha_pattern={"down": 5}, targets=("up", "down"))
    model = net()
    adapter = starts.PiSSA()(fresh, model)
    assert adapter.tensors["up"]["start_A"].shape == (3, 6)
    x = batches(1)[0]["x"]
    assert_close(lorac.compile(model, {"a": adapter})(x).detach(), model(x).detach())


def test_an_adapter_is_only_read() -> None:
    model = net()
    given = lorac.compile(model, {"a": LORA}).adapters["a"]
    kept = {path: {key: tensor.clone() for key, tensor in own.items()} for path, own in given.tensors.items()}
    made = starts.PiSSA()(given, model)
    assert made is not given and given.variant == LORA
    assert all(torch.equal(given.tensors[path][key], kept[path][key]) for path in kept for key in kept[path])


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("given", [None, []])
def test_rejects_a_start_without_batches(name: str, given: Any) -> None:
    model = net()
    before = zoo.fingerprint(model)
    with refuses("batches_needed", match="there are no batches"):
        DATA[name](lorac.LoRAXS(r=2, targets=("up",)) if name == "lora_sb" else LORA, model, given)
    assert zoo.fingerprint(model) == before


def nan(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"x": batch["x"] * float("nan")}


@pytest.mark.parametrize(
    ("start", "variant", "given", "error", "says"),
    [
        (starts.LoRAGA(), LORA, [{"x": batches(1)[0]["x"]}], lorac.AdapterError, "has no loss"),
        (starts.LoRAGA(), LORA, map(nan, batches()), lorac.AdapterError, "gradient"),
        (starts.EVA(), LORA, map(nan, batches()), lorac.AdapterError, "input"),
        (starts.EVA(), LORA, [{"x": batches(1)[0]["x"][:1]}], lorac.AdapterError, "principal components"),
        (starts.PiSSA(), lorac.LoRAXS(r=2, targets=("up",)), None, lorac.AdapterNotFound, "method loraxs"),
        (starts.LoRASB(lr=1, steps=5), LORA, batches(), lorac.AdapterNotFound, "method lora"),
        (starts.PiSSA(), lorac.LoRA(r=7, targets=("up",)), None, lorac.SiteError, "needs 7 singular"),
        (starts.LoRAGA(), lorac.LoRA(r=4, targets=("up",)), batches(), lorac.SiteError, "needs 8 singular"),
        (starts.LoRAGA(), lorac.LoRA(r=1, targets=("never",)), batches(), lorac.SiteError, "'never'"),
        (starts.CorDA(), lorac.LoRA(r=1, targets=("never",)), batches(), lorac.SiteError, "'never'"),
        (starts.PiSSA(), lorac.LoRA(targets=("upp",)), None, lorac.SiteError, "upp"),
    ],
)
def test_a_rejected_start_changes_nothing(start: Any, variant: Any, given: Any, error: Any, says: str) -> None:
    model = net()
    before, state = zoo.fingerprint(model)[1], {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=says):
        start(variant, model, given)
    assert zoo.fingerprint(model)[1] == before
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_rejects_unsupported_layers() -> None:
    model = zoo.ZOO["plain_conv"].fresh()
    image = zoo.ZOO["plain_conv"].inputs()
    with refuses("site_unsupported", match="needs linear layers"):
        starts.EVA()(lorac.LoRA(r=1, targets=("stem",)), model, [image])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: starts.LoRAGA(direction="ArB"), "nearest: ArB2r"),
        (lambda: starts.LoRAGA(gamma=0), "gamma=0"),
        (lambda: starts.LoRAOne(gamma=-1), "gamma=-1"),
        (lambda: starts.CorDA(mode="kmp"), "nearest: kpm"),
        (lambda: starts.EVA(rho=0.5), "rho=0.5"),
        (lambda: starts.PiSSA(rounds=-1), "rounds=-1"),
        (lambda: starts.LoRASB(lr=0, steps=3), "lr=0"),
    ],
)
def test_settings_that_make_no_sense(make: Any, says: str) -> None:
    with pytest.raises(lorac.OptionError, match=says):
        make()
