"""Spike: an adapter on a grouped convolution that leaves its blocks runs live; fusing it is refused."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F

import lorac
from lorac.variants._masks import MaskMaker
from tests.parity import assert_parity
from tests.refusing import refuses
from tests.variants.away import away

pytestmark = pytest.mark.medium("end_to_end/test_peft_eager.py has grouped convolutions, and the kit has groups")

HOST = torch.nn.Sequential(OrderedDict(conv=torch.nn.Conv2d(6, 4, (3, 1), padding=(1, 0), groups=2))).eval()
X = torch.randn(2, 6, 5, 4)
INSIDE = MaskMaker(lambda context: torch.tensor([[1, 3], [0, 13]]), lambda site: 2)
LEAVES = lorac.LoRA(r=3, targets=["conv"])


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@torch.no_grad()
def test_a_live_adapter_matches_peft_on_a_grouped_convolution(target):
    adapter = away(LEAVES, HOST, (X,), "a")
    p = adapter.tensors["conv"]
    a, b = p["lora_A"].reshape(3, 6, 3, 1), p["lora_B"].reshape(4, 3, 1, 1)  # PEFT's: A over all channels, groups 1
    y = HOST(X) + adapter.variant.scale * F.conv2d(F.conv2d(X, a, padding=(1, 0)), b)
    compiled = lorac.compile(HOST, {"a": adapter}, target=target, example_inputs=(X,))
    assert_parity(compiled(X), y, HOST(X), own_base=compiled(X, adapters=None))


@pytest.mark.parametrize("mode", ["fused", "baked"])
def test_rejects_fusing_across_groups(mode):
    adapter = away(LEAVES, HOST, (X,), "a")
    with refuses("not_mergeable", match="conv"):
        lorac.compile(HOST, {"a": adapter}, mode=mode)
    fused = lorac.compile(HOST, {"b": lorac.SHiRA(mask=INSIDE, targets=["conv"])}, mode="fused")
    with pytest.raises(lorac.NeedsRecompile, match="conv"):
        fused.add_adapter(adapter)


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@torch.no_grad()
def test_fuses_a_change_within_groups(target):
    adapter = lorac.compile(HOST, {"b": lorac.SHiRA(mask=INSIDE, targets=["conv"])}).adapters["b"]
    adapter.tensors["conv"]["values"].copy_(torch.tensor([0.2, -0.3]))
    delta = torch.zeros(4, 3, 3, 1)
    delta[1, 0, 0], delta[3, 1, 1] = 0.2, -0.3  # row 3 belongs to the second group, whose channels begin at column 9
    y = F.conv2d(X, HOST.conv.weight + delta, HOST.conv.bias, padding=(1, 0), groups=2)
    compiled = lorac.compile(HOST, {"b": adapter}, target=target, mode="fused", example_inputs=(X,))
    assert_parity(compiled(X), y, HOST(X), own_base=compiled(X, adapters=None))
