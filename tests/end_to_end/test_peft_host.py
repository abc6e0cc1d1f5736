"""The host after compiling: the same bits, flags, hooks, mode and random state. And hosts that cannot be captured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import lorac
from lorac.testing import assert_close
from tests import parity
from tests.end_to_end.peft_cases import CASES, checkpoint, example
from tests.peft_files import make_peft
from tests.refusing import refuses
from tests.zoo import ZOO, fingerprint

BY_ID = {case.id: case for case in CASES}
HOSTS = ["tiny_llama-tied_both", "tiny_gpt2-dora_all_bias", "resnet18-saved_norms", "tiny_albert-saved_head"]


def _everything(model: nn.Module) -> dict[str, Any]:
    """What a user could notice of a model."""
    return {
        "fingerprint": fingerprint(model),
        "modules": [(name, type(m), sorted(vars(m))) for name, m in model.named_modules(remove_duplicate=False)],
        "keys": list(model.state_dict()),
        "config": str(getattr(model, "config", "")),
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.medium("in training", cases=["eval-*"])
@pytest.mark.slow(
    "one mode of each target, and one in training",
    keep=["eval-onnxruntime-live", "eval-eager-fused", "train-eager-live"],
)
@pytest.mark.parametrize(
    ("target", "mode"),
    [("eager", "live"), ("eager", "fused"), ("eager", "baked"), ("onnxruntime", "live"), ("onnxruntime", "fused")],
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_leaves_the_model_unchanged(training: bool, target: str, mode: str, tmp_path: Path) -> None:
    hosts = HOSTS if target == "eager" else HOSTS[1 + training : 2 + training]
    for name in hosts:
        case, inputs = BY_ID[name], ZOO[BY_ID[name].model].inputs()
        model, _ = checkpoint(case, tmp_path / name, torch.float32)
        next(model.parameters()).requires_grad_(not training)
        handle = next(model.children()).register_forward_hook(lambda *_: None)
        model.train(training)
        kept, before = {key: value.clone() for key, value in model.state_dict().items()}, _everything(model)

        compiled = lorac.compile(model, {"a": tmp_path / name}, target=target, mode=mode, **example(case.model))
        assert _everything(model) == before
        if not training:
            with torch.no_grad():
                compiled(**inputs)
                if mode != "baked":
                    compiled.swap(None)
                    compiled(**inputs, adapters="a")
            assert _everything(model) == before
        assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
        handle.remove()


class Twice(nn.Module):
    """One layer, and one norm, by two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 5)
        self.second, self.after = self.first, self.norm

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.first(x)))
        result: Tensor = self.last(self.after(torch.tanh(self.second(hidden))))
        return result


class Tied(Twice):
    """Layers and norms of their own over one weight each."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.after = nn.Linear(6, 6), nn.LayerNorm(6)
        self.second.weight, self.after.weight = self.first.weight, self.norm.weight


@pytest.mark.medium("tied layers in eager", keep=["Tied-eager-live"])
@pytest.mark.slow("live programs", cases=["*-fused"])
@pytest.mark.parametrize(
    ("target", "mode"), [("eager", "live"), ("eager", "fused"), ("onnxruntime", "live"), ("onnxruntime", "fused")]
)
@pytest.mark.parametrize("host", [Twice, Tied])
def test_an_adapter_acts_under_the_first_of_two_names_as_pefts_layer_does(
    host: type[nn.Module], target: str, mode: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = host().eval()
    targets: dict[str, Any] = {"target_modules": ["first", "last"], "modules_to_save": ["norm"]}
    oracle = make_peft(model, tmp_path, LoraConfig(r=2, **targets), inputs=INPUTS)
    compiled = lorac.compile(model, {"a": tmp_path}, target=target, mode=mode, example_inputs=INPUTS)
    with torch.no_grad():
        expected, base = oracle(**INPUTS), model(**INPUTS)
        parity.assert_parity(compiled(**INPUTS), expected, base)
        compiled.save(tmp_path / "artifact")
        parity.assert_parity(lorac.load(tmp_path / "artifact")(**INPUTS), expected, base)
        compiled.swap(None)
        assert_close(compiled(**INPUTS), base)


# Hosts that cannot be captured


class Stubborn(nn.Module):
    """Asks for the value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if hidden.sum() > 0:  # the line that is to be named
            hidden = -hidden
        result: Tensor = self.second(hidden)
        return result


class Forked(nn.Module):
    """Has a layer that its forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(6, 9), nn.Linear(6, 9)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.used(x)
        return result


INPUTS = {"x": torch.randn(3, 6, generator=torch.Generator().manual_seed(0))}
DYNAMIC = {"x": {0: torch.export.Dim.DYNAMIC}}


def test_a_model_that_does_not_trace_is_named_with_its_line(tmp_path: Path) -> None:
    model = Stubborn().eval()
    oracle = make_peft(model, tmp_path, LoraConfig(r=2, target_modules=["first"]), inputs=INPUTS)
    with refuses("capture_failed", match=r"test_peft_host\.py:\d+: if hidden\.sum\(\) > 0"):
        lorac.compile(model, {"a": tmp_path}, target="onnxruntime", example_inputs=INPUTS)
    with torch.no_grad():  # eager runs what cannot be captured
        answer = lorac.compile(model, {"a": tmp_path})(**INPUTS)
        parity.assert_parity(answer, oracle(**INPUTS), model(**INPUTS))


@pytest.mark.medium("test_unused_sites.py")
@pytest.mark.parametrize("mode", ["live", "fused", "baked"])
def test_an_adapter_on_layers_that_the_graph_never_calls(mode: str, tmp_path: Path) -> None:
    """Eager captures nothing: ONNX Runtime warns at compile(), eager at export()."""
    model = Forked().eval()
    settings = {"example_inputs": INPUTS, "mode": mode}
    adapter = lorac.LoRA(r=2, targets=["spare"])
    with refuses("site_unreached", match=r"'a' touches 'spare'|'spare' \(1 sites\) is adapted"):
        lorac.compile(model, {"a": adapter}, target="onnxruntime", **settings)
    both = {"a": adapter, "b": lorac.LoRA(r=2, targets=["used"])}
    with refuses("site_unreached", match="'a' touches 'spare'"):
        lorac.compile(model, both, target="onnxruntime", active="b", **settings)
    with refuses("site_unreached", match="'spare'"):
        lorac.compile(model, {"a": adapter}).export("onnxruntime", **settings)


@pytest.mark.medium("live", keep=["live"])
@pytest.mark.parametrize("mode", ["live", "fused", "baked"])
def test_an_adapter_on_some_layers_that_the_graph_never_calls(mode: str, tmp_path: Path) -> None:
    model = Forked().eval()
    oracle = make_peft(model, tmp_path, LoraConfig(r=2, target_modules=["used", "spare"]), inputs=INPUTS)
    settings = {"example_inputs": INPUTS, "dynamic_shapes": DYNAMIC, "mode": mode}
    compiled = lorac.compile(model, {"a": tmp_path}, target="onnxruntime", **settings)
    with torch.no_grad():
        parity.assert_parity(compiled(**INPUTS), oracle(**INPUTS), model(**INPUTS))
