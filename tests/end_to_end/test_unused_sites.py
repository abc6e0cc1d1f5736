"""Adapted layers whose results a program does not use, as poolers are: no slot there, and a line in explain()."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

import lorac
from lorac.testing import assert_parity
from tests.peft_files import make_peft
from tests.refusing import refuses


class Pooling(nn.Module):
    """It pools and answers without; ``query`` and ``key`` read one input, and only one of them counts."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.out = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 5)
        self.pooler, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.query(x)
        scores = self.key(x).softmax(-1)
        self.pooler(hidden[:, 0] * scores[:, 0]).tanh()
        return self.out(hidden)


X = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
ALL = ["query", "key", "out", "pooler", "spare"]


def made():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Pooling().eval()


@pytest.mark.medium("live", keep=["live"])
@pytest.mark.parametrize("mode", ["live", "fused", "baked"])
@torch.no_grad()
def test_get_no_slot_and_are_named(mode, tmp_path):
    model = made()
    oracle = make_peft(model, tmp_path, LoraConfig(r=2, target_modules=ALL), inputs={"x": X})
    compiled = lorac.compile(model, {"a": tmp_path}, target="onnxruntime", mode=mode, example_inputs=(X,))
    assert_parity(compiled(X), oracle(X), model(X))
    said = "adapters have no effect at 'key', 'pooler', 'spare': no output depends on what is computed there"
    explained = compiled.explain()
    assert said in str(explained)
    assert {row.site for row in explained.terms if row.state == "unused"} == {"key", "pooler", "spare"}
    assert not any(row.slots for row in explained.terms if row.state == "unused")
    if mode != "baked":
        sites = {slot.split(":")[0] for slot in compiled.engine.graphs["main"].slots}
        assert sites == {"query", "out"}
        assert_parity(compiled(X[:1]), oracle(X[:1]), model(X[:1]))


class Writing(nn.Module):
    """It answers with a tensor that it writes into, by views of it and as a whole."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        made = torch.zeros(x.shape[0], 3, 4)
        left, right = made.split([1, 2], dim=1)
        left[:, 0] = self.first(x)[:, 0]
        right.add_(self.second(x)[:, 1:])
        made.mul_(self.third(x))
        return made.sin()


@pytest.mark.medium("test_get_no_slot_and_are_named")
@torch.no_grad()
def test_a_site_that_writes_into_the_output_is_used():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Writing().eval()
    given = {"target": "onnxruntime", "example_inputs": (X,), "self_test": False}
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=2, targets="all-linear")}, **given)
    for tensor in compiled.adapters["a"].parameters():
        tensor.normal_(0, 0.12, generator=torch.Generator().manual_seed(1))
    expected = lorac.compile(model, {"a": compiled.adapters["a"]})(X)
    compiled.swap("a")
    assert_parity(compiled(X), expected, model(X))
    assert not any(row.state == "unused" for row in compiled.explain().terms)


@pytest.mark.medium("live", keep=["live"])
@pytest.mark.parametrize("mode", ["live", "fused", "baked"])
def test_rejects_an_adapter_on_unused_sites_only(mode):
    options = {"target": "onnxruntime", "mode": mode, "example_inputs": (X,)}
    idle, busy = lorac.LoRA(r=2, targets=["key", "pooler"]), lorac.LoRA(r=2, targets=["out"])
    with refuses("site_unreached", match="no output of the captured graph 'main' depends on it"):
        lorac.compile(made(), {"a": idle}, **options)
    with refuses("site_unreached", match="'a' touches 'key'"):
        lorac.compile(made(), {"a": idle, "b": busy}, active="b", **options)
